"""UMT's tower as a front end: frames joint or apart, positions, merging without CLS tokens, weights in and out."""

from __future__ import annotations

import logging
import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights
from towers import random_video

from tempme_vl import FrontendOutput, MergeSchedule, VisualFrontend, create_frontend
from tempme_vl.backbones import umt
from tempme_vl.backbones.umt import UMTConfig, from_umt_names, model_config, position_table, sinusoid_table
from tempme_vl.data.transforms import VideoTransform

TINY = "umt:tiny"  # 6 layers, 16 tokens of width 64 a frame
F, N, D = 6, 16, 64
FIELDS = ("tokens", "pooled", "size", "frames", "source")
SHAPE: dict[str, Any] = {"layers": 6, "frames": F, "tokens": N, "prefix": 0}
TEMPME: dict[str, Any] = {"r": 2, "merge_layers": (2, 4), "merge_frames": (2, 3)}
PERCENT = {"cross_percent": 40, "intra_percent": 20}

SCHEDULES = {
    "none": MergeSchedule.identity(**SHAPE),
    "tome": MergeSchedule.tome(**SHAPE, r=2),
    "tempme": MergeSchedule.tempme(**SHAPE, **TEMPME, **PERCENT),
    "tempme at its limits": MergeSchedule.tempme(6, F, N, 2, (2, 3, 5), (1, 3, 2), 100, 100, prefix=0),
    "tempme, two clips left": MergeSchedule.tempme(6, F, N, 1, (2,), (3,), 30, 10, prefix=0),
    "tempme, joins only": MergeSchedule.tempme(6, F, N, 0, (2, 4), (2, 3), 0, 0, prefix=0),
    "joint none": MergeSchedule.identity(**SHAPE, joint=True),
    "joint tome": MergeSchedule.tome(**SHAPE, r=9, joint=True),
}
# Clips at the end where they cannot be taken for frames any more; else every frame keeps its embedding.
CLIPS_LEFT = {"tempme": 1, "tempme at its limits": 1, "tempme, two clips left": 2, "joint tome": 1}
FEW = ["tempme", "joint none", "joint tome"]
every_schedule = pytest.mark.parametrize("name", SCHEDULES)
few_schedules = pytest.mark.parametrize("name", FEW)


def build(schedule: MergeSchedule, **changes: Any) -> VisualFrontend:
    """The tiny tower, none of its biases zero."""
    torch.manual_seed(0)
    config = replace(model_config("tiny", schedule.frames, "joint" if schedule.joint else "per_frame"), **changes)
    frontend = VisualFrontend(umt.build(config), schedule, umt.saved_config(config))
    with torch.no_grad():
        for parameter in frontend.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    frontend.init_clip_positions(0.1)
    return frontend


def tiny(name: str, **changes: Any) -> VisualFrontend:
    return build(SCHEDULES[name], **changes)


def public(frontend: VisualFrontend) -> dict[str, Tensor]:
    """Its weights as UMT's retrieval files name them."""
    named = umt.to_umt_names(frontend.state_dict())
    return {key if key.startswith("vision_proj.") else f"vision_encoder.{key}": value for key, value in named.items()}


def stage1(frontend: VisualFrontend) -> dict[str, Tensor]:
    """Its weights without the head, as UMT's first stage saves them."""
    return {k: v for k, v in umt.to_umt_names(frontend.state_dict()).items() if k.startswith("encoder.")}


def assert_equal(actual: FrontendOutput, expected: FrontendOutput) -> None:
    for field in FIELDS:
        a, b = getattr(actual, field), getattr(expected, field)
        assert (a is None and b is None) or torch.equal(a, b), field


def gradients(frontend: VisualFrontend, output: FrontendOutput) -> dict[str, Tensor]:
    frontend.zero_grad()
    (output.pooled[:, :7].sum() + output.tokens.float().square().mean()).backward()
    return {name: p.grad.clone() for name, p in frontend.named_parameters() if p.grad is not None}


