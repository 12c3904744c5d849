"""FrameFusion (arXiv 2501.01986, "FrameFusion: Combining Similarity and Importance for Video Token Reduction on Large
Vision Language Models"): in the first layers of the language model video tokens go into the one of the frame before at
their place while enough of them are alike; then, once, the least attended ones are dropped, so many that the whole
prefill has the cost that was asked for.

All video tokens go into the language model. A step is due in front of its first layer and behind the attention of each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tempme_vl.compressors.base import Compressor, FrameFeatures, KeptFeatures, kept
from tempme_vl.compressors.clusters import means
from tempme_vl.compressors.inner import Inner, Left, Point, Queries, stay
from tempme_vl.merging.method import checked
from tempme_vl.precision import at_least_float32
from tempme_vl.schema import Cosine, Layers, Share

_FIRST = -2  # below any cosine
_LAYERS = 28  # that the published code takes for all models


@dataclass(frozen=True)
class Options:
    """cost: of the prefill, as a share of that with all tokens; all layers count by their tokens.
    similarity: tokens merge where their cosine is not below it.
    ratio: share of the tokens that must merge in a layer, or merging ends.
    layers: of the language model; None for those of the host that it works in (the published code takes 28 for all).
    """

    cost: Share = 0.3
    similarity: Cosine = 0.6
    ratio: Share = 0.1
    layers: Layers | None = None


@dataclass(frozen=True)
class State(Left):
    """What is left of a sequence, and what has been done.

    Attributes:
        merged: the share of the video tokens that merged in each step so far.
        phase: what the next step does.
    """

    merged: tuple[float, ...] = ()
    phase: Literal["merge", "prune", "done"] = "merge"


def start(length: int, video: range, tokens: int, device: torch.device | None = None) -> State:
    """Of a sequence in which nothing has merged.

    Args:
        length: of the sequence.
        video: positions of its video tokens, frame by frame.
        tokens: S, of a frame.

    Raises:
        ValueError: video tokens out of the sequence, or not whole frames.
    """
    if not 0 <= video.start <= video.stop <= length or len(video) % tokens:
        raise ValueError(f"expected whole frames of {tokens} tokens within 0..{length}; got {video}")
    position = torch.arange(length, device=device)
    within = (position >= video.start) & (position < video.stop)
    return State(position, torch.where(within, (position - video.start) % tokens, -1))


def share_to_drop(merged: tuple[float, ...], options: Options) -> float:
    """The share of the tokens that are there which has to go now so that all layers together have the cost.

    Raises:
        ValueError: a cost that the layers so far exceed already.
    """
    layers, part, spent = options.layers or _LAYERS, 1.0, 0.0
    for share in merged:
        part *= 1 - share
        spent += part
    rest = layers * options.cost - spent
    if rest < 0:
        raise ValueError(
            f"expected a cost of at least {spent / layers:.3g}, which the first {len(merged)} of {layers} layers have; "
            f"got cost={options.cost}: choose a larger one, or a larger ratio"
        )
    return max(0.0, 1 - rest / ((layers - len(merged)) * part))


def neighbours(hidden: Tensor, state: State) -> tuple[Tensor, Tensor]:
    """Video tokens by place, then by time.

    Returns:
        (V,) int64, where each stands; (V,), its cosine with the one before at its place, -2 for the first.
    """
    video = state.video
    video = video[state.place[video].argsort(stable=True)]
    unit, place = normalize(hidden[video], dim=-1), state.place[video]
    similarity = hidden.new_full((len(video),), _FIRST)
    similarity[1:] = torch.where(place[1:] == place[:-1], (unit[1:] * unit[:-1]).sum(-1), _FIRST)
    return video, similarity


def merge(state: State, hidden: Tensor, options: Options) -> tuple[State, Tensor]:
    """The tokens that are alike merge; the most similar ones, if the cost needs no more of them."""
    video, similarity = neighbours(hidden, state)
    limit = share_to_drop(state.merged, options)
    goes = similarity >= options.similarity
    share = int(goes.sum()) / len(video)
    if share < limit:
        state = replace(state, merged=(*state.merged, share), phase="prune" if share < options.ratio else "merge")
    else:
        state = replace(state, phase="done")
        goes = torch.zeros_like(goes).index_fill(0, similarity.topk(int(limit * len(video))).indices, True)
    stays = video[~goes]
    run = (~goes).cumsum(0) - 1
    hidden = hidden.index_copy(0, stays, means(hidden[video], run, len(stays)))
    return left(state, hidden, video[goes])


def prune(state: State, hidden: Tensor, attention: Tensor, options: Options) -> tuple[State, Tensor]:
    """The video tokens that receive least attention, from all heads and all queries, go."""
    video = state.video
    count = round(len(video) * (1 - share_to_drop(state.merged, options)))
    received = attention.mean((0, 1))[video]
    gone = torch.ones_like(video, dtype=torch.bool).index_fill(0, received.topk(count).indices, False)
    return left(replace(state, phase="done"), hidden, video[gone])


def left(state: State, hidden: Tensor, gone: Tensor) -> tuple[State, Tensor]:
    """Without the tokens that went, in the same order."""
    stays = torch.ones_like(state.place, dtype=torch.bool).index_fill(0, gone, False)
    return stay(state, stays), hidden[stays]


def step(state: State, hidden: Tensor, attention: Tensor | None, options: Options) -> tuple[State, Tensor]:
    """What the layers that follow get.

    Args:
        hidden: (N, D), states of one sequence, as `state` says.
        attention: (heads, N, N), softmax of the attention that has just run, or its mean over heads and queries,
            (1, 1, N); read by the step that drops tokens.

    Returns:
        The state, and (M, D).

    Raises:
        ValueError: options out of bounds, states of another length, no attention where it is read, or see
            `share_to_drop`.
    """
    options = checked("framefusion", options)
    if len(hidden) != len(state.position):
        raise ValueError(f"expected states of the {len(state.position)} tokens that are left; got {len(hidden)}")
    if state.phase == "done" or len(state.merged) >= (options.layers or _LAYERS) or not len(state.video):
        return state, hidden
    if state.phase == "merge":
        state, merged = merge(state, at_least_float32(hidden), options)
        return state, merged.to(hidden.dtype)
    if attention is None:
        raise ValueError("this step drops the least attended tokens: give it the attention that has just run")
    return prune(state, hidden, at_least_float32(attention), options)


def inner(options: Options, layers: int) -> Inner:
    """The steps with their options, for `tempme_vl.integrations`.

    Args:
        layers: of the language model.
    """
    options = replace(options, layers=options.layers or layers)
    return Inner(start=_begin, due=_due, step=partial(step, options=options), behind_attention=True)


def _begin(place: Tensor) -> State:
    return State(torch.arange(len(place), device=place.device), place)


def _due(state: State, point: Point) -> Queries | None:
    if state.phase == "done" or not (point.behind_attention or point.layer == 0):
        return None
    return "all" if state.phase == "prune" else "none"


def compress(features: FrameFeatures, options: Options) -> KeptFeatures:
    """All of them: the language model's layers make them fewer.

    Raises:
        ValueError: options out of bounds.
    """
    checked("framefusion", options)
    return kept(features, torch.arange(features.x.shape[:2].numel(), device=features.x.device))


def keep_inside(share: float) -> dict[str, Any]:
    """The mean over the layers is the cost."""
    return {"cost": share}


COMPRESSOR = Compressor(Options, compress, inner=inner, keep_inside=keep_inside)
