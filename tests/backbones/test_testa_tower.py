"""TESTA's towers: divided attention with one CLS token, and what of a video is left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from counting import Counter
from torch import Tensor, nn

from tempme_vl import MergeSchedule, VisualFrontend, create_frontend
from tempme_vl.backbones.base import BlockAdapter
from tempme_vl.backbones.divided import DividedBlock
from tempme_vl.backbones.testa import from_public_names, to_public_names
from tempme_vl.frontend import MergedBlock
from tempme_vl.merging import FVCORE, LayerMerge, make_schedule
from tempme_vl.state import AttentionContext, TokenState

FRAMES = 6
WAYS = [
    ("none", {}),
    ("tome", {"r": 2}),
    ("testa", {"temporal_r": 1, "spatial_r": 2}),
    ("testa", {"temporal_r": [2, 0, 0, 1, 0, 0], "spatial_r": 0}),
    ("testa", {"temporal_r": 0, "spatial_r": (2, -0.5)}),
    ("testa", {"temporal_r": 1, "spatial_r": 1, "strategy": "importance"}),
    ("testa", {"temporal_r": 1, "spatial_r": 1, "strategy": "prune"}),
]


def tiny(method: str = "testa", **options: object) -> VisualFrontend:
    """In float64, its attention over time at work."""
    torch.manual_seed(0)
    frontend = create_frontend("testa:tiny", method=method, num_frames=FRAMES, **options).double().eval()
    for module in frontend.modules():
        if isinstance(module, DividedBlock):
            nn.init.normal_(module.temporal_fc.weight, std=0.1)
    nn.init.normal_(frontend.embed.time_embed)
    return frontend


def video(videos: int = 2) -> Tensor:
    return torch.randn(videos, FRAMES, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(
    ("method", "frames", "options", "tokens", "gflops"),
    [
        ("testa", 32, {"temporal_r": 1, "spatial_r": 12}, 1041, 419.84),
        ("testa", 32, {}, 1041, 419.84),
        ("none", 32, {}, 6273, 786.82),
        ("testa", 96, {"temporal_r": 4, "spatial_r": 8}, 4801, 1381.40),
        ("testa", 16, {"temporal_r": 1, "spatial_r": 2}, 689, 228.97),
    ],
)
def test_counts_of_the_paper(method: str, frames: int, options: dict, tokens: int, gflops: float) -> None:
    with torch.device("meta"):
        frontend = create_frontend("testa:b16", pretrained=None, method=method, num_frames=frames, **options)
    assert frontend.schedule.output_tokens == tokens
    assert frontend.gflops(FVCORE) == pytest.approx(gflops, abs=0.006)
    assert MergeSchedule.from_dict(frontend.schedule.to_dict()) == frontend.schedule


@pytest.mark.parametrize(("method", "options"), WAYS)
@torch.no_grad()
def test_tokens_sizes_and_sources_are_as_planned(method: str, options: dict) -> None:
    frontend = tiny(method, **options)
    output = frontend(video(), trace_source=True)
    schedule = frontend.schedule
    assert output.tokens.shape == (2, schedule.output_tokens, 64)
    assert output.source.shape == (2, schedule.input_tokens) and schedule.input_tokens == 1 + 16 * FRAMES
    held = torch.zeros(2, schedule.output_tokens, dtype=torch.float64)
    there = (output.source >= 0).double()
    held.scatter_add_(1, output.source.clamp(min=0), there)
    assert torch.equal(held, output.size.squeeze(2).double())
    assert (output.source[:, 0] == 0).all() and (held[:, 0] == 1).all()
    if options.get("strategy") == "prune":
        assert (held == 1).all() and not there.all()
    else:
        assert there.all()
    assert torch.equal(frontend.patches(output.tokens), output.tokens[:, 1:])


@torch.no_grad()
def test_a_video_is_the_mean_of_all_tokens() -> None:
    frontend = tiny(temporal_r=1, spatial_r=2)
    output = frontend(video())
    expected = frontend.head(frontend.norm(output.tokens).mean(1))
    torch.testing.assert_close(output.frames.squeeze(1), expected)
    torch.testing.assert_close(output.pooled, F.normalize(expected, dim=-1))


@torch.no_grad()
def test_frames_that_are_not_real_are_not_in_the_mean() -> None:
    frontend, mask = tiny("none"), torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    output = frontend(video(), mask)
    normed = frontend.norm(output.tokens)
    torch.testing.assert_close(output.frames[0, 0], frontend.head(normed[0, : 1 + 4 * 16].mean(0)))
    torch.testing.assert_close(output.frames[1, 0], frontend.head(normed[1].mean(0)))


@torch.no_grad()
def test_least_important_frames_merge() -> None:
    """By attention that is written out here: what a frame gets from the others, on average over heads and places."""
    frontend, seen = tiny(temporal_r=[2, 0, 0, 0, 0, 0], spatial_r=0, strategy="importance"), []
    block = frontend.blocks[0]
    block.register_forward_hook(lambda _, __, state: seen.append(state))
    x = frontend.embed(video().flatten(0, 1)).unflatten(0, (2, FRAMES))[:, :, 1:]  # (V, T, L, D)
    qkv = block.block.temporal_attn.qkv(block.block.temporal_norm1(x)).unflatten(-1, (3, 4, 16))
    q, k, _ = qkv.permute(3, 0, 2, 4, 1, 5)  # (3, V, L, heads, T, 16)
    weights = (q @ k.transpose(-1, -2) / 4).softmax(-1)
    received = (weights * (1 - torch.eye(FRAMES))).sum(-2).mean((1, 2))
    frontend(video())
    sizes = seen[0].size[:, 1].unflatten(0, (2, -1)).squeeze(-1)
    for number in range(2):
        least = set(received[number].argsort()[:2].tolist())
        kept = [f for f in range(FRAMES) if f not in least]
        of = seen[0].clip_of[number].tolist()
        assert [of[f] for f in kept] == list(range(4)) and sizes[number].sum() == FRAMES


def test_copies_of_the_cls_token_stay_equal() -> None:
    frontend, states = tiny(temporal_r=1, spatial_r=2), []
    for block in frontend.blocks:
        block.register_forward_hook(lambda _, __, state: states.append(state))
    frontend(video())
    assert len(states) == 6
    for state in states:
        cls = state.x[:, 0].unflatten(0, (2, -1))
        assert torch.equal(cls, cls[:, :1].expand_as(cls))


def test_attention_over_time_does_nothing_at_first() -> None:
    """So frames of a new tower know of each other by the CLS token alone."""
    torch.manual_seed(0)
    frontend = create_frontend("testa:tiny", method="none", num_frames=FRAMES).double()
    state = TokenState.start(frontend.embed(video(1).flatten(0, 1)), FRAMES, 1)
    after, attention = frontend.blocks[0].block.time_step(state)
    assert torch.equal(after.x, state.x) and attention.keys.shape == (16, 4, FRAMES, 16)


@pytest.mark.parametrize(("name", "knows"), [("testa:tiny", False), ("testa:mini", True)])
def test_positions_of_frames_start_at_zero_or_as_waves(name: str, knows: bool, tmp_path: Path) -> None:
    """With zeros a new tower does not know the order of frames, with waves it does."""
    frontend = create_frontend(name, method="none", num_frames=FRAMES).double().eval()
    frames = video()[..., : frontend.shape.image_size, : frontend.shape.image_size]
    with torch.inference_mode():
        differs = (frontend(frames).pooled - frontend(frames.flip(1)).pooled).abs().max()
    assert (differs > 1e-3) == knows and (differs < 1e-12) != knows
    frontend.save_pretrained(tmp_path)
    again = VisualFrontend.from_pretrained(tmp_path)
    assert torch.equal(again.embed.time_embed, frontend.embed.time_embed.float())
    assert ("time_start" in (tmp_path / "config.json").read_text()) == knows  # folders of before have no such key


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "tempme", "budget": 0.6}, "'tempme' does not work on a tower of divided attention.*testa"),
        ({"method": "testa", "temporal_r": 1, "r_temporal": 1, "spatial_r": 1}, "under two names: "),
        ({"method": "testa", "temporal_r": (3, 2.0), "spatial_r": 1}, "'r_temporal': expected"),
    ],
)
def test_what_a_divided_tower_refuses(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_frontend("testa:tiny", num_frames=FRAMES, **options)


@torch.no_grad()
def test_frames_apart_know_nothing_of_each_other() -> None:
    torch.manual_seed(0)
    frontend = create_frontend("testa:tiny", method="none", num_frames=FRAMES, attention="apart").double().eval()
    x = video(1)
    first = frontend(x)
    x[:, 3:] += 1.0
    second = frontend(x)
    assert torch.equal(first.frames[:, :3], second.frames[:, :3]) and not torch.equal(first.frames, second.frames)
    assert first.tokens.shape[1] == 17 * FRAMES
    with pytest.raises(ValueError, match="unknown attention 'both'; expected one of divided, apart, joint"):
        create_frontend("testa:tiny", method="none", attention="both")


@pytest.mark.parametrize(("method", "options"), [("none", {}), ("tome", {"r": 7})])
@torch.no_grad()
def test_all_frames_together_hold_every_patch_once(method: str, options: dict[str, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    frontend = create_frontend("testa:tiny", method=method, num_frames=FRAMES, attention="joint", **options)
    frontend = frontend.double().eval()
    left = 1 + 16 * FRAMES - 6 * options.get("r", 0)
    assert (frontend.schedule.input_tokens, frontend.schedule.output_tokens) == (1 + 16 * FRAMES, left)
    output = frontend(video(), trace_source=True)
    assert output.tokens.shape[1] == left and output.frames.shape[1] == 1 and output.source is not None
    assert (output.source[:, 0] == 0).all() and (output.source[:, 1:] > 0).all()
    assert torch.equal(F.one_hot(output.source, left).sum(1), output.size.squeeze(2).long())
    assert torch.equal(frontend.patches(output.size), output.size[:, 1:])
    frontend.save_pretrained(tmp_path)
    assert torch.equal(VisualFrontend.from_pretrained(tmp_path).double().eval()(video()).pooled, output.pooled)


@torch.no_grad()
def test_the_source_of_a_patch_is_the_token_that_it_changes() -> None:
    """Without blocks between, as the embedding puts patches in order of their places."""
    torch.manual_seed(0)
    frontend = create_frontend("testa:tiny", method="none", num_frames=FRAMES, attention="joint").double().eval()
    frontend.blocks = torch.nn.ModuleList(MergedBlock(Still(), LayerMerge()) for _ in frontend.blocks)
    x = video()
    before = frontend(x, trace_source=True)
    x[:, 3, :, 8:16, 24:] += 1  # the eighth of 16 patches of the fourth frame
    changed = (frontend(x).tokens != before.tokens).any(2)
    assert before.source is not None
    assert changed[0].nonzero().tolist() == [[int(before.source[0, 1 + 3 * 16 + 7])]] and changed.sum() == len(x)


class Still(BlockAdapter):
    """Does nothing."""

    def attention_step(self, state: TokenState) -> tuple[TokenState, AttentionContext]:
        return state, AttentionContext(state.x.unsqueeze(1))

    def mlp_step(self, state: TokenState) -> TokenState:
        return state


@pytest.mark.parametrize("method", ["random", "uniform", "pool", "sta", "testa", "tempme"])
def test_methods_that_know_of_frames_are_refused_where_all_are_together(method: str) -> None:
    with pytest.raises(ValueError, match=rf"method '{method}' .*(choose one of none, tome|one clip)"):
        create_frontend("testa:tiny", method=method, num_frames=FRAMES, attention="joint", budget=0.7)


def test_names_of_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="no model 'l16'; expected one of tiny, mini, b16"):
        create_frontend("testa:l16", method="none")


def test_frames_with_factors_cannot_merge() -> None:
    frontend = tiny("testa", temporal_scaling=True, temporal_r=1, spatial_r=1)
    with pytest.raises(ValueError, match="each of 6 frames has a factor of its own, and 5 are left"):
        frontend(video())
    assert tiny("testa", temporal_scaling=True, temporal_r=0, spatial_r=1)(video()).tokens.shape[1] == 1 + 10 * FRAMES


def test_a_schedule_for_frames_apart_is_refused() -> None:
    schedule = make_schedule("none", 6, FRAMES, 17)
    with pytest.raises(ValueError, match=r"frames divided; the schedule was made for .*, apart"):
        frontend = tiny("none")
        VisualFrontend.from_config(type(frontend.full_config())(frontend.config, schedule))


@torch.no_grad()
def test_saved_and_read_again(tmp_path: Path) -> None:
    frontend = tiny(temporal_r=1, spatial_r=2).float()
    frontend.save_pretrained(tmp_path)
    again = VisualFrontend.from_pretrained(tmp_path)
    x = video().float()
    assert torch.equal(again.eval()(x).tokens, frontend(x).tokens)
    started = create_frontend("testa:tiny", str(tmp_path), "none", 9)
    assert torch.equal(started.blocks[3].block.mlp[0].weight, frontend.blocks[3].block.mlp[0].weight)
    times = frontend.embed.time_embed[:, [0, 0, 1, 2, 2, 3, 4, 4, 5]]  # TESTA's own for 9 of 6
    assert torch.equal(started.embed.time_embed, times)


def test_public_names_there_and_back() -> None:
    frontend = tiny("none")
    public = to_public_names(frontend.state_dict())
    assert "visual_encoder.blocks.5.temporal_attn.qkv.weight" in public and "vision_proj.bias" in public
    back = from_public_names(public)
    backbone_state = {key.replace(".block.", ".", 1): value for key, value in frontend.state_dict().items()}
    assert back.keys() == backbone_state.keys()
    assert all(torch.equal(back[key], value) for key, value in backbone_state.items())


def test_a_file_without_a_block_is_refused() -> None:
    frontend = tiny("none")
    public = to_public_names(frontend.state_dict())
    del public["visual_encoder.blocks.2.norm2.weight"]
    with pytest.raises(ValueError, match=r"1 missing: blocks\.2\.norm2\.weight"):
        VisualFrontend.from_testa_state_dict(public, 4, 32, make_schedule("none", 6, FRAMES, 17))


def test_recomputed_blocks_have_the_same_gradients() -> None:
    frontend = tiny(temporal_r=1, spatial_r=2)
    grads = []
    for enable in (False, True):
        frontend.set_grad_checkpointing(enable)
        frontend.zero_grad()
        frontend(video()).pooled.sum().backward()
        grads.append(frontend.embed.pos_embed.grad.clone())
    assert torch.equal(*grads) and grads[0].abs().sum() > 0


@pytest.mark.parametrize(("method", "options"), WAYS[:5])
@torch.no_grad()
def test_gflops_are_those_of_the_modules_that_run(method: str, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    frontend = tiny(method, **options)
    counter = Counter(frontend, monkeypatch)
    frontend(video(1))
    assert frontend.gflops() == pytest.approx((counter.total + 64 * 64) / 1e9, rel=1e-12)
