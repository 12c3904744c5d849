"""UMT: space-time ViTs, whose retrieval model has layers that fuse both sides (`tempme_vl.tasks.umt_retrieval`)."""

from tempme_vl.backbones import umt as towers
from tempme_vl.families.base import Family

FAMILY = Family(
    towers.load_tower,
    towers.build_tower,
    towers.Config,
    ("mode", "positions"),
    sampling="segment",
    needs_vocabulary=True,
)
