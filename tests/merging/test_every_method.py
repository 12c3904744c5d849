"""What every method must keep, on every kind of tower: nothing here knows a method but by its record.

A new method is tested by its line in `METHODS`: its options come from the record or from a budget.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor
from towers import FIRST_WAY, TINY, random_video

from tempme_vl import FrontendOutput, VisualFrontend, create_frontend
from tempme_vl.backbones import hf
from tempme_vl.backbones import timm as timm_family
from tempme_vl.compressors import FrameFeatures
from tempme_vl.frontend import merge_in
from tempme_vl.integrations.reduction import make_plan, merge
from tempme_vl.merging import METHODS
from tempme_vl.state import TokenState

FRAMES = 4
SIGLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
SIGLIP |= {"image_size": 32, "patch_size": 8}


def of_timm(method: str, **options: Any) -> VisualFrontend:
    """With registers."""
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 8}
    tower = timm.create_model("vit_tiny_patch16_224", **shape, reg_tokens=4)
    return merge_in(*timm_family.backbone_of(tower), method, FRAMES, 0.0, **options)


def of_transformers(method: str, **options: Any) -> VisualFrontend:
    """Without a CLS token, pooled by attention."""
    tower = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIGLIP))
    return merge_in(*hf.backbone_of(tower), method, FRAMES, 0.0, **options)


TOWERS: dict[str, Callable[..., VisualFrontend]] = {
    "open_clip": partial(create_frontend, TINY, None, num_frames=FRAMES),
    "umt": partial(create_frontend, "umt:tiny", None, num_frames=FRAMES),
    "umt joint": partial(create_frontend, "umt:tiny", None, num_frames=FRAMES, mode="joint"),
    "timm": of_timm,
    "hf": of_transformers,
}
REASONS = r"reads the attention of CLS tokens, and this tower has none|but a joint encoder's are one clip"
each_method = pytest.mark.parametrize("method", METHODS)


def front(tower: str, method: str) -> VisualFrontend:
    """A front end whose weights all matter; skips what is refused for a reason that the record gives."""
    record, shape = METHODS[method], TOWERS[tower](method="none").shape
    torch.manual_seed(0)
    if (shape.joint and not record.joint) or ("cls_rows" in record.reads and not shape.num_prefix):
        with pytest.raises(ValueError, match=REASONS):
            TOWERS[tower](method=method)
        pytest.skip("refused, as its record says")
    frontend = TOWERS[tower](method=method, **FIRST_WAY.get(method, {}))
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
    double, mask = frontend.double(), torch.tensor([[1, 1, 1, 0], [1] * FRAMES])
    both, second = double(video.double(), mask), double(video[1:].double())
    torch.testing.assert_close(both.tokens[1:], second.tokens, rtol=0, atol=1e-10)
    torch.testing.assert_close(both.pooled[1:], second.pooled, rtol=0, atol=1e-10)
    both.pooled.sum().backward()
    gradients = [weight.grad for weight in double.blocks.parameters() if weight.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


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
    assert len(clips.x) == sum(clip.tokens for clip in clips.clips) == schedule.output_tokens
    sources = clips.source.split([clip.tokens for clip in clips.clips])
    assert all((source.diff() > 0).all() for source in sources) and clips.source.max() < FRAMES * 30
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