# ---- merging without CLS tokens


@every_schedule
def test_predicted_counts_are_the_real_ones(name: str) -> None:
    schedule, frontend, seen, attended = SCHEDULES[name], tiny(name), [], []
    for block in frontend.blocks:
        block.register_forward_hook(lambda _, __, state: seen.append((state.num_clips, *state.x.shape)))
        block.block.attn.register_forward_pre_hook(lambda _, inputs: attended.append(inputs[0].shape[1]))
    output = frontend(random_video(F), trace_source=True)
    assert [(clips, tokens) for clips, _, tokens, _ in seen] == schedule.token_counts
    assert all(rows == 2 * clips for clips, rows, _, _ in seen)
    assert attended == [count.attention for count in schedule.layer_counts]
    assert output.tokens.shape == (2, schedule.output_tokens, D)
    assert output.pooled.shape == (2, 64) and output.frames.shape == (2, CLIPS_LEFT.get(name, F), 64)
    assert (output.size.sum(1) == F * N).all()
    for source, size in zip(output.source, output.size, strict=True):
        assert torch.equal(source.bincount(minlength=schedule.output_tokens), size.flatten().long())


@every_schedule
def test_source_says_which_input_a_token_averages(name: str) -> None:
    """Where no block adds anything, an output token is the mean of the input tokens that it holds."""
    frontend = tiny(name).double()
    for block in frontend.blocks:
        for last in (block.block.attn.proj, block.block.mlp[2]):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
    frontend.init_clip_positions(0.0)
    video = random_video(F, dtype=torch.float64)
    output = frontend(video, trace_source=True)
    x = frontend.embed(video.flatten(0, 1)).reshape(2, F * N, D)
    summed = torch.zeros_like(output.tokens).index_add(1, output.source[0], x)
    torch.testing.assert_close(output.tokens[0], (summed / output.size)[0], rtol=0, atol=1e-12)
    assert name in ("none", "joint none", "tempme, joins only") or output.size.max() > 1


@every_schedule
def test_an_embedding_is_the_mean_of_a_frames_or_a_clips_tokens(name: str) -> None:
    frontend = tiny(name).double()
    output = frontend(random_video(F, dtype=torch.float64))
    parts = CLIPS_LEFT.get(name, F)
    tokens, size = frontend.norm(output.tokens).unflatten(1, (parts, -1)), output.size.unflatten(1, (parts, -1))
    assert (size.sum(2) == F * N / parts).all()
    expected = frontend.head((tokens * size).sum(2) / (F * N / parts))
    torch.testing.assert_close(output.frames, expected, rtol=0, atol=1e-12)
    unit = nn.functional.normalize(expected, dim=-1)
    torch.testing.assert_close(output.pooled, unit.mean(1), rtol=0, atol=1e-12)


@every_schedule
def test_videos_of_a_batch_do_not_meet(name: str) -> None:
    frontend, video = tiny(name).double(), random_video(F, dtype=torch.float64)
    both, second = frontend(video), frontend(video[1:])
    torch.testing.assert_close(both.tokens[1:], second.tokens, rtol=0, atol=1e-12)
    torch.testing.assert_close(both.pooled[1:], second.pooled, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["none", "tome", "tempme, joins only", "joint none"])
def test_mask_leaves_out_frames(name: str) -> None:
    frontend, video = tiny(name), random_video(F)
    mask = torch.tensor([[1, 1, 0, 1, 0, 0], [0] * F])
    output = frontend(video, mask)
    unit = nn.functional.normalize(output.frames, dim=-1)
    torch.testing.assert_close(output.pooled[0], unit[0, [0, 1, 3]].mean(0))
    assert not output.pooled[1].any(), "no real frame at all"
    assert torch.equal(output.tokens, frontend(video).tokens), "the mask is used for pooling only"


