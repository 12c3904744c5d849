"""X-Pool equals the original implementation on seeded weights; MaxSim and the sigmoid loss equal their formulas."""

from __future__ import annotations

import pytest
import torch
from parity.cases import Case, assert_close, find
from torch import Tensor

from tempme_vl.tasks.losses import sigmoid_loss
from tempme_vl.tasks.similarity.max_sim import max_sim
from tempme_vl.tasks.similarity.xpool import XPoolHead, XPoolOptions

DTYPES = {torch.float64: 3e-6, torch.float32: 2e-5}
x_pool = pytest.mark.parametrize("case", find("tuning", "xpool*"), ids=str)
late = pytest.mark.parametrize("case", find("tuning", "maxsim*"), ids=str)


def head_of(case: Case, dtype: torch.dtype) -> XPoolHead:
    config = case.config["config"]
    head = XPoolHead(config["embed_dim"], XPoolOptions(heads=config["heads"], dropout=0.0)).to(dtype)
    weights = {name: value.to(dtype) for name, value in case.group("w.pool_frames.").items()}
    head.load_state_dict(weights)
    return head


def inputs(case: Case, dtype: torch.dtype, of: str = "") -> tuple[Tensor, Tensor]:
    text, video = (case.tensors[f"in.{of}{side}_embeds"].to(dtype).requires_grad_() for side in ("text", "video"))
    return text, video


@x_pool
@pytest.mark.parametrize("dtype", DTYPES)
def test_x_pool_and_its_gradients(case: Case, dtype: torch.dtype) -> None:
    head, (text, video) = head_of(case, dtype), inputs(case, dtype)
    log_scale = case.tensors["in.logit_scale"].to(dtype).requires_grad_()
    assert_close(head.pool(text, video), case.tensors["out.pooled"], "pooled videos", DTYPES[dtype])
    parts = {"text": text}, {"video": video}
    assert_close(head.similarity(*parts), case.tensors["out.sims"], "similarities", DTYPES[dtype])
    loss = head.loss(*parts, log_scale.exp())
    assert_close(loss, case.tensors["out.loss"], "loss", DTYPES[dtype])
    loss.backward()
    found = {f"pool_frames.{name}": p.grad for name, p in head.named_parameters()}
    found |= {"text_embeds": text.grad, "video_embeds": video.grad, "logit_scale": log_scale.grad}
    expected = case.group("grad.")
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # of the keys' bias only rounding is left, which softmax hides
        largest = 1.0 if name.endswith("k_proj.bias") else gradient.abs().max().item()
        assert_close(found[name], gradient, f"gradient of {name}", 1e-4 * largest)


@x_pool
@torch.no_grad()
def test_x_pool_of_videos_with_several_captions(case: Case) -> None:
    text, video = inputs(case, torch.float64, "multi.")
    found = head_of(case, torch.float64).similarity({"text": text}, {"video": video})
    assert_close(found, case.tensors["out.multi.sims"], "similarities", 3e-6)


@late
@pytest.mark.parametrize("kind", ["frame", "video"])
def test_max_sim_and_the_sigmoid_loss(case: Case, kind: str) -> None:
    def unit(name: str) -> Tensor:
        return torch.nn.functional.normalize(case.tensors[f"in.{name}_tokens"].double(), dim=-1)

    masks = {side: case.tensors[f"in.{side}_mask"] for side in ("text", kind)}
    total = max_sim(unit("text"), masks["text"], unit(kind), masks[kind])
    mean = max_sim(unit("text"), masks["text"], unit(kind), masks[kind], mean=True)
    assert_close(total, case.tensors[f"out.sum_max_sim_{kind}"], "sum", 1e-5)
    assert_close(mean, case.tensors[f"out.mean_max_sim_{kind}"], "mean", 1e-5)
    pairs, config = min(mean.shape), case.config["config"]
    loss = sigmoid_loss(config["t"] * mean[:pairs, :pairs] + config["b"])
    assert_close(loss, case.tensors[f"out.sigmoid_loss_per_row_{kind}"], "loss", 1e-5)
    assert_close(loss / pairs, case.tensors[f"out.sigmoid_loss_mean_{kind}"], "loss a pair", 1e-5)
