"""The front end as a module: counts, precision, checkpointing, compiling, copying, masks and refusals."""

from __future__ import annotations

import pickle
from copy import deepcopy

import numpy as np
import pytest
import timm
import torch
from counting import Counter
from torch import Tensor, nn
from towers import TINY, every_way, random_video, small_clip, tempme_schedule, tiny_frontend, way

from tempme_vl import FrontendOutput, MergeSchedule, VisualFrontend, create_frontend
from tempme_vl.backbones.base import Backbone, BlockAdapter, Pool, TowerShape
from tempme_vl.backbones.open_clip import load_clip
from tempme_vl.backbones.open_clip_blocks import visual_backbone
from tempme_vl.backbones.timm import backbone_of as timm_backbone
from tempme_vl.data.transforms import CLIP_MEAN, CLIP_STD
from tempme_vl.pooling import masked_mean
from tempme_vl.state import AttentionContext

SCHEDULES = [
    tempme_schedule(),
    MergeSchedule.tempme(6, 6, 17, 2, (2, 3, 5), (1, 3, 2), 100, 100),
    *(schedule for schedule in every_way(others=False) if schedule.method != "tempme"),
]
FIELDS = ("tokens", "pooled", "size", "frames", "source")


def assert_equal(actual: FrontendOutput, expected: FrontendOutput) -> None:
    for field in FIELDS:
        a, b = getattr(actual, field), getattr(expected, field)
        assert (a is None and b is None) or torch.equal(a, b), field


def gradients(frontend: VisualFrontend, output: FrontendOutput) -> dict[str, Tensor]:
    frontend.zero_grad()
    (output.pooled.square().sum() + output.tokens.float().mean()).backward()
    return {name: p.grad.clone() for name, p in frontend.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=way)
def test_predicted_counts_are_the_real_ones(schedule: MergeSchedule) -> None:
    frontend, seen = tiny_frontend(schedule), []
    for block in frontend.blocks:
        block.register_forward_hook(lambda _, __, state: seen.append((state.num_clips, *state.x.shape)))
    attended = []
    for block in frontend.blocks:
        block.block.attn.register_forward_pre_hook(lambda _, inputs: attended.append(inputs[0].shape[1]))
    output = frontend(random_video(6), trace_source=True)
    assert [(clips, tokens) for clips, _, tokens, _ in seen] == schedule.token_counts
    assert all(rows == 2 * clips for clips, rows, _, _ in seen)
    assert attended == [count.attention for count in schedule.layer_counts]
    assert output.tokens.shape == (2, schedule.output_tokens, 64)
    last = schedule.layer_counts[-1]
    assert output.pooled.shape == (2, 64) and output.frames.shape == (2, last.clips * (last.prefix - last.inserted), 64)
    held, dropped = output.source[0][output.source[0] >= 0], (output.source < 0).sum(1)
    assert torch.equal(output.size.sum((1, 2)).long() + dropped, torch.full((2,), 6 * 17))
    assert torch.equal(held.bincount(minlength=schedule.output_tokens), output.size[0].flatten().long())


@pytest.mark.parametrize("schedule", SCHEDULES[:2], ids=way)  # of the others, tests/merging/test_every_method.py
def test_videos_of_a_batch_do_not_meet(schedule: MergeSchedule) -> None:
    frontend, video = tiny_frontend(schedule).double(), random_video(6, dtype=torch.float64)
    both, second = frontend(video), frontend(video[1:])
    torch.testing.assert_close(both.tokens[1:], second.tokens, rtol=0, atol=1e-12)
    torch.testing.assert_close(both.pooled[1:], second.pooled, rtol=0, atol=1e-12)


def test_tracing_changes_nothing_else() -> None:
    frontend, video = tiny_frontend(tempme_schedule()), random_video(6)
    traced, plain = frontend(video, trace_source=True), frontend(video)
    assert plain.source is None
    assert torch.equal(traced.tokens, plain.tokens) and torch.equal(traced.pooled, plain.pooled)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=way)