def test_mask_of_joined_clips_asks_for_one_real_frame() -> None:
    video, two_clips, one_clip = random_video(F), tiny("tempme, two clips left"), tiny("tempme")
    unit = nn.functional.normalize(two_clips(video).frames, dim=-1)
    for mask, clips in (([1, 0, 0, 0, 0, 0], [0]), ([0, 0, 0, 0, 1, 1], [1]), ([0, 1, 0, 1, 0, 0], [0, 1])):
        pooled = two_clips(video, torch.tensor([mask] * 2)).pooled
        torch.testing.assert_close(pooled, unit[:, clips].mean(1))
    mask = torch.tensor([[0, 0, 0, 0, 1, 0], [0] * F])
    pooled, whole = one_clip(video, mask).pooled, one_clip(video).pooled
    assert torch.equal(pooled[0], whole[0]) and not pooled[1].any()


def test_a_token_of_size_two_is_seen_as_two_tokens() -> None:
    block = tiny("none").blocks[0].block
    x = torch.randn(1, 3, D, generator=torch.Generator().manual_seed(0))
    bias = torch.tensor([1.0, 1.0, 2.0]).log().view(1, 1, 1, 3)
    twice, _ = block.attention_branch(torch.cat([x, x[:, 2:]], dim=1), None)
    sized, _ = block.attention_branch(x, bias)
    torch.testing.assert_close(sized, twice[:, :3], rtol=0, atol=1e-6)
    assert not torch.allclose(sized, block.attention_branch(x, None)[0], atol=1e-4)


@pytest.mark.parametrize("options", [{}, {**TEMPME, **PERCENT}])
def test_joint_frames_cannot_be_joined(options: dict) -> None:
    with pytest.raises(
        ValueError,
        match=r"'tempme' keeps frames apart or joins frames step by step, but a joint encoder's are one clip",
    ):
        create_frontend(TINY, mode="joint", num_frames=F, **options)
    state = public(tiny("none"))
    with pytest.raises(ValueError, match=r"one clip from the start.*no layers that join clips"):
        VisualFrontend.from_umt_state_dict(state, 4, 32, "joint", SCHEDULES["tempme"])


@pytest.mark.parametrize(
    ("mode", "name"), [("joint", "tome"), ("per_frame", "joint tome"), ("per_frame", "joint none")]
)
def test_schedule_of_the_other_mode(mode: str, name: str) -> None:
    there, given = ("joint", "apart") if mode == "joint" else ("apart", "joint")
    with pytest.raises(ValueError, match=rf"16 tokens a frame \(0 CLS\), frames {there}.*\(0 CLS\), {given}$"):
        VisualFrontend(umt.build(model_config("tiny", F, mode)), SCHEDULES[name])


# ---- modes and positions


@pytest.mark.parametrize("r", [0, 2])
def test_one_frame_is_the_same_in_both_modes(r: int) -> None:
    one = {**SHAPE, "frames": 1, "r": r}
    video = random_video(1)
    joint, apart = (build(MergeSchedule.tome(**one, joint=joint))(video, trace_source=True) for joint in (True, False))
    assert_equal(joint, apart)


def test_frames_meet_in_joint_mode_only() -> None:
    video = random_video(F)
    changed = video.clone()
    changed[:, 2] += 1
    others = [0, 1, 3, 4, 5]
    for name, meet in (("none", False), ("tome", False), ("joint none", True)):
        frontend = tiny(name)
        before, after = frontend(video).frames, frontend(changed).frames
        assert not torch.allclose(before[:, 2], after[:, 2], atol=1e-3)
        assert torch.equal(before[:, others], after[:, others]) != meet, name


