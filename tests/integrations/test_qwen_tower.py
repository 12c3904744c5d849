"""Merging inside the Qwen towers: with nothing merged they are the host's own, bit for bit, and a still video loses
nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from towers import qwen_tower
from transformers import AttentionInterface, Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig, Qwen3VLMoeConfig

from tempme_vl.compressors.base import KeptFeatures
from tempme_vl.integrations.qwen_parts import check_tower
from tempme_vl.integrations.qwen_tower import TubeOptions, run_tower
from tempme_vl.merging.tube_plan import TubePlan, TubeStep, tube_plan

PATCH, DEPTH = 4, 5
_SIZES: dict[str, Any] = {"depth": DEPTH, "num_heads": 2, "patch_size": PATCH}
_WIDE: dict[str, Any] = {**_SIZES, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 24}
_DEEP: dict[str, Any] = {**_WIDE, "deepstack_visual_indexes": [0, 2], "num_position_embeddings": 64}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Qwen2-VL": (
        Qwen2VLConfig,
        {**_SIZES, "embed_dim": 32, "hidden_size": 24, "mlp_ratio": 2},
    ),
    "Qwen2.5-VL": (
        Qwen2_5_VLConfig,
        {**_WIDE, "window_size": 32, "fullatt_block_indexes": [2, 4]},  # windows of 4x4 blocks
    ),
    "Qwen3-VL": (Qwen3VLConfig, _DEEP),
    "Qwen3-VL-MoE": (Qwen3VLMoeConfig, _DEEP),
}
NEWEST = []
if hasattr(transformers, "Qwen3_5Config"):
    _PLACED = {**_WIDE, "num_position_embeddings": 64}
    KINDS["Qwen3.5"] = (transformers.Qwen3_5Config, _PLACED)
    KINDS["Qwen3.5-MoE"] = (transformers.Qwen3_5MoeConfig, _PLACED)
    NEWEST = ["Qwen3.5", "Qwen3.5-MoE"]
VIDEO = (8, 16, 12)  # 8 slots of 48 blocks
GRIDS = [[(6, 16, 12)], [(4, 8, 8)], [(5, 10, 14)], [(6, 16, 12), (1, 8, 8), (5, 10, 14)]]


def tower(kind: str, attention: str = "sdpa", **changed: Any) -> Any:
    config_class, sizes = KINDS[kind]
    model = qwen_tower(config_class, attention, **{**sizes, **changed})
    torch.manual_seed(0)
    for weight in model.parameters():  # as drawn, blocks hardly change anything
        torch.nn.init.normal_(weight, std=0.25) if weight.ndim > 1 else weight.data.add_(0.1 * torch.randn_like(weight))
    return model


NEW = "position_ids" in inspect.signature(type(tower("Qwen3-VL").rotary_pos_emb).forward).parameters
needs_new = pytest.mark.skipif(not NEW, reason="refused: see test_an_older_transformers_is_refused")


def pixels(*grids: tuple[int, int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(sum(t * h * w for t, h, w in grids), 3 * 2 * PATCH**2, generator=generator)


def still(grid: tuple[int, int, int]) -> Tensor:
    return pixels((1, *grid[1:])).repeat(grid[0], 1)


def plan_of(grid: tuple[int, int, int], share: float = 0.4) -> TubePlan:
    return tube_plan(DEPTH, grid[0], grid[1] * grid[2] // 4, share=share)


def host(model: Any, values: Tensor, grids: list[tuple[int, int, int]]) -> list[Tensor]:
    """What the language model gets, and what its deeper layers get."""
    output = model(values, grid_thw=torch.tensor(grids))
    return [output.pooler_output, *getattr(output, "deepstack_features", [])]


def levels(videos: list[KeptFeatures]) -> list[Tensor]:
    return [torch.cat(each) for each in zip(*((video.x, *video.deeper) for video in videos), strict=True)]


@needs_new
@pytest.mark.parametrize(
    ("kind", "attention", "dtype"),
    [
        *product(("Qwen2.5-VL", "Qwen3-VL"), ("sdpa", "eager"), (torch.float32, torch.bfloat16)),
        *product(("Qwen2-VL", "Qwen3-VL-MoE", *NEWEST), ("sdpa",), (torch.float32,)),
    ],
)
@torch.no_grad()
def test_with_nothing_merged_it_is_the_host_itself(kind: str, attention: str, dtype: torch.dtype) -> None:
    """Of no steps, and of steps that join slots and merge no pair."""
    model = tower(kind, attention).to(dtype)
    for grids in GRIDS:
        values = pixels(*grids).to(dtype)
        expected = host(model, values, grids)
        assert len(expected) == (3 if "Qwen3-VL" in kind else 1)
        for plan in (TubePlan(), TubePlan((TubeStep(1, 2, 0), TubeStep(3, 4, 0), TubeStep(DEPTH, 4, 0)))):
            videos = run_tower(model, values, grids, [plan] * len(grids))
            found = levels(videos)
            assert [len(video.x) for video in videos] == [t * h * w // 4 for t, h, w in grids]
            assert [video.source.tolist() for video in videos] == [list(range(len(video.x))) for video in videos]
            for one, other in zip(found, expected, strict=True):
                assert torch.equal(one, other)


@needs_new
@pytest.mark.parametrize("kind", ["Qwen2.5-VL", "Qwen3-VL"])
@pytest.mark.parametrize("options", [TubeOptions(), TubeOptions("clip"), TubeOptions(compare="states")])
@torch.no_grad()
def test_a_still_video_loses_nothing(kind: str, options: TubeOptions) -> None:
    """At three budgets, and with a step behind the last block."""
    model, values = tower(kind), still(VIDEO)
    expected = host(model, values, [VIDEO])
    behind = TubePlan((TubeStep(2, 2, 30), TubeStep(DEPTH, 8, 60)))
    for plan in (*(plan_of(VIDEO, share) for share in (0.7, 0.44, 0.2)), behind):
        (video,) = run_tower(model, values, [VIDEO], [plan], options)
        assert len(video.x) == plan.counts(8, 48)[-1] < 8 * 48
        for one, other in zip((video.x, *video.deeper), expected, strict=True):
            assert other.abs().mean() > 0.5
            torch.testing.assert_close(one, other[video.source], rtol=0, atol=3e-5)


@needs_new
@pytest.mark.parametrize("kind", ["Qwen2.5-VL", "Qwen3-VL"])
@torch.no_grad()
def test_a_still_video_shows_wrong_weights(kind: str) -> None:
    """What each way weighs runs by is no matter of taste: without the lengths of runs clips lose a still video."""
    model, values = tower(kind), still(VIDEO)
    model.config._attn_implementation = "unweighted"
    plain = AttentionInterface()["sdpa"]
    AttentionInterface.register(
        "unweighted", lambda *args, attention_mask=None, **more: plain(*args, attention_mask=None, **more)
    )
    expected, *_ = host(model, values, [VIDEO])
    (video,) = run_tower(model, values, [VIDEO], [plan_of(VIDEO)], TubeOptions("clip"))
    assert (video.x - expected[video.source]).abs().max() > 0.1


@needs_new
@pytest.mark.parametrize("windows", [True, False])
@torch.no_grad()
def test_a_merged_block_is_that_of_mean_pixels(windows: bool) -> None:
    """A tower of one block whose embedding is linear: merging in front of it is the host's own way with a changing
    video whose pixels are, in all slots of a run, their mean."""
    model = tower("Qwen2.5-VL", depth=1, fullatt_block_indexes=[] if windows else [0])
    plan = TubePlan((TubeStep(0, 2, 30), TubeStep(0, 4, 40), TubeStep(0, 8, 20)))
    values = pixels(VIDEO)
    (video,) = run_tower(model, values, [VIDEO], [plan], TubeOptions(compare="states"))
    assert len(video.x) == 8 * 48 - 4 * 30 - 2 * 40 - 20
    begins = torch.zeros(8, 48, dtype=torch.int64)
    begins.view(-1)[video.source] = 1
    run = (begins.cumsum(0) - 1) * 48 + torch.arange(48)  # the number of the run that each block is in
    blocks = values.view(8 * 48, -1)
    lengths = torch.zeros(8 * 48).index_add(0, run.flatten(), torch.ones(8 * 48))
    means = torch.zeros_like(blocks).index_add(0, run.flatten(), blocks) / lengths.clamp(min=1)[:, None]
    expected, *_ = host(model, means[run.flatten()].view_as(values), [VIDEO])
    assert (expected[video.source] - host(model, values, [VIDEO])[0][video.source]).abs().max() > 0.1
    torch.testing.assert_close(video.x, expected[video.source], rtol=0, atol=3e-5)


@needs_new
@pytest.mark.parametrize("kind", ["Qwen2.5-VL", "Qwen3-VL"])
@pytest.mark.parametrize("attend", ["slot", "clip"])
@torch.no_grad()
def test_videos_of_several_grids_are_as_alone(kind: str, attend: Any) -> None:
    model, grids = tower(kind), [(7, 8, 12), (1, 8, 8), (4, 10, 14), (2, 4, 4)]
    parts = [pixels(grid) + number for number, grid in enumerate(grids)]
    plans = [tube_plan(DEPTH, t, h * w // 4) for t, h, w in grids]
    together = run_tower(model, torch.cat(parts), grids, plans, TubeOptions(attend))
    for video, values, grid, plan in zip(together, parts, grids, plans, strict=True):
        (alone,) = run_tower(model, values, [grid], [plan], TubeOptions(attend))
        assert len(video.x) == plan.counts(grid[0], grid[1] * grid[2] // 4)[-1]
        assert torch.equal(video.source, alone.source) and video.clips == alone.clips
        for one, other in zip((video.x, *video.deeper), (alone.x, *alone.deeper), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=3e-5)


@needs_new
@pytest.mark.parametrize("kind", ["Qwen2.5-VL", "Qwen3-VL"])
@torch.no_grad()
def test_sources_ascend_and_clips_tell_their_slots(kind: str) -> None:
    plan = TubePlan((TubeStep(1, 2, 20), TubeStep(3, 4, 30)))
    (video,) = run_tower(tower(kind), pixels((7, 16, 12)), [(7, 16, 12)], [plan])
    assert (video.source.diff() > 0).all()
    assert [(clip.first, clip.last) for clip in video.clips] == [(0, 3), (4, 6)]
    slots = video.source // 48
    assert [clip.tokens for clip in video.clips] == [(slots < 4).sum(), (slots >= 4).sum()]
    # all places begin in the first slot of a clip, at the latest
    assert set(range(48)) | set(range(4 * 48, 5 * 48)) <= set(video.source.tolist())


@needs_new
@torch.no_grad()
def test_videos_have_steps_of_their_own() -> None:
    """Before other blocks, and of other clips."""
    model, grids = tower("Qwen3-VL"), [(4, 8, 8), (4, 8, 8), (6, 4, 4)]
    steps = [[(1, 2, 9), (4, 4, 7)], [(2, 4, 10)], [(1, 3, 4), (2, 3, 1)]]
    plans = [TubePlan(tuple(TubeStep(*step) for step in each)) for each in steps]
    parts = [pixels(grid) + number for number, grid in enumerate(grids)]
    together = run_tower(model, torch.cat(parts), grids, plans)
    assert [len(video.x) for video in together] == [64 - 18 - 7, 64 - 10, 24 - 8 - 2]
    for video, values, grid, plan in zip(together, parts, grids, plans, strict=True):
        (alone,) = run_tower(model, values, [grid], [plan])
        assert torch.equal(video.source, alone.source)
        torch.testing.assert_close(video.x, alone.x, rtol=0, atol=3e-5)


@needs_new
@pytest.mark.parametrize("compare", ["keys", "states"])
@torch.no_grad()
def test_runs_are_compared_by_keys_or_states(compare: Any) -> None:
    """By what the host's own blocks have there. Turning keys by the angle of their place changes no cosine of two."""
    model, values = tower("Qwen3-VL"), pixels((2, 8, 8))
    seen: list[Tensor] = []
    place = model.blocks[1].attn.qkv if compare == "keys" else model.blocks[1]
    with place.register_forward_hook(lambda *given: seen.append(given[2])):
        host(model, values, [(2, 8, 8)])
    (found,) = seen
    found = found.unflatten(1, (3, 2, 16))[:, 1].mean(1) if compare == "keys" else found
    first, second = found.reshape(2, 16, -1)
    alike = torch.cosine_similarity(first, second, dim=-1).topk(6).indices
    (video,) = run_tower(model, values, [(2, 8, 8)], [TubePlan((TubeStep(2, 2, 6),))], TubeOptions(compare=compare))
    assert video.source.tolist() == [n for n in range(32) if n - 16 not in alike.tolist()]


