"""On a GPU: the CPU's tokens in every precision, no wait for the device, one graph, training that resumes.

Skipped where there is none; `make test-cuda` runs them alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from integrations import tiny
from parity.cases import Case, assert_close
from parity.test_tempme import CASES as GOLDENS
from parity.test_tempme import TOLERANCE, frontend_of, named_gradients
from recipes.runs import CASES, latest, losses
from torch import Tensor
from towers import random_video, tempme_schedule, tiny_frontend

from tempme_vl import MergeSchedule, VisualFrontend, create_frontend, kernels
from tempme_vl.integrations import compress

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CUDA = torch.device("cuda")
SCHEDULES = {
    "none": MergeSchedule.identity(6, 6, 17),
    "tome": MergeSchedule.tome(6, 6, 17, r=2),
    "tempme": tempme_schedule(),
}
TEMPME = {"r": 2, "merge_layers": (1, 2), "merge_frames": (2, 2), "cross_percent": 30, "intra_percent": 20}
TOWERS = {
    "open_clip": ("open_clip:tiny", {}),
    "umt": ("umt:tiny", {"mode": "per_frame"}),
    "timm": ("timm:vit_tiny_patch16_224", TEMPME),
}
every_schedule = pytest.mark.parametrize("method", SCHEDULES)
every_tower = pytest.mark.parametrize("name", TOWERS)


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """cuDNN's convolutions round float32 to TF32 by default, 1e-3 of their values."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def tower(name: str) -> tuple[VisualFrontend, Tensor]:
    """A front end with TempMe, and a batch of videos for it."""
    torch.manual_seed(0)
    model, options = TOWERS[name]
    frontend = create_frontend(model, None, "tempme", 4, **options).eval()
    return frontend, random_video(4, frontend.shape.image_size)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", GOLDENS, ids=str)
def test_reference_outputs_and_gradients(case: Case, dtype: torch.dtype) -> None:
    t = {name: tensor.to(CUDA) for name, tensor in case.tensors.items()}
    frontend = frontend_of(case, dtype).to(CUDA)
    output = frontend(t["in.video"].to(dtype), t["in.frame_mask"])
    (output.pooled * t["in.cotangent"].to(dtype)).sum().backward()
    assert_close(output.tokens.cpu(), case.tensors["out.tokens"], "tokens", TOLERANCE[dtype])
    assert_close(output.pooled.cpu(), case.tensors["out.video_emb"], "video embeddings", TOLERANCE[dtype])
    gradients = on_cpu(named_gradients(frontend, "grad."))
    expected = {f"grad.{name}": value for name, value in case.group("grad.").items()}
    assert len(expected) >= 4
    for name, value in expected.items():
        assert_close(gradients[name], value, name, TOLERANCE[dtype])


@every_tower
def test_every_tower_gives_the_tokens_of_the_cpu(name: str) -> None:
    frontend, video = tower(name)
    frontend, video = frontend.double(), video.double()
    expected = frontend(video, trace_source=True)
    actual = frontend.to(CUDA)(video.to(CUDA), trace_source=True)
    assert torch.equal(actual.source.cpu(), expected.source) and torch.equal(actual.size.cpu(), expected.size)
    for field in ("tokens", "pooled", "frames"):
        if getattr(expected, field) is not None:
            assert_close(getattr(actual, field).cpu(), getattr(expected, field), field, 1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", ["weights", "autocast"])
@every_tower
def test_half_precision_keeps_every_token(name: str, way: str, dtype: torch.dtype) -> None:
    """Which tokens merge may differ by rounding; none is lost, and the whole is the same within it."""
    frontend, video = tower(name)
    frontend, video = frontend.to(CUDA), video.to(CUDA)
    whole = frontend(video)
    if way == "weights":
        half = frontend.to(dtype)(video.to(dtype))
    else:
        with torch.autocast("cuda", dtype):
            half = frontend(video)
    assert half.size.dtype == torch.float32 and torch.equal(half.size.sum(1), whole.size.sum(1))
    assert half.tokens.isfinite().all()
    alike = torch.nn.functional.cosine_similarity(half.pooled.float(), whole.pooled, dim=-1)
    assert alike.min() > 0.99


def test_kernels_serve_what_is_on_a_gpu() -> None:
    x = torch.ones(1, device=CUDA)
    assert kernels.usable(x) and not kernels.usable(x.cpu())
    with kernels.plain():
        assert not kernels.usable(x)


@every_schedule
def test_encodes_without_waiting_for_the_device(method: str) -> None:
    """A CUDA graph records the kernels and fails where the host reads a value; replayed, it sees other pixels."""
    frontend = tiny_frontend(SCHEDULES[method]).to(CUDA).eval()
    video, other = random_video(6).to(CUDA), random_video(6).flip(0).to(CUDA)
    with torch.no_grad():
        for _ in range(2):  # libraries choose their kernels and workspaces outside the recording
            expected = frontend(other).pooled.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            pooled = frontend(video).pooled
    video.copy_(other)
    graph.replay()
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-6)