def test_order_of_frames() -> None:
    """With the table of single frames their order is unknown; the joint table, or its slices, tell it."""
    video = random_video(F)
    for name, positions, known in (("none", "image", False), ("none", "joint", True), ("joint none", "image", True)):
        frontend = tiny(name, positions=positions)
        turned = frontend(video.flip(1)).frames.flip(1)
        assert torch.allclose(turned, frontend(video).frames, atol=1e-5) != known, (name, positions)


def config(**changes: Any) -> UMTConfig:
    return replace(model_config("tiny", F, "joint"), **changes)


def test_position_tables() -> None:
    joint, image = position_table(config()), position_table(config(mode="clip"))
    assert joint.shape == (F, N, D) and image.shape == (1, N, D) and joint.dtype == image.dtype == torch.float32
    assert torch.equal(image[0], joint[0]), "a single frame has the positions of the first one"
    assert torch.equal(position_table(config(mode="clip", positions="joint")), joint)
    assert torch.equal(position_table(config(positions="joint")), joint), "an option of frames apart"
    assert len(joint.flatten(0, 1).unique(dim=0)) == F * N
    torch.testing.assert_close(joint.square().sum(-1), torch.full((F, N), D / 2)), "sine and cosine of the same angle"
    rate = 10000 ** (-2 / D)
    row = [math.sin(1), math.cos(1), math.sin(rate), math.cos(rate)]
    assert sinusoid_table(2, D)[1, :4].tolist() == pytest.approx(row, abs=1e-12)
    assert sinusoid_table(1, 4).tolist() == [[0, 1, 0, 1]]


def test_position_table_of_other_frames_is_stretched_linearly() -> None:
    made = position_table(config(num_frames=3))
    assert torch.equal(position_table(config(num_frames=3, pretrained_frames=3)), made)
    stretched = position_table(config(num_frames=6, pretrained_frames=3))
    torch.testing.assert_close(stretched[2], 0.75 * made[1] + 0.25 * made[0])
    assert torch.equal(stretched[0], made[0]) and torch.equal(stretched[5], made[2]), "no frame to go on from"
    sliced = position_table(config(num_frames=6, pretrained_frames=3, mode="clip", positions="joint"))
    assert torch.equal(sliced, stretched)


def test_tables_are_no_weights() -> None:
    frontend = tiny("joint none")
    assert not [key for key in frontend.state_dict() if "position" in key]
    assert [name for name, _ in frontend.named_buffers()] == ["embed.positions"]


def test_slices_of_the_joint_table_leave_the_first_frame_as_it_is() -> None:
    video = random_video(F)
    image, sliced = (tiny("none", positions=positions)(video).frames for positions in ("image", "joint"))
    torch.testing.assert_close(image[:, 0], sliced[:, 0], rtol=0, atol=1e-6)
    assert ((image - sliced)[:, 1:].abs().amax(-1) > 1e-4).all()


def test_keys_have_no_bias() -> None:
    attention = tiny("none").blocks[0].block.attn
    assert attention.qkv.bias is None and {n for n, _ in attention.bias.named_parameters()} == {"q", "v"}
    x = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0))
    _, context = attention(x)
    assert torch.equal(context.keys.transpose(1, 2).flatten(2), attention.qkv(x)[..., D : 2 * D])
    q, k, v = (attention.bias(attention.qkv(x)) - attention.qkv(x)).chunk(3, dim=-1)
    assert q.any() and not k.any() and v.any()


# ---- training


@few_schedules
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_checkpointing_is_exact(name: str, drop_path: float) -> None:
    plain, video = tiny(name, drop_path=drop_path).train(), random_video(F)
    checkpointed = deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    outputs, grads = [], []
    for frontend in (plain, checkpointed):
        torch.manual_seed(3)
        outputs.append(frontend(video, trace_source=True))
        grads.append(gradients(frontend, outputs[-1]))
    assert_equal(outputs[1], outputs[0])
    assert grads[0].keys() == grads[1].keys() == dict(plain.named_parameters()).keys()
    for key, gradient in grads[0].items():
        assert torch.equal(grads[1][key], gradient), key