@needs_new
@torch.no_grad()
def test_what_is_more_alike_merges() -> None:
    """One quarter of the places moves: it stays, by keys and by states."""
    grid, model = (4, 8, 8), tower("Qwen3-VL")
    moving = torch.arange(16) % 4 == 1
    change = torch.where(moving[None, :, None, None], 1.0, 0.02) * pixels(grid).view(4, 16, 4, -1)
    values = (still(grid).view(4, 16, 4, -1) + change).flatten(0, 2)
    plan = TubePlan((TubeStep(1, 2, 12), TubeStep(2, 4, 12)))
    for options in (TubeOptions(compare="keys"), TubeOptions(compare="states")):
        (video,) = run_tower(model, values, [grid], [plan], options)
        later = video.source[video.source >= 16]
        assert len(later) == 12 and moving[later % 16].all()


@needs_new
@pytest.mark.parametrize("kind", ["Qwen2.5-VL", "Qwen3-VL"])
def test_gradients_are_those_of_the_host(kind: str) -> None:
    """Of all weights; and where blocks are recomputed the same as without."""
    model, values = tower(kind), pixels((4, 8, 8))

    def gradients(make: Callable[[], list[Tensor]]) -> list[Tensor]:
        model.zero_grad()
        torch.stack([x.sin().sum() for x in make()]).sum().backward()
        assert all(weight.grad is not None for weight in model.parameters())
        return [weight.grad.clone() for weight in model.parameters()]

    def ours(plan: TubePlan, **options: Any) -> Callable[[], list[Tensor]]:
        return lambda: levels(run_tower(model, values, [(4, 8, 8)], [plan], TubeOptions(**options)))

    for one, other in zip(
        gradients(ours(TubePlan())), gradients(lambda: host(model, values, [(4, 8, 8)])), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    merged = gradients(ours(plan_of((4, 8, 8))))
    assert all(grad.abs().max() > 0 for grad in merged)
    calls: list[None] = []
    model.blocks[2].norm1.register_forward_hook(lambda *_: calls.append(None))
    for one, other in zip(merged, gradients(ours(plan_of((4, 8, 8)), recompute=True)), strict=True):
        assert torch.equal(one, other)
    assert len(calls) == 2


def flash(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **given: Any
) -> tuple[Tensor, None]:
    """Packed segments, as flash attention takes them."""
    assert attention_mask is None and query.shape[0] == 1
    ends = given["cu_seq_lens_q"], given["cu_seq_lens_k"]
    assert all(end.dtype == torch.int32 for end in ends)
    lengths = [end.diff().tolist() for end in ends]
    assert max(lengths[0]) <= given["max_length_q"] and max(lengths[1]) == given["max_length_k"]
    parts = zip(*(t.split(n, 2) for t, n in ((query, lengths[0]), (key, lengths[1]), (value, lengths[1]))), strict=True)
    out = [F.scaled_dot_product_attention(q, k, v, scale=given["scaling"]) for q, k, v in parts]
    return torch.cat(out, 2).transpose(1, 2).contiguous(), None


@needs_new
@pytest.mark.parametrize("kind", ["Qwen2.5-VL", "Qwen3-VL"])
@torch.no_grad()
def test_packed_segments(kind: str) -> None:
    AttentionInterface.register("flash_by_hand", flash)
    model, plain, values = tower(kind, "sdpa"), tower(kind), pixels(VIDEO)
    model.config._attn_implementation = "flash_by_hand"
    (video,) = run_tower(model, values, [VIDEO], [TubePlan()])
    for one, other in zip((video.x, *video.deeper), host(model, values, [VIDEO]), strict=True):
        assert torch.equal(one, other)
    (video,), (other,) = (run_tower(each, values, [VIDEO], [plan_of(VIDEO)]) for each in (model, plain))
    assert torch.equal(video.source, other.source)
    torch.testing.assert_close(video.x, other.x, rtol=0, atol=3e-5)
    with pytest.raises(ValueError, match=r'attend="clip" adds to single keys.*attn_implementation="sdpa"'):
        run_tower(model, values, [VIDEO], [plan_of(VIDEO)], TubeOptions("clip"))


@needs_new
@torch.no_grad()
def test_adapters_on_modules_act() -> None:
    """Children are called as they are at the time."""

    class Adapted(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + 0.1 * self.inner(x).roll(1, -1)

    model, values = tower("Qwen3-VL"), pixels((4, 8, 8))
    before = host(model, values, [(4, 8, 8)])[0]
    for block in model.blocks:
        block.attn.qkv, block.mlp.linear_fc1 = Adapted(block.attn.qkv), Adapted(block.mlp.linear_fc1)
    (video,) = run_tower(model, values, [(4, 8, 8)], [TubePlan()])
    assert torch.equal(video.x, host(model, values, [(4, 8, 8)])[0]) and not torch.equal(video.x, before)


def test_other_towers_are_refused() -> None:
    own = type(tower("Qwen3-VL"))

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own.forward(self, *args, **kwargs)

    other = type("Other", (own,), {"forward": forward})
    with pytest.raises(
        ValueError, match=r"forward of Qwen2VisionTransformer.*got Other with that of .*forward|got Other"
    ):
        check_tower(other(tower("Qwen3-VL").config))
    for place, message in (
        ("", "expected Qwen3VLVisionModel with blocks, .*; got adapter, blocks"),
        ("blocks.1", "expected Qwen3VLVisionBlock with attn, mlp, norm1, norm2; got adapter, attn"),
        ("blocks.1.attn", "expected Qwen3VLVisionAttention with proj, qkv; got adapter, proj, qkv"),
    ):
        model = tower("Qwen3-VL")
        model.get_submodule(place).add_module("adapter", nn.Linear(2, 2))
        with pytest.raises(ValueError, match=message):
            check_tower(model)


def test_an_older_transformers_is_refused() -> None:
    class Rotary(nn.Module):
        def forward(self, seqlen: int) -> None: ...

    model = tower("Qwen2.5-VL")
    model.rotary_pos_emb = Rotary()
    with pytest.raises(ValueError, match="takes no position_ids in this transformers; update"):
        check_tower(model)


@needs_new
@pytest.mark.parametrize(
    ("grid", "steps", "options", "message"),
    [
        ((4, 8, 8), [(0, 2, 1)], {}, r"before the blocks 1 to 5 of a tower with 5 blocks.* by keys; got \[0\]"),
        ((4, 8, 8), [(6, 2, 1)], {"compare": "states"}, r"before the blocks 0 to 5 .* by states; got \[6\]"),
        ((4, 8, 8), [(1, 2, 17)], {}, "before block 1 wants to merge 17 pairs"),
        ((4, 4, 8), [], {}, "pixels of their 128 patches; got 1 plans and 256 patches"),
        ((4, 64, 1), [], {}, r"where 2 divides h and w; got \(4, 64, 1\)"),
    ],
)
def test_videos_and_plans_that_are_refused(
    grid: tuple[int, int, int], steps: list[tuple[int, int, int]], options: dict[str, Any], message: str
) -> None:
    plan = TubePlan(tuple(TubeStep(*step) for step in steps))
    with pytest.raises(ValueError, match=message):
        run_tower(tower("Qwen2.5-VL"), pixels((4, 8, 8)), [grid], [plan], TubeOptions(**options))


def test_other_words_are_refused() -> None:
    with pytest.raises(ValueError, match="attend: expected 'slot' or 'clip'; got 'video'"):
        TubeOptions("video")
    with pytest.raises(ValueError, match="compare: expected 'keys' or 'states'; got 'queries'"):
        TubeOptions(compare="queries")
