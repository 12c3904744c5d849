"""A method's schedule for a tower, chosen for a budget where one is given, and what it costs."""

from __future__ import annotations

import logging
from dataclasses import astuple
from typing import Any

from tempme_vl.backbones.base import TowerShape
from tempme_vl.merging import PAPER, Counting, Encoder, Limit, MergeSchedule, has_setting, make_schedule

_log = logging.getLogger(__name__)

# Of the GFLOPs without merging, where nothing says how much to merge; the paper's towers have 0.66 and 0.58.
BUDGET = 0.6


def schedule_for(
    method: str,
    layers: int,
    shape: TowerShape,
    frames: int,
    budget: float | None = None,
    tokens: int | None = None,
    **options: Any,
) -> MergeSchedule:
    """A method's schedule for a tower: the paper's setting, the one of the given options, or one below a limit.

    Args:
        budget: the share of the GFLOPs without merging (`tower_gflops`) to stay below, 0 to 1. Options that are not
            given are solved for: the nearest below it of the paper's shape (`shaped` and `knobs` of the method).
        tokens: the number of tokens that leave the encoder, CLS included, to stay below in the same way.
        options: the method's own (`tempme_vl.merging.make_schedule`). Without a limit, where the paper has no setting
            and some are not given, the budget is `BUDGET`.

    Raises:
        ValueError: both limits, one that cannot be reached, or what `make_schedule` refuses.
    """
    encoder = Encoder(layers, frames, shape.tokens, shape.num_prefix, shape.joint, shape.divided)
    limit = _limit(encoder, shape, budget, tokens)
    if limit is None and not has_setting(method, encoder, options):
        limit = _limit(encoder, shape, BUDGET, None)
    given = layers, frames, shape.tokens, shape.num_prefix, shape.joint, limit, shape.divided
    schedule = make_schedule(method, *given, **options)
    if limit is not None:
        _log.info("%s", schedule_in_words(schedule, shape))
    return schedule


def _limit(encoder: Encoder, shape: TowerShape, budget: float | None, tokens: int | None) -> Limit | None:
    if budget is not None and tokens is not None:
        raise ValueError(f"give a budget or a number of tokens; got budget={budget}, tokens={tokens}")
    if budget is not None:
        if not 0 < budget <= 1:
            raise ValueError(f"budget is a share of the GFLOPs without merging, 0 to 1; got {budget}")
        whole = tower_gflops(MergeSchedule.identity(*astuple(encoder)), shape)
        return Limit("budget", budget, lambda schedule: tower_gflops(schedule, shape) / whole)
    if tokens is not None:
        if tokens < 1:
            raise ValueError(f"tokens counts what leaves the encoder, 1 or more; got {tokens}")
        return Limit("tokens", tokens, lambda schedule: schedule.output_tokens)
    return None


def schedule_in_words(schedule: MergeSchedule, shape: TowerShape) -> str:
    """What becomes of a video's tokens, by which merging, and its cost beside that without merging."""
    clips, tokens = schedule.token_counts[-1]
    layers = len(schedule.plan)
    gflops, of = tower_gflops(schedule, shape), tower_gflops(schedule.whole, shape)
    fewer = [plan.fewer_before + plan.fewer_after + plan.fewer_last for plan in schedule.plan]
    joins = [f"{plan.join} at block {layer}" for layer, plan in enumerate(schedule.plan) if plan.join is not None]
    return (
        f"{schedule.method}: {schedule.frames} x {schedule.tokens} tokens -> {clips} x {tokens}, {gflops:.4g} of "
        f"{of:.4g} GFLOPs a video ({gflops / of:.3f}); pairs merged in each of {layers} blocks before attention "
        f"{[plan.before for plan in schedule.plan]}, after it {[plan.after for plan in schedule.plan]}"
        f"{f'; tokens fewer in each block {fewer}' if any(fewer) else ''}"
        f"{'; clips joined: ' + ', '.join(joins) if joins else ''}"
    )


def tower_gflops(schedule: MergeSchedule, shape: TowerShape, counting: Counting = PAPER) -> float:
    """Cost of one video in a tower of a shape, in the paper's counting or another (`MergeSchedule.gflops`)."""
    return schedule.gflops(
        shape.width,
        shape.heads,
        shape.mlp_ratio,
        shape.embed_dim,
        shape.image_size,
        shape.patch_size,
        shape.quick_gelu,
        shape.norm_pre,
        shape.pooling,
        counting,
    )