def test_checkpointing_is_exact(schedule: MergeSchedule) -> None:
    plain, video = tiny_frontend(schedule), random_video(6)
    checkpointed = deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    expected, actual = plain(video, trace_source=True), checkpointed(video, trace_source=True)
    assert_equal(actual, expected)
    expected_grads, actual_grads = gradients(plain, expected), gradients(checkpointed, actual)
    assert expected_grads.keys() == actual_grads.keys() == dict(plain.named_parameters()).keys()
    for name, gradient in expected_grads.items():
        assert torch.equal(actual_grads[name], gradient), name


def test_checkpointing_computes_every_block_twice_and_only_when_training() -> None:
    frontend, calls = tiny_frontend(tempme_schedule()), []
    frontend.set_grad_checkpointing()
    frontend.blocks[3].block.attn.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        frontend(random_video(6))
    assert len(calls) == 1
    gradients(frontend, frontend(random_video(6)))
    assert len(calls) == 3


@pytest.mark.parametrize("schedule", SCHEDULES, ids=way)
def test_bfloat16_autocast(schedule: MergeSchedule) -> None:
    frontend, video = tiny_frontend(schedule), random_video(6)
    expected = frontend(video)
    frontend.set_grad_checkpointing()
    with torch.autocast("cpu", torch.bfloat16):
        output = frontend(video)
    assert output.size.dtype == torch.float32 and torch.equal(output.size.sum(1), expected.size.sum(1))
    cosine = torch.cosine_similarity(output.pooled.float(), expected.pooled, dim=-1)
    assert (cosine > 0.99).all(), cosine
    grads = gradients(frontend, output)
    assert grads.keys() == dict(frontend.named_parameters()).keys()
    assert all(g.isfinite().all() for g in grads.values())
    assert frontend.embed.conv1.weight.grad.abs().max() > 0


@pytest.mark.parametrize("schedule", SCHEDULES, ids=way)
def test_bfloat16_weights(schedule: MergeSchedule) -> None:
    frontend, video = tiny_frontend(schedule), random_video(6)
    expected = frontend(video)
    output = frontend.bfloat16()(video)
    assert output.tokens.dtype == torch.bfloat16 and output.size.dtype == torch.float32
    assert torch.equal(output.size.sum(1), expected.size.sum(1))
    cosine = torch.cosine_similarity(output.pooled.float(), expected.pooled, dim=-1)
    assert (cosine > 0.99).all(), cosine
    assert all(gradient.isfinite().all() for gradient in gradients(frontend, output).values())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=way)
