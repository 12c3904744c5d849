"""UMT: space-time ViTs, whose retrieval model has layers that fuse both sides (`tempme_vl.tasks.umt_retrieval`)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tempme_vl.backbones import umt as towers
from tempme_vl.backbones.base import Backbone
from tempme_vl.families.base import Family


def tower_from_umt(
    state: Mapping[str, Tensor],
    heads: int,
    image_size: int,
    num_frames: int,
    mode: towers.Mode,
    positions: towers.Positions,
    pretrained_frames: int | None,
) -> tuple[Backbone, towers.Config]:
    """The visual tower of a state dict in any form of UMT's files; see `VisualFrontend.from_umt_state_dict`."""
    weights, _ = towers.tower_state(state)
    config = towers.config_of(weights, heads, image_size, num_frames, mode, positions, pretrained_frames)
    backbone = towers.build(config)
    towers.load(backbone, weights, "the state")
    return backbone, towers.saved_config(config)


FAMILY = Family(
    towers.load_tower,
    towers.build_tower,
    towers.Config,
    ("mode", "positions"),
    sampling="segment",
    needs_vocabulary=True,
)
