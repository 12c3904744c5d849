"""Merging methods. A new one is a file with a `Method`, and a line in `tempme_vl.registries`; from outside the package
`METHODS.register("name", METHOD)`, or an entry point of the group "tempme_vl.methods"."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from tempme_vl.costs import FVCORE, PAPER, Counting
from tempme_vl.merging.base import LayerMerge, TokenMerger, is_of_merging, learnt_modules, learnt_of_part, share_learnt
from tempme_vl.merging.budget import Limit, fit_knobs
from tempme_vl.merging.method import Behind, Method
from tempme_vl.merging.schedule import Encoder, LayerPlan, MergeSchedule
from tempme_vl.registries import METHODS

__all__ = [
    "FVCORE",
    "METHODS",
    "PAPER",
    "Behind",
    "Counting",
    "Encoder",
    "LayerMerge",
    "LayerPlan",
    "Limit",
    "MergeSchedule",
    "Method",
    "TokenMerger",
    "fit_knobs",
    "has_setting",
    "is_of_merging",
    "learnt_modules",
    "learnt_of_part",
    "make_schedule",
    "merge_layers",
    "share_learnt",
]

# The first of the ways to stay below a limit that reaches this share of it is taken, the paper's setting before others.
NEAR = 0.99


def make_schedule(
    method: str,
    layers: int,
    frames: int,
    tokens: int,
    prefix: int = 1,
    joint: bool = False,
    limit: Limit | None = None,
    divided: bool = False,
    **options: Any,
) -> MergeSchedule:
    """The schedule of a method for an encoder shape, the paper's settings filled in where it gives any.

    Args:
        method: a name in `METHODS`.
        tokens: N, of a frame, CLS and registers included; prefix of them never merge.
        joint, divided: how frames attend to each other (`MergeSchedule`).
        limit: what the schedule may cost: options that are not given are solved for, so that it is the nearest below.
        options: the method's own, as in `MergeSchedule.tempme` and `MergeSchedule.tome`.

    Raises:
        ValueError: an unknown method or option, one that cannot join the clips of a joint encoder or does not work on
            divided attention, a limit that cannot be reached, a shape that the paper has no setting for, with neither
            options nor limit, or a method that reads the attention of CLS tokens where there are none.
    """
    record, encoder = METHODS[method], Encoder(layers, frames, tokens, prefix, joint, divided)
    if joint and not record.joint:
        raise ValueError(
            f"method {method!r} keeps frames apart or joins frames step by step, but a joint encoder's are one clip"
        )
    if divided and not record.divided:
        able = ", ".join(name for name, other in METHODS.items() if other.divided)
        raise ValueError(
            f"method {method!r} does not work on a tower of divided attention, whose frames stay apart and share their "
            f"CLS token; choose one of {able}"
        )
    if joint and prefix and not (record.joint and record.divided):
        able = ", ".join(name for name, other in METHODS.items() if other.joint and other.divided)
        raise ValueError(
            f"method {method!r} does not work on a joint encoder whose frames share a CLS token; choose one of {able}"
        )
    _check_attention(method, prefix)
    options = record.own_names(options)
    unknown = sorted(set(options) - set(record.option_names))
    if unknown:
        names = ", ".join(record.option_names) or "none"
        raise ValueError(f"method {method!r} does not know the options {', '.join(unknown)}; it has {names}")
    known = {**record.usual(encoder), **options}
    if limit is not None:
        known |= _solve(method, encoder, limit, known, set(options))
    missing = [name for name in record.option_names if name not in known]
    if missing:
        raise ValueError(
            f"the paper has no {method} setting for {layers} layers, {frames} frames of {tokens} tokens: "
            f"give {', '.join(missing)} (as in MergeSchedule.{method})"
        )
    return _made(method, encoder, known)


def _made(method: str, encoder: Encoder, options: dict[str, Any]) -> MergeSchedule:
    record = METHODS[method]
    return replace(record.schedule(encoder, record.options(**options)), divided=encoder.divided)


def has_setting(method: str, encoder: Encoder, options: Collection[str]) -> bool:
    """Whether a method's paper and the given options leave none open for an encoder."""
    record = METHODS[method]
    return {*record.usual(encoder), *record.own_names(dict.fromkeys(options))} >= set(record.option_names)


def _solve(method: str, encoder: Encoder, limit: Limit, known: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """Values of the knobs that are not given, for a limit."""
    record = METHODS[method]

    def make(**values: Any) -> MergeSchedule:
        return _made(method, encoder, {**known, **values})

    candidates: list[dict[str, Any]] = [{}] if has_setting(method, encoder, given) else []  # the paper's own
    for knobs in record.knobs(encoder, limit.kind):
        candidates.append(fit_knobs(make, [knob for knob in knobs if knob.name not in given], limit))
    if not candidates:
        return {}
    reached = [limit.measure(make(**values)) for values in candidates]
    near = [i for i, measure in enumerate(reached) if NEAR * limit.most <= measure <= limit.most]
    below = [(measure, i) for i, measure in enumerate(reached) if measure <= limit.most]
    if below:
        return candidates[near[0] if near else max(below)[1]]
    fixed = f" with {', '.join(sorted(given))} as given" if given else ""
    raise ValueError(
        f"{limit.kind}={limit.most:g} cannot be reached by {method} on {encoder.layers} layers, {encoder.frames} "
        f"frames of {encoder.tokens} tokens{fixed}: the lowest is {min(reached):.4g}"
    )


def merge_layers(schedule: MergeSchedule, width: int) -> list[LayerMerge]:
    """The merging modules of every block of a tower of the given width.

    Raises:
        ValueError: an unknown method, a schedule that is none of it, or one that reads CLS tokens where there are none.
    """
    _check_attention(schedule.method, schedule.prefix)
    method = METHODS[schedule.method]
    return [method.layer_merge(schedule, layer, width) for layer in range(len(schedule.plan))]


def _check_attention(method: str, prefix: int) -> None:
    if "cls_rows" in METHODS[method].reads and not prefix:
        raise ValueError(
            f"method {method!r} reads the attention of CLS tokens, and this tower has none: choose another method, or "
            "a tower that pools by a CLS token"
        )