def test_drop_path_rises_and_drops_in_training_only() -> None:
    dropping, plain, video = tiny("joint none", drop_path=0.5), tiny("joint none"), random_video(F)
    rates = [block.block.drop_path.rate for block in dropping.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert torch.equal(dropping.eval()(video).tokens, plain.eval()(video).tokens)
    dropping.train()
    torch.manual_seed(0)
    assert not torch.equal(dropping(video).tokens, dropping(video).tokens)
    torch.manual_seed(0)
    delta = dropping.blocks[5].block.mlp_branch(torch.ones(60, 4, D))
    dropped = ~delta.flatten(1).any(1)
    assert 15 < dropped.sum() < 45, "whole rows, half of them"
    plain_delta = plain.blocks[5].block.mlp_branch(torch.ones(60, 4, D))
    torch.testing.assert_close(delta[~dropped], 2 * plain_delta[~dropped])


@every_schedule
def test_float64_agrees_with_float32(name: str) -> None:
    frontend, video = tiny(name), random_video(F)
    single = frontend(video, trace_source=True)
    double = frontend.double()(video.double(), trace_source=True)
    assert double.tokens.dtype == double.pooled.dtype == double.size.dtype == torch.float64
    assert torch.equal(double.source, single.source)
    torch.testing.assert_close(single.tokens.double(), double.tokens, rtol=0, atol=1e-5)
    torch.testing.assert_close(single.pooled.double(), double.pooled, rtol=0, atol=1e-6)


@few_schedules
@pytest.mark.parametrize("checkpointing", [False, True])
def test_bfloat16_autocast(name: str, checkpointing: bool) -> None:
    frontend, video = tiny(name), random_video(F)
    expected = frontend(video)
    frontend.set_grad_checkpointing(checkpointing)
    with torch.autocast("cpu", torch.bfloat16):
        output = frontend(video)
    assert output.size.dtype == output.pooled.dtype == torch.float32 and (output.size.sum(1) == F * N).all()
    cosine = torch.cosine_similarity(output.pooled, expected.pooled, dim=-1)
    assert (cosine > 0.99).all(), cosine
    grads = gradients(frontend, output)
    assert grads.keys() == dict(frontend.named_parameters()).keys()
    assert all(g.isfinite().all() and g.any() for g in grads.values())


@pytest.mark.parametrize(
    "schedule",
    [
        # its steps compile in tests/test_frontend.py, these blocks below
        pytest.param(
            MergeSchedule.tempme(3, F, N, 2, (1,), (3,), 40, 20, prefix=0), id="tempme", marks=pytest.mark.slow
        ),
        pytest.param(MergeSchedule.tome(2, F, N, 9, prefix=0, joint=True), id="joint tome"),
    ],
)
def test_compiles_into_one_graph(schedule: MergeSchedule) -> None:
    torch.compiler.reset()
    frontend, video = build(schedule, layers=len(schedule.plan)), random_video(F)
    compiled = torch.compile(frontend, backend="eager", fullgraph=True)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * F])
    expected, actual = frontend(video, mask, trace_source=True), compiled(video, mask, trace_source=True)
    for field in FIELDS:
        torch.testing.assert_close(getattr(actual, field), getattr(expected, field), rtol=0, atol=1e-6)
    expected_grads, actual_grads = gradients(frontend, expected), gradients(frontend, actual)
    for key, gradient in expected_grads.items():
        torch.testing.assert_close(actual_grads[key], gradient, rtol=1e-4, atol=1e-5)
    with torch.compiler.set_stance("fail_on_recompile"):  # one graph, and no second one for other pixels
        compiled(video + 1, mask, trace_source=True)


