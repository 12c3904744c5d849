"""TempMe's temporal modelling alone (ICLR 2025, the ablation of functions): clips are joined, and nothing merges.

Later blocks attend across frames, each joined clip has its learnt positions, and all tokens stay: for 12 frames of B/32
attention sees 12 x 50, 6 x 100, 3 x 200 and 1 x 600 tokens, 54.23 GFLOPs (the paper: 54.3).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tempme_vl.merging import tempme
from tempme_vl.merging.method import Method
from tempme_vl.merging.schedule import Encoder, MergeSchedule


@dataclass(frozen=True)
class Options:
    """TempMe's: the blocks that join clips, and how many neighbouring clips each joins."""

    merge_layers: tuple[int, ...]
    merge_frames: tuple[int, ...]


def published(encoder: Encoder) -> dict[str, Any]:
    return {name: value for name, value in tempme.published(encoder).items() if name == "merge_layers"}


def schedule(encoder: Encoder, options: Options) -> MergeSchedule:
    """All tokens stay.

    Raises:
        ValueError: see TempMe's `schedule`.
    """
    joins = tempme.Options(0, options.merge_layers, options.merge_frames, 0, 0)
    return replace(tempme.schedule(encoder, joins), method="temporal_only")


METHOD = Method(
    Options,
    schedule,
    tempme.layer_merge,
    published,
    tempme.shaped,
    joint=False,
    reads=("tokens",),
    behind="it changes which tokens attend together, and behind a tower none does: choose a method that merges",
    apart=True,
)
