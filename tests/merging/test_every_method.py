"""What every method must keep, on every kind of tower: nothing here knows a method but by its record.

A new method is tested by its line in `METHODS`: its options come from the record or from a budget.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import timm
import torch
import transformers
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from towers import TINY, random_video, small_clip

from tempme_vl import FrontendOutput, VisualFrontend, create_frontend
from tempme_vl.backbones import hf, open_clip
from tempme_vl.backbones import timm as timm_family
from tempme_vl.frontend import merge_in
from tempme_vl.integrations.post_encoder import FrameFeatures, make_plan, merge
from tempme_vl.merging import METHODS, Encoder
from tempme_vl.state import TokenState

FRAMES = 4
CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
CLIP |= {"image_size": 32, "patch_size": 8, "projection_dim": 16}


def of_timm(method: str) -> VisualFrontend:
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 8}
    return merge_in(*timm_family.backbone_of(timm.create_model("vit_tiny_patch16_224", **shape)), method, FRAMES, 0.0)


def of_transformers(method: str) -> VisualFrontend:
    config = transformers.CLIPVisionConfig(**CLIP)
    tower = transformers.CLIPVisionModelWithProjection._from_config(config, attn_implementation="sdpa")
    return merge_in(*hf.backbone_of(tower), method, FRAMES, 0.0)


TOWERS = {
    "open_clip": lambda method: create_frontend(TINY, method=method, num_frames=FRAMES),
    "umt": lambda method: create_frontend("umt:tiny", method=method, num_frames=FRAMES),
    "umt joint": lambda method: create_frontend("umt:tiny", method=method, num_frames=FRAMES, mode="joint"),
    "timm": of_timm,
    "hf": of_transformers,
}
REASONS = r"reads the attention of CLS tokens, and this tower has none|but a joint encoder's are one clip"
each_method = pytest.mark.parametrize("method", METHODS)


def front(tower: str, method: str) -> VisualFrontend:
    """A front end whose weights all matter; skips what is refused for a reason that the record gives."""
    record = METHODS[method]
    torch.manual_seed(0)
    joint, prefix = tower == "umt joint", not tower.startswith("umt")
    if (joint and not record.joint) or ("cls_rows" in record.reads and not prefix):
        with pytest.raises(ValueError, match=REASONS):
            TOWERS[tower](method)
        pytest.skip("refused, as its record says")
    frontend = TOWERS[tower](method)
    with torch.no_grad():
        for parameter in frontend.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return frontend


def video_of(frontend: VisualFrontend, dtype: torch.dtype = torch.float32) -> Tensor:
    return random_video(FRAMES, frontend.shape.image_size, dtype=dtype)


def assert_accounted_for(frontend: VisualFrontend, output: FrontendOutput) -> None:
    """Every input token is in one output token or named as dropped, and sizes say how many."""
    schedule = frontend.schedule
    inputs = FRAMES * frontend.shape.tokens
    assert output.tokens.shape[:2] == output.size.shape[:2] == (2, schedule.output_tokens)
    assert output.source.shape == (2, inputs) and output.source.max() < schedule.output_tokens
    inserted = schedule.layer_counts[-1].inserted * schedule.layer_counts[-1].clips
    for source, size in zip(output.source, output.size.flatten(1), strict=True):
        held = source[source >= 0].bincount(minlength=schedule.output_tokens)
        assert (held == size).sum() >= len(size) - inserted and held.sum() + inserted == size.sum()
    if not any(plan.fewer_before + plan.fewer_after + plan.fewer_last for plan in schedule.plan):
        assert (output.source >= 0).all(), "a method that only merges drops nothing"


@each_method
@pytest.mark.parametrize("tower", TOWERS)
def test_counts_and_sizes(tower: str, method: str) -> None:
    frontend, seen = front(tower, method).eval(), []
    for block in frontend.blocks:
        block.register_forward_hook(lambda _, __, state: seen.append((state.num_clips, state.x.shape[1])))
    video = video_of(frontend)
    with torch.no_grad():
        output = frontend(video, trace_source=True)
        assert seen == frontend.schedule.token_counts
        assert_accounted_for(frontend, output)
        plain = frontend(video)
        assert plain.source is None and torch.equal(plain.tokens, output.tokens)
        double = frontend.double()
        both, second = double(video.double()), double(video[1:].double())
        torch.testing.assert_close(both.tokens[1:], second.tokens, rtol=0, atol=1e-10)
        torch.testing.assert_close(both.pooled[1:], second.pooled, rtol=0, atol=1e-10)


@each_method
def test_checkpointing_is_exact_and_every_weight_learns(method: str) -> None:
    plain = front("open_clip", method)
    checkpointed = deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    outputs = [frontend(video_of(frontend), trace_source=True) for frontend in (plain, checkpointed)]
    assert torch.equal(outputs[0].tokens, outputs[1].tokens)
    for output in outputs:
        (output.pooled.square().sum() + output.tokens.square().mean()).backward()
    for (name, one), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert one.grad is not None and torch.equal(one.grad, other.grad), name


@each_method
def test_bfloat16(method: str) -> None:
    frontend = front("open_clip", method)
    with torch.autocast("cpu", torch.bfloat16):
        output = frontend(video_of(frontend), trace_source=True)
    assert_accounted_for(frontend, output)
    assert output.size.dtype == torch.float32 and output.pooled.isfinite().all()
    (output.pooled.square().sum() + output.tokens.float().mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in frontend.parameters())
    halved = frontend.bfloat16()(video_of(frontend), trace_source=True)
    assert_accounted_for(frontend, halved)
    assert halved.tokens.dtype == torch.bfloat16 and halved.size.dtype == torch.float32


@each_method
def test_saved_and_loaded(method: str, tmp_path: Path) -> None:
    frontend = front("open_clip", method).eval()
    frontend.save_pretrained(tmp_path)
    again = VisualFrontend.from_pretrained(tmp_path).eval()
    assert again.schedule == frontend.schedule
    assert torch.equal(again(video_of(frontend)).tokens, frontend(video_of(frontend)).tokens)


@pytest.mark.slow
@each_method
def test_compiles_into_one_graph(method: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    limit = {"budget": 0.85} if METHODS[method].knobs(Encoder(2, FRAMES, 17), "budget") else {}
    frontend = merge_in(open_clip.visual_backbone(small_clip(layers=2).visual), {}, method, FRAMES, 0.1, **limit)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(frontend, backend=counter, fullgraph=True)
    for shift in (0, 1):
        video = video_of(frontend) + shift
        actual, expected = compiled(video, trace_source=True), frontend(video, trace_source=True)
        torch.testing.assert_close(actual.tokens, expected.tokens, rtol=0, atol=1e-6)
        assert torch.equal(actual.source, expected.source)
    assert counter.frame_count == 1


@each_method
def test_behind_a_tower(method: str) -> None:
    """On features of frames, where tokens keep their places in the order of time; or a refusal that says why."""
    try:
        behind = METHODS[method].behind_tower()
    except ValueError as error:
        reads = {*METHODS[method].reads} & {"cls_rows", "column_sums"}
        assert "reads attention" in str(error) if reads else str(error) == METHODS[method].behind
        return
    x = torch.randn(FRAMES, 30, 8, generator=torch.Generator().manual_seed(0))
    schedule = make_plan(method, FRAMES, (5, 6), behind.options())
    clips = merge(FrameFeatures(x, (5, 6), (x,)), schedule)
    assert clips.x.shape[0] * clips.x.shape[1] == schedule.output_tokens
    assert (clips.source.diff(dim=1) > 0).all() and clips.source.max() < FRAMES * 30
    torch.testing.assert_close(clips.deeper[0], clips.x)  # the mean of what each token holds


def test_a_weight_follows_its_token() -> None:
    """What a token counts for in attention goes where the token goes, whatever a state does."""
    x = torch.arange(24.0).view(2, 12, 1)
    state = TokenState.start(x, 2, 1)
    state = state.regroup(x, state.size, list, list, weight=x + 100)
    for changed in (
        state.keep(torch.tensor([[5, 3, 9]] * 2)),
        state.insert(torch.full((2, 2, 1), -99.0)),
        state.join_clips(2),
        state.insert(torch.full((2, 2, 1), -99.0)).join_clips(2),
    ):
        inserted = changed.x == -99
        assert torch.equal(changed.weight.where(~inserted, 0), (changed.x + 100).where(~inserted, 0))
        assert (changed.weight[inserted] == 1).all()
        assert torch.equal(changed.attention_bias.flatten(), changed.weight.log().flatten())
    fused = state.keep(torch.tensor([[5, 3, 9]] * 2), fused=torch.zeros(2, 1, 1))
    assert torch.equal(fused.weight.sum(1), state.weight.sum(1))
    pooled = state.join_clips(2).pool_prefix(2)
    assert pooled.weight[0, 0] == state.weight[:, 0].sum()
    assert state.regroup(x, state.size, list, list).weight is None
    worst = state.regroup(x, state.size, list, list, weight=-x)
    assert worst.attention_bias.isfinite().all()