def test_float64_agrees_with_float32(schedule: MergeSchedule) -> None:
    frontend, video = tiny_frontend(schedule), random_video(6)
    single = frontend(video, trace_source=True)
    double = frontend.double()(video.double(), trace_source=True)
    assert double.tokens.dtype == double.pooled.dtype == double.size.dtype == torch.float64
    assert torch.equal(double.source, single.source)
    torch.testing.assert_close(single.tokens.double(), double.tokens, rtol=0, atol=1e-5)
    torch.testing.assert_close(single.pooled.double(), double.pooled, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiles_into_one_graph(backend: str) -> None:
    torch.compiler.reset()
    schedule = MergeSchedule.tempme(3, 6, 17, 2, (1,), (3,), 40, 20)  # each of its steps once
    frontend, video = VisualFrontend(visual_backbone(small_clip(layers=3).visual), schedule), random_video(6)
    frontend.init_clip_positions(0.1)
    compiled = torch.compile(frontend, backend=backend, fullgraph=True)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    expected, actual = frontend(video, mask, trace_source=True), compiled(video, mask, trace_source=True)
    for field in FIELDS:
        torch.testing.assert_close(getattr(actual, field), getattr(expected, field), rtol=0, atol=1e-6)
    expected_grads, actual_grads = gradients(frontend, expected), gradients(frontend, actual)
    for name, gradient in expected_grads.items():
        torch.testing.assert_close(actual_grads[name], gradient, rtol=1e-4, atol=1e-5)
    with torch.compiler.set_stance("fail_on_recompile"):  # one graph, and no second one for other pixels
        compiled(random_video(6) + 1, mask, trace_source=True)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", every_way(layers=2, frames=2), ids=way)
def test_every_method_compiles_into_one_graph(schedule: MergeSchedule) -> None:
    torch.compiler.reset()
    frontend = VisualFrontend(visual_backbone(small_clip(layers=2, width=64).visual), schedule)
    compiled = torch.compile(frontend, backend="eager", fullgraph=True)
    expected, actual = frontend(random_video(2), trace_source=True), compiled(random_video(2), trace_source=True)
    for field in FIELDS:
        torch.testing.assert_close(getattr(actual, field), getattr(expected, field), rtol=0, atol=1e-6)
    actual.pooled.sum().backward()
    assert all(p.grad is not None for p in frontend.parameters())


@pytest.mark.parametrize("schedule", every_way(), ids=way)
def test_every_method_comes_back_from_a_folder(schedule: MergeSchedule, tmp_path) -> None:
    frontend, video = tiny_frontend(schedule), random_video(6)
    frontend.save_pretrained(tmp_path)
    loaded = VisualFrontend.from_pretrained(tmp_path)
    assert loaded.schedule == schedule
    assert_equal(loaded.eval()(video, trace_source=True), frontend.eval()(video, trace_source=True))


def test_exports_with_its_output() -> None:
    """An exported program gives a `FrontendOutput`."""
    schedule = MergeSchedule.tempme(2, 4, 17, 2, (1,), (2,), 40, 20)
    frontend, video = VisualFrontend(visual_backbone(small_clip(layers=2).visual), schedule).eval(), random_video(4)
    expected = frontend(video)
    with torch.no_grad():
        program = torch.export.export(frontend, (video,))
        output = program.module()(video)
    assert isinstance(output, FrontendOutput) and output.source is None
    for field in FIELDS[:-1]:
        torch.testing.assert_close(getattr(output, field), getattr(expected, field), rtol=0, atol=1e-6)


def test_an_output_is_a_tree_of_tensors() -> None:
    frontend, video = tiny_frontend(tempme_schedule()), random_video(6)
    for trace in (False, True):
        output = frontend(video, trace_source=trace)
        leaves, spec = torch.utils._pytree.tree_flatten(output)
        assert_equal(torch.utils._pytree.tree_unflatten(leaves, spec), output)
        doubled = torch.utils._pytree.tree_map(lambda x: 2 * x if isinstance(x, Tensor) else x, output)
        assert torch.equal(doubled.size, 2 * output.size)


@pytest.mark.parametrize("copy", [deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_are_equal_and_independent(copy) -> None:
    frontend, video = tiny_frontend(tempme_schedule()), random_video(6)
    copied = copy(frontend)
    assert_equal(copied(video, trace_source=True), frontend(video, trace_source=True))
    nn.init.zeros_(copied.embed.conv1.weight)
    assert not torch.equal(copied(video).pooled, frontend(video).pooled)


def test_every_parameter_is_registered_once() -> None:
    frontend = tiny_frontend(tempme_schedule())
    names = [name for name, _ in frontend.named_parameters(remove_duplicate=False)]
    assert len(names) == len(list(frontend.parameters())) == len(frontend.state_dict())


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_pooled_is_the_masked_mean_of_unit_frames(dtype: torch.dtype) -> None:
    frontend, video = tiny_frontend(tempme_schedule()), random_video(6)
    mask = torch.tensor([[1, 1, 0, 1, 0, 0], [0] * 6])
    output = frontend(video, mask.to(dtype))
    unit = nn.functional.normalize(output.frames, dim=-1)
    torch.testing.assert_close(output.pooled[0], unit[0, [0, 1, 3]].mean(0))
    assert torch.equal(output.pooled[1], torch.zeros(64)), "no real frame at all"
    torch.testing.assert_close(frontend(video).pooled, unit.mean(1))
    assert torch.equal(frontend(video, 3 * mask.to(torch.float32)).pooled, output.pooled), "nonzero is real"
    assert torch.equal(frontend(video).tokens, output.tokens), "the mask is used for pooling only"


def test_masked_mean_passes_no_gradient_to_padding() -> None:
    frames = torch.randn(2, 3, 4, requires_grad=True)
    masked_mean(frames, torch.tensor([[1, 1, 0], [0, 0, 0]])).sum().backward()
    assert frames.grad[0, :2].ne(0).all() and not frames.grad[0, 2].any() and not frames.grad[1].any()


def counted_frontends() -> dict[str, VisualFrontend]:
    torch.manual_seed(0)
    quick = small_clip(quick_gelu=True, mlp_ratio=3.0, head_width=8).visual
    siglip = timm.create_model(
        "vit_base_patch16_siglip_224", num_classes=0, img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2
    )
    pooled, _ = timm_backbone(siglip)
    elsewhere = ("evit", "diffrate", "sta")  # what their steps multiply: tests/merging/test_methods.py
    made = {one.method: tiny_frontend(one) for one in SCHEDULES if one.method not in elsewhere}
    made["quick"] = VisualFrontend(visual_backbone(quick), MergeSchedule.tempme(4, 6, 17, 2, (1, 2), (2, 3), 40, 20))
    made["joint"] = create_frontend("umt:tiny", method="tome", num_frames=6, r=9, mode="joint")
    made["apart"] = create_frontend("umt:tiny", num_frames=6, r=2, merge_layers=(2, 4), merge_frames=(2, 3), **PERCENT)
    made["attention"] = VisualFrontend(pooled, MergeSchedule.identity(3, 6, 16, 0))
    made["attention, merged"] = VisualFrontend(pooled, MergeSchedule.tempme(3, 6, 16, 2, (1,), (3,), 40, 20, prefix=0))
    return made


def test_gflops_are_those_of_the_modules_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every term by itself: the paper's numbers alone would let an error in a small one pass."""
    for name, frontend in counted_frontends().items():
        with monkeypatch.context() as patch, torch.no_grad():
            counter = Counter(frontend, patch)
            frontend(random_video(6, videos=1))
        last = frontend.schedule.layer_counts[-1]
        embedded = last.clips * last.prefix if frontend.shape.pooling == "cls" else 6
        projection = embedded * frontend.shape.width * frontend.shape.embed_dim  # by convention, there or not
        counted = (counter.total + projection) / 1e9
        assert frontend.gflops() == pytest.approx(counted, rel=1e-12), name


def test_clip_positions_by_layer() -> None:
    frontend = create_frontend(TINY, num_frames=6, r=2, merge_layers=(2, 4), merge_frames=(2, 3), **PERCENT)
    assert {layer: tuple(p.shape) for layer, p in frontend.clip_positions.items()} == {"2": (6, 64), "4": (3, 64)}
    assert not any(p.any() for p in frontend.clip_positions.values())
    frontend.init_clip_positions(0.5)
    for position in frontend.clip_positions.values():
        assert position.requires_grad and 0.3 < position.std() < 0.7
    assert create_frontend(TINY, method="none").clip_positions == {}


PERCENT = {"cross_percent": 40, "intra_percent": 20}


def test_create_frontend_by_name() -> None:
    torch.manual_seed(0)
    none = create_frontend(TINY, method="none", num_frames=3)
    assert none.schedule == MergeSchedule.identity(6, 3, 17)
    tome = create_frontend(TINY, method="tome", num_frames=3, r=2)
    assert tome.schedule == MergeSchedule.tome(6, 3, 17, 2)
    tempme = create_frontend(
        TINY, num_frames=6, clip_position_std=0.5, r=2, merge_layers=(2, 4), merge_frames=(2, 3), **PERCENT
    )
    assert tempme.schedule == tempme_schedule()
    assert all(p.any() for p in tempme.clip_positions.values())
    assert tempme.gflops() < tome.gflops() * 2 < none.gflops() * 2


@pytest.mark.parametrize(
    ("shape", "mask", "message"),
    [
        ((2, 5, 3, 32, 32), None, r"= \(6, 3, 32, 32\); got \(2, 5, 3, 32, 32\). Sample 6 frames"),
        ((2, 6, 3, 16, 32), None, r"got \(2, 6, 3, 16, 32\). Sample 6 frames and resize them to 32 px"),
        ((2, 6, 1, 32, 32), None, r"expected video \(B, F, 3, H, W\)"),
        ((6, 3, 32, 32), None, r"got \(6, 3, 32, 32\)"),
        ((2, 6, 3, 32, 32), (2, 5), r"expected frame_mask \(2, 6\); got \(2, 5\)"),
    ],
)
def test_wrong_input(shape: tuple[int, ...], mask: tuple[int, ...] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_frontend(tempme_schedule())(torch.zeros(shape), None if mask is None else torch.ones(mask))


@pytest.mark.parametrize(
    "schedule",
    [MergeSchedule.identity(5, 6, 17), MergeSchedule.identity(6, 6, 18), MergeSchedule.identity(6, 6, 17, 0)],
)
def test_schedule_of_another_tower(schedule: MergeSchedule) -> None:
    with pytest.raises(
        ValueError, match=r"has 6 layers and 17 tokens a frame \(1 CLS\), frames apart; the schedule was made for"
    ):
        tiny_frontend(schedule)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 5}, r"5 frames do not divide by the joins \[2, 3\]; make the frames a multiple of 6"),
        ({"merge_layers": (2, 6)}, r"within 0..5 for a tower of 6 layers"),
        ({"method": "tomme"}, r"unknown method 'tomme'"),
        ({"method": "tome"}, r"'tome' does not know the options cross_percent, intra_percent, merge_frames"),
        ({"cross_percent": 0.4}, r"whole number of percent"),
    ],
)
def test_wrong_options(options: dict, message: str) -> None:
    good = {"num_frames": 6, "r": 2, "merge_layers": (2, 4), "merge_frames": (2, 3), **PERCENT}
    with pytest.raises(ValueError, match=message):
        create_frontend(TINY, **{**good, **options})