@few_schedules
def test_lora_on_attention(name: str) -> None:
    frontend, video = tiny(name), random_video(F)
    before = frontend(video, trace_source=True)
    model = get_peft_model(frontend, LoraConfig(r=4, target_modules=["attn.qkv"]))
    assert_equal(model(video, trace_source=True), before)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 6 and sum(p.numel() for p in trained.values()) == 6 * 4 * (D + 3 * D)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1)
    adapted = model(video)
    assert not torch.allclose(adapted.pooled, before.pooled, atol=1e-4)
    adapted.pooled[:, :7].sum().backward()
    assert all(p.grad.any() for p in trained.values())
    merged = model.merge_and_unload()
    assert merged.state_dict().keys() == tiny(name).state_dict().keys()
    torch.testing.assert_close(merged(video).pooled, adapted.pooled, rtol=0, atol=1e-5)


# ---- weights in and out


@pytest.mark.parametrize("name", ["tempme", "joint none"])
def test_names_go_back_bit_for_bit(name: str) -> None:
    frontend = tiny(name)
    state = public(frontend)
    assert state["vision_encoder.encoder.patch_embed.proj.weight"].shape == (D, 3, 1, 8, 8)
    bare = {key.removeprefix("vision_encoder."): value for key, value in state.items()}
    ours = from_umt_names(bare)
    assert ours.keys() == umt.build(config()).state_dict().keys()
    theirs = umt.to_umt_names(ours)
    assert theirs.keys() == bare.keys() and all(torch.equal(theirs[key], value) for key, value in bare.items())
    again = VisualFrontend.from_umt_state_dict(state, 4, 32, "joint", SCHEDULES["none"])
    exported = public(again)
    assert exported.keys() == state.keys() and all(torch.equal(exported[key], value) for key, value in state.items())


@pytest.mark.parametrize("options", [{}, {"positions": "joint"}, {"positions": "joint", "pretrained_frames": 3}])
@every_schedule
def test_front_end_on_public_names(name: str, options: dict) -> None:
    frontend, schedule, video = tiny(name, **options), SCHEDULES[name], random_video(F)
    mode = "joint" if schedule.joint else "per_frame"
    loaded = VisualFrontend.from_umt_state_dict(public(frontend), 4, 32, mode, schedule, **options)
    loaded.load_state_dict({k: v for k, v in frontend.state_dict().items() if "clip_position" in k}, strict=False)
    assert (loaded.shape, loaded.schedule) == (frontend.shape, schedule)
    assert_equal(loaded(video, trace_source=True), frontend(video, trace_source=True))


def test_stage1_has_no_head() -> None:
    frontend, video = tiny("joint none"), random_video(F)
    loaded = VisualFrontend.from_umt_state_dict(stage1(frontend), 4, 32, "joint", SCHEDULES["joint none"])
    assert loaded.shape.embed_dim == D and not list(loaded.head.parameters())
    output = loaded(video)
    assert torch.equal(output.tokens, frontend(video).tokens)
    torch.testing.assert_close(output.frames, loaded.norm(output.tokens).unflatten(1, (F, N)).mean(2))


def write(state: dict[str, Tensor], path: Path) -> str:
    if path.suffix == ".pth":
        torch.save({"model": state}, path)
    else:
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    return str(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["tome", "joint tome"])
def test_pretrained_file(name: str, suffix: str, tmp_path: Path) -> None:
    frontend, schedule, video = tiny(name), SCHEDULES[name], random_video(F)
    file = write(public(frontend), tmp_path / f"umt{suffix}")
    mode = "joint" if schedule.joint else "per_frame"
    options = {"mode": mode, "method": "tome", "num_frames": F, "r": schedule.plan[0].after}
    assert_equal(create_frontend(TINY, pretrained=file, **options)(video), frontend(video))


