"""TESTA's aggregation equals its original implementation, merging and pruning, frames and patches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity.cases import Case, assert_close, find
from torch import Tensor

from tempme_vl.merging.testa import AggregateFrames, AggregatePatches, least, received
from tempme_vl.state import AttentionContext, TokenState

PARTS = [(case, part) for case in find("compressors", "testa*") for part in case.config["cases"]]


def name(value: object) -> str:
    return value["key"] if isinstance(value, dict) else str(value)


def of_kind(prefix: str) -> list[tuple[Case, dict[str, Any]]]:
    return [(case, part) for case, part in PARTS if part["key"].startswith(prefix)]


def state_of(t: dict[str, Tensor], sized: bool = True) -> TokenState:
    """[B, T, 1 + L, D] as frames that are clips of their own."""
    x, size = t["x"], t["size"] if sized else torch.ones_like(t["size"])
    return TokenState(x.flatten(0, 1), size.flatten(0, 1), x.shape[1], 1, merged=True, proportional=False)


def clamped(part: dict[str, Any], tokens: int) -> int:
    """With a class token in the model, of frames too, one less takes part."""
    return min(part["r"], (tokens - int(part.get("class_token", False))) // 2)


@pytest.mark.parametrize(("case", "part"), of_kind("spatial"), ids=name)
def test_patches_of_each_frame(case: Case, part: dict[str, Any]) -> None:
    t, state = case.tensors, state_of(case.tensors)
    step = AggregatePatches(clamped(part, t["x"].shape[2]), "geometry")
    after = step(state, AttentionContext(t["key_spatial"].flatten(0, 1).unsqueeze(1)))
    assert_close(after.x, t[f"{part['key']}.x"].flatten(0, 1), "tokens", case.config["tol"])
    assert_close(after.size, t[f"{part['key']}.size"].flatten(0, 1), "sizes", case.config["tol"])


@pytest.mark.parametrize(("case", "part"), of_kind("temporal"), ids=name)
def test_frames(case: Case, part: dict[str, Any]) -> None:
    t, sized = case.tensors, part.get("size", "given") is not None
    keys = t["key_temporal"].transpose(1, 2)  # [B, T, L, D]; nothing of the CLS token
    keys = torch.cat([torch.zeros_like(keys[:, :, :1]), keys], 2).flatten(0, 1)
    step = AggregateFrames(clamped(part, t["x"].shape[1]), "geometry", in_time=False)
    after = step(state_of(t, sized), AttentionContext(keys.unsqueeze(1)))
    for what, found in (("x", after.x), ("size", after.size)):
        patches = found[:, 1:].unflatten(0, (-1, after.num_clips)).transpose(1, 2)
        assert_close(patches, t[f"{part['key']}.{what}"], what, case.config["tol"])


def attention(given: Tensor) -> AttentionContext:
    """(R, N, N) rows of attention, as what a block's queries and keys make of it."""
    keys = torch.eye(given.shape[-1], dtype=given.dtype).expand(len(given), 1, -1, -1)
    return AttentionContext(keys, given.log().unsqueeze(1), scale=1.0)


@pytest.mark.parametrize(("case", "part"), of_kind("prune_spatial"), ids=name)
def test_pruned_patches(case: Case, part: dict[str, Any]) -> None:
    t = case.tensors
    after = AggregatePatches(part["r"], "prune")(state_of(t), attention(t["attn_spatial"]))
    assert_close(after.x, t[f"{part['key']}.x"].flatten(0, 1), "tokens", case.config["tol"])


@pytest.mark.parametrize(("case", "part"), of_kind("prune_temporal"), ids=name)
def test_pruned_frames(case: Case, part: dict[str, Any]) -> None:
    t, state = case.tensors, state_of(case.tensors)
    rows = t["attn_temporal"]
    kept, _ = least(received(attention(rows.flatten(0, 1)), rows.shape[1]), part["r"])
    after = state.keep_clips(kept)
    patches = after.x[:, 1:].unflatten(0, (-1, after.num_clips)).transpose(1, 2)
    assert_close(patches, t[f"{part['key']}.x"], "tokens", case.config["tol"])
