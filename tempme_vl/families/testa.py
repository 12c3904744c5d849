"""TESTA: a video transformer of divided attention, whose retrieval and question answering read BLIP's texts."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tempme_vl.backbones import testa as towers
from tempme_vl.backbones.base import Backbone
from tempme_vl.families.base import Family


def tower_from_testa(
    state: Mapping[str, Tensor], heads: int, image_size: int, num_frames: int, attention: towers.Kind
) -> tuple[Backbone, towers.Config]:
    """The visual tower of a state dict under the names of BLIP's and TESTA's files; see
    `VisualFrontend.from_testa_state_dict`."""
    config = towers.config_of(state, heads, image_size, num_frames, attention)
    backbone = towers.build(config)
    towers.load(backbone, state, "the state")
    return backbone, towers.saved_config(config)


FAMILY = Family(
    towers.load_tower, towers.build_tower, towers.Config, ("temporal_scaling", "attention"), needs_vocabulary=True
)