def test_pretrained_file_without_a_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frontend, video = tiny("none"), random_video(F)
    file = write(stage1(frontend), tmp_path / "stage1.pth")
    with caplog.at_level(logging.INFO, "tempme_vl"):
        loaded = create_frontend(TINY, pretrained=file, method="none", num_frames=F)
    assert "random: head.0.bias, head.0.weight, head.1.bias, head.1.weight" in caplog.text
    assert "stage1 form" in caplog.text and "0 unexpected" in caplog.text
    output = loaded(video)
    assert torch.equal(output.tokens, frontend(video).tokens) and output.frames.shape == (2, F, 64)


@pytest.mark.parametrize("positions", ["image", "joint"])
@every_schedule
def test_saved_front_end_comes_back(name: str, positions: str, tmp_path: Path) -> None:
    saved, video = tiny(name, positions=positions, pretrained_frames=3, drop_path=0.3), random_video(F)
    saved.save_pretrained(tmp_path)
    loaded = VisualFrontend.from_pretrained(tmp_path)
    assert (loaded.shape, loaded.schedule) == (saved.shape, saved.schedule)
    assert loaded.full_config() == saved.full_config() and loaded.config.positions == positions
    assert loaded.blocks[5].block.drop_path.rate == pytest.approx(0.3)
    assert_equal(loaded.eval()(video, trace_source=True), saved.eval()(video, trace_source=True))


def test_front_end_without_a_head_comes_back(tmp_path: Path) -> None:
    saved = VisualFrontend.from_umt_state_dict(stage1(tiny("none")), 4, 32, "per_frame", SCHEDULES["none"])
    saved.save_pretrained(tmp_path)
    assert_equal(VisualFrontend.from_pretrained(tmp_path)(random_video(F)), saved(random_video(F)))


# ---- refusals

BLOCK = "vision_encoder.encoder.blocks.1"
PATCHES = "vision_encoder.encoder.patch_embed.proj.weight"


@pytest.mark.parametrize(
    ("drop", "add", "message"),
    [
        (f"{BLOCK}.norm1.bias", {}, r"does not hold the weights of this UMT tower: .*blocks.1.norm1.bias"),
        (f"{BLOCK}.attn.q_bias", {}, r"does not hold the weights of this UMT tower: .*blocks.1.attn.bias.q"),
        ("", {f"{BLOCK}.attn.k_bias": (D,)}, rf"has no such weights.*{BLOCK}.attn.k_bias"),
        ("", {f"{BLOCK}.gamma_1": (D,)}, rf"has no such weights.*{BLOCK}.gamma_1"),
        ("", {f"{BLOCK}.mlp.fc1.weight": (99, D)}, r"does not hold the weights of this UMT tower: .*blocks.1.mlp.0"),
        ("", {"vision_proj.weight": (64, 32)}, r"does not hold the weights of this UMT tower: .*head.1.weight"),
        ("", {PATCHES: (D, 3, 2, 8, 8)}, r"patches of one frame each.*got \(64, 3, 2, 8, 8\)"),
        (PATCHES, {}, r"its patch embedding or its blocks are missing"),
    ],
)
def test_weights_that_do_not_fit(drop: str, add: dict[str, tuple[int, ...]], message: str) -> None:
    state = {key: value for key, value in public(tiny("none")).items() if key != drop}
    state |= {key: torch.zeros(shape) for key, shape in add.items()}
    with pytest.raises(ValueError, match=f"(?s){message}"):
        VisualFrontend.from_umt_state_dict(state, 4, 32, "per_frame", SCHEDULES["none"])