def test_a_front_end_of_unknown_origin_cannot_be_saved(tmp_path) -> None:
    clip = load_clip("tiny").clip
    frontend = VisualFrontend(visual_backbone(clip.visual), tempme_schedule())
    with pytest.raises(ValueError, match=r"to save a front end, give VisualFrontend the `config`"):
        frontend.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_other_whole_numbers_are_refused(dtype: torch.dtype) -> None:
    frontend = tiny_frontend(tempme_schedule())
    with pytest.raises(ValueError, match=rf"normalised frames of a floating dtype, or uint8 of 0 to 255; got {dtype}"):
        frontend(torch.ones(2, 6, 3, 32, 32, dtype=dtype))


def test_uint8_is_normalised_by_the_front_end() -> None:
    frontend = tiny_frontend(tempme_schedule()).eval()
    frames = np.random.default_rng(0).integers(0, 256, (2, 6, 32, 32, 3), np.uint8)
    expected = torch.stack([frontend.preprocess(video) for video in frames])
    by_hand = (frames / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    torch.testing.assert_close(expected, torch.from_numpy(by_hand).float().permute(0, 1, 4, 2, 3), rtol=0, atol=1e-6)
    raw = torch.from_numpy(frames).permute(0, 1, 4, 2, 3)
    assert torch.equal(frontend(raw).tokens, frontend(expected).tokens)
    with pytest.raises(ValueError, match="normalised by the tower's `config`"):
        VisualFrontend(visual_backbone(load_clip("tiny").clip.visual), tempme_schedule())(raw)


class _RegisterEmbed(nn.Module):
    """A CLS token, two registers and 16 patches a frame: random patches, the prefix in multiples of their mean."""

    def forward(self, images: Tensor) -> Tensor:
        patches = nn.functional.unfold(images, 8, stride=8).transpose(1, 2)[..., :WIDTH]
        mean = patches.mean(1, keepdim=True)
        return torch.cat([mean, 2 * mean, 3 * mean, patches], dim=1)


class _IdleBlock(BlockAdapter):
    """Adds nothing, so that every output token is a mean of input tokens."""

    def attention_branch(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, AttentionContext]:
        return torch.zeros_like(x), AttentionContext(x.unflatten(-1, (2, -1)).transpose(1, 2))

    def mlp_branch(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class _MeanBySize(nn.Module):
    """An attention pool that attends to all tokens alike."""

    def forward(self, x: Tensor, size: Tensor | None) -> Tensor:
        size = torch.ones_like(x[..., :1]) if size is None else size
        return (x * size).sum(1) / size.sum(1)


WIDTH, PREFIX = 8, 3
REGISTERS = {"layers": 4, "frames": 6, "tokens": 19, "prefix": PREFIX}
WITH_REGISTERS = [
    MergeSchedule.identity(**REGISTERS),
    MergeSchedule.tome(**REGISTERS, r=3),
    MergeSchedule.tempme(**REGISTERS, r=2, merge_layers=(1, 2), merge_frames=(2, 3), **PERCENT),
    MergeSchedule.tempme(**REGISTERS, r=2, merge_layers=(2,), merge_frames=(3,), **PERCENT),
    MergeSchedule.tempme(**REGISTERS, r=0, merge_layers=(1, 2), merge_frames=(2, 3), cross_percent=0, intra_percent=0),
]


def register_frontend(schedule: MergeSchedule, pool: Pool | None) -> VisualFrontend:
    head = _MeanBySize() if pool == "attention" else nn.Identity()
    shape = TowerShape(32, 8, WIDTH, heads=2, embed_dim=WIDTH, num_prefix=PREFIX, pool=pool)
    blocks: list[BlockAdapter] = [_IdleBlock() for _ in schedule.plan]
    return VisualFrontend(Backbone(_RegisterEmbed(), blocks, nn.Identity(), head, shape), schedule).double()


@pytest.mark.parametrize("pool", [None, "cls", "mean", "attention"])
@pytest.mark.parametrize("schedule", WITH_REGISTERS)
def test_registers_beside_the_cls_token(schedule: MergeSchedule, pool: Pool | None) -> None:
    """Neither merges; a frame's embedding is its CLS token alone, or the mean of its (or its clip's) patches alone."""
    frontend, video = register_frontend(schedule, pool), random_video(6, dtype=torch.float64)
    output, last = frontend(video, trace_source=True), schedule.layer_counts[-1]
    assert output.tokens.shape == (2, schedule.output_tokens, WIDTH)
    tokens, size = (t.unflatten(1, (last.clips, -1)) for t in (output.tokens, output.size))
    assert (size[:, :, : last.prefix] == 1).all() and last.prefix * last.clips == PREFIX * 6
    start = _RegisterEmbed()(video.flatten(0, 1)).unflatten(0, (2, 6))
    prefix = tokens[:, :, : last.prefix].reshape(2, 6, PREFIX, WIDTH)
    torch.testing.assert_close(prefix, start[:, :, :PREFIX], rtol=0, atol=1e-12)
    kept = (output.source.unflatten(1, (6, -1))[0, :, :PREFIX] % last.mlp).flatten().view(last.clips, -1)
    assert torch.equal(kept, torch.arange(last.prefix).expand(last.clips, -1))

    merged = any(plan.before or plan.after for plan in schedule.plan)
    whole_clips = pool in ("mean", "attention") and merged
    # the CLS token is the mean of its frame's patches here, and clips hold as many patches of each frame
    expected = start[:, :, 0].unflatten(1, (last.clips, -1)).mean(2) if whole_clips else start[:, :, 0]
    torch.testing.assert_close(output.frames, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", WITH_REGISTERS)
def test_patches_without_cls_tokens_and_registers(schedule: MergeSchedule) -> None:
    frontend = register_frontend(schedule, None)
    output = frontend(random_video(6, dtype=torch.float64), trace_source=True)
    patches, size = frontend.patches(output.tokens), frontend.patches(output.size)
    assert patches.shape == (2, schedule.output_tokens - PREFIX * 6, WIDTH) and (size.sum(1) == 6 * 16).all()
    numbers = frontend.patches(torch.arange(schedule.output_tokens).expand(2, -1))
    assert torch.equal(output.tokens[0, numbers[0]], patches[0])
    held = output.source.unflatten(1, (6, -1))[0, :, PREFIX:].flatten().unique()
    assert torch.equal(held, numbers[0]), "exactly what patches went into"


def test_patches_of_a_tower_without_cls_tokens_are_all_tokens() -> None:
    frontend = create_frontend("umt:tiny", method="tome", num_frames=6, r=2)
    output = frontend(random_video(6))
    assert torch.equal(frontend.patches(output.tokens), output.tokens)


def test_pooling_by_default() -> None:
    assert (
        TowerShape(32, 8, 64, 4, 64).pooling == "cls" and TowerShape(32, 8, 64, 4, 64, num_prefix=0).pooling == "mean"
    )
    assert TowerShape(32, 8, 64, 4, 64, pool="mean").pooling == "mean"
