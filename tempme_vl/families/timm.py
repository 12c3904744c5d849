"""Vision transformers of timm, which have no text tower beside them."""

from tempme_vl.backbones import timm as towers
from tempme_vl.families.base import Family

FAMILY = Family(towers.load_tower, towers.build_tower, towers.Config, ("layer", "image_size", "num_classes"))