def test_other_families_and_sizes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = {"visual.conv1.weight": torch.zeros(4, 3, 8, 8), "visual.transformer.resblocks.0.ln_1.weight": torch.ones(4)}
    with pytest.raises(ValueError, match=r"expected a UMT checkpoint.*OpenAI CLIP or open_clip"):
        VisualFrontend.from_umt_state_dict(clip, 4, 32, "per_frame", SCHEDULES["none"])
    with pytest.raises(ValueError, match=r"expected a UMT checkpoint.*OpenAI CLIP or open_clip"):
        create_frontend(TINY, pretrained=write(clip, tmp_path / "clip.safetensors"), method="none")
    narrow = umt.build(replace(config(), width=32, embed_dim=16))
    narrow_file = write(umt.to_umt_names(narrow.state_dict()), tmp_path / "narrow.pth")
    message = r"narrow.pth does not hold the weights of this UMT tower: .*\(32,\) instead of \(64,\).*; no model of UMT"
    with pytest.raises(ValueError, match=message):
        create_frontend(TINY, pretrained=narrow_file, method="none")
    monkeypatch.setitem(umt._MODELS, "narrow", {**umt._MODELS["tiny"], "width": 32})
    with pytest.raises(
        ValueError, match=r"narrow.pth does not hold the weights of .* instead of .*; it looks like narrow"
    ):
        create_frontend(TINY, pretrained=narrow_file, method="none")
    with pytest.raises(ValueError, match=r"expected a checkpoint file; .*nothing.pth does not exist"):
        create_frontend(TINY, pretrained=str(tmp_path / "nothing.pth"), method="none")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("umt:b32", {}, r"UMT has no model 'b32'; expected one of tiny, b16, l16"),
        (TINY, {"mode": "apart"}, r"unknown mode 'apart'; expected one of joint, per_frame"),
        (TINY, {"positions": "learnt"}, r"unknown positions 'learnt'; expected one of image, joint"),
        (TINY, {"method": "none", "pretrained_frames": 4}, r"'none' does not know the options pretrained_frames"),
        ("open_clip:tiny", {"method": "none", "mode": "joint"}, r"'none' does not know the options mode"),
    ],
)
def test_wrong_options(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_frontend(name, **options)


@pytest.mark.parametrize("change", [{"image_size": 36}, {"heads": 5}])
def test_sizes_that_do_not_divide(change: dict) -> None:
    with pytest.raises(ValueError, match=r"the patch size must divide the image size and the heads the width"):
        config(**change)


def test_pixels_are_normalised_as_image_net_and_squashed() -> None:
    """UMT's transforms: torchvision's published numbers, and both sides scaled, so that no border is lost."""
    given = create_frontend(TINY, method="none", num_frames=2).preprocessing
    published = ResNet18_Weights.DEFAULT.transforms()
    assert (given.mean, given.std) == (tuple(published.mean), tuple(published.std))
    size = given.image_size
    wide = np.full((1, size, 2 * size, 3), 255, dtype=np.uint8)
    wide[:, :, : size // 4] = 0
    pixels = VideoTransform(given)(wide)
    white = (1 - torch.tensor(published.mean)) / torch.tensor(published.std)
    black = -torch.tensor(published.mean) / torch.tensor(published.std)
    torch.testing.assert_close(pixels[0, :, size // 2, -1], white)
    torch.testing.assert_close(pixels[0, :, size // 2, 0], black)


def test_named_models() -> None:
    b16, l16 = (model_config(name, 12, "joint") for name in ("b16", "l16"))
    assert (b16.layers, b16.width, b16.heads, b16.embed_dim, b16.patches, b16.drop_path) == (12, 768, 12, 512, 196, 0.2)
    assert (l16.layers, l16.width, l16.heads, l16.embed_dim, l16.patches, l16.drop_path) == (
        24,
        1024,
        16,
        768,
        196,
        0.3,
    )
    assert create_frontend(TINY, method="none").schedule == MergeSchedule.identity(6, 12, 16, 0), "frames apart"
    assert create_frontend(TINY, method="none", mode="joint", num_frames=2).schedule.joint


def test_the_older_name_of_a_mode_is_accepted_and_noted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tempme_vl"):
        older = create_frontend(TINY, method="none", mode="clip", num_frames=2)
        assert "mode='clip' is the older name of mode='per_frame'" in caplog.text
    assert older.schedule == create_frontend(TINY, method="none", mode="per_frame", num_frames=2).schedule