@every_schedule
def test_compiles_into_one_graph_of_the_same_tokens(method: str) -> None:
    torch.compiler.reset()
    frontend, video = tiny_frontend(SCHEDULES[method]).to(CUDA), random_video(6).to(CUDA)
    expected = frontend(video)
    actual = torch.compile(frontend, fullgraph=True)(video)
    torch.testing.assert_close(actual.tokens, expected.tokens, rtol=0, atol=1e-4)
    assert torch.equal(actual.size, expected.size)
    weight = frontend.embed.conv1.weight
    (wanted,) = torch.autograd.grad(expected.pooled.square().sum(), weight)
    (got,) = torch.autograd.grad(actual.pooled.square().sum(), weight)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


@pytest.mark.parametrize("fused", [True, False])
def test_the_same_bits_again_where_torch_is_told_to(fused: bool) -> None:
    """The plain form adds tokens up by atomics, as torch does unless it is told to be deterministic."""
    frontend, video = tiny_frontend(SCHEDULES["tempme"]).to(CUDA), random_video(6).to(CUDA)
    seen = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            with nullcontext() if fused else kernels.plain():
                output = frontend(video)
            gradients = torch.autograd.grad(
                output.pooled.square().sum(), list(frontend.parameters()), allow_unused=True
            )
            seen.append([output.tokens, *(gradient for gradient in gradients if gradient is not None)])
    finally:
        torch.use_deterministic_algorithms(False)
    for values in zip(*seen, strict=True):
        assert all(torch.equal(value, values[0]) for value in values)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_hosts_write_the_words_of_the_cpu(name: str) -> None:
    model, processor = tiny.build(name)
    torch.manual_seed(1)
    layers = 4 if name in ("LlavaOnevision", "InstructBlipVideo", "PerceptionLM") else 3
    compressed = compress(model.double(), processor, "tempme", tiny.FRAMES, **tiny.schedule("tempme", layers))
    text, videos = [tiny.ASK, "why " + tiny.ASK[5:]], [tiny.video(0), tiny.video(1)]
    seen = []
    for device in ("cpu", "cuda"):
        model.to(device)
        inputs = compressed.prepare(text, videos)
        with torch.no_grad():
            logits = compressed(**inputs).logits
        seen.append((logits[:, -1].cpu(), compressed.generate(**inputs, max_new_tokens=6, do_sample=False).cpu()))
    (expected, words), (actual, others) = seen
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)  # some compute positions in float32
    assert torch.equal(words, others)


@pytest.mark.parametrize("name", ["retrieval", "umt", "lora", "classifier", "decoder", "videollm"])
def test_recipes_train_in_bfloat16_stop_and_go_on(name: str, data: Path, tmp_path: Path) -> None:
    """Losses fall and the second half follows the first; the same bits are promised on a CPU alone."""
    case = CASES[name]
    whole, parts, log = tmp_path / "whole", tmp_path / "parts", tmp_path / "log"
    assert case.run(log, case.arguments(data, whole)) == [0], log.read_text()
    resumed = case.arguments(data, parts, resume="auto")
    assert case.run(log, [*resumed, "--max-steps", "7"]) == [0], log.read_text()
    assert latest(parts) == "step-00000007"
    assert case.run(log, resumed) == [0], log.read_text()
    assert [step for step, _ in losses(parts)] == [step for step, _ in losses(whole)]
    expected, actual = (torch.tensor([loss for _, loss in losses(run)]) for run in (whole, parts))
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)
    case.load(parts / "best")


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3", "zero3_offload"])
def test_every_zero_stage_takes_the_same_steps(stage: str, data: Path, tmp_path: Path) -> None:
    case, log = CASES["retrieval"], tmp_path / "log"
    runs = []
    for number, config in enumerate(("zero0", stage)):
        output = tmp_path / str(number)
        options = {"deepspeed_config": f"recipes/ds/{config}.json", "precision": "fp32", "epochs": 1}
        assert case.run(log, case.arguments(data, output, **options)) == [0], log.read_text()
        runs.append(torch.tensor([loss for _, loss in losses(output)]))
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-3, atol=1e-3)
