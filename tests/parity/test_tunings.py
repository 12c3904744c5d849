"""Ways of tuning: features, losses and gradients of the authors' code, and the same weights that train.

Cases are found in a folder (cases.py); what a weight of theirs is called here stands in a function for each method.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Case, assert_close, find
from torch import Tensor

from tempme_vl.merging import MergeSchedule
from tempme_vl.tasks.losses import contrastive_loss
from tempme_vl.tasks.retrieval import RetrievalModel
from tempme_vl.tuning import Tuning
from tempme_vl.tuning.plevu import Plevu
from tempme_vl.tuning.vop import Vop

HEAD = 16  # width of a head in all cases


def tolerances(case: Case) -> tuple[float, float]:
    """Absolute, of outputs; relative to the largest entry, of gradients."""
    absolute, relative = re.findall(r"\d+e-\d+", case.config["tolerance"])
    return float(absolute), float(relative)


def tuned_model(case: Case, tuning: Tuning, clip: dict[str, Tensor]) -> RetrievalModel:
    """A model on a case's CLIP, tuned; in evaluation.

    Args:
        clip: under OpenAI's names.
    """
    c = case.config["config"]
    schedule = MergeSchedule.identity(c["vl"], c["F"], (c["img"] // c["patch"]) ** 2 + 1)
    model = RetrievalModel.from_openai_state_dict(clip, c["vw"] // HEAD, schedule, c["tw"] // HEAD)
    model.tune(tuning)
    return model.eval()


def clip_of(case: Case, prefix: str) -> dict[str, Tensor]:
    """CLIP's weights of a case; what stands beside them under the same prefix has other names."""
    return {key: value.float() for key, value in case.group(f"w.{prefix}").items()}


def text_input(case: Case) -> dict[str, Tensor]:
    """Ids with their mask: the end token is the largest id, and padding follows it."""
    ids = case.tensors["in.text_ids"]
    return {"text_ids": ids, "text_mask": (torch.arange(ids.shape[1]) <= ids.argmax(1, keepdim=True)).long()}


def video_input(case: Case) -> dict[str, Tensor]:
    video = case.tensors["in.video"].float()
    mask = case.tensors.get("in.video_mask", torch.ones(video.shape[:2], dtype=torch.int64))
    return {"video": video, "frame_mask": mask}


def fill(model: RetrievalModel, given: dict[str, Tensor], place: Callable[[str], str]) -> dict[str, Any]:
    """Copies the trained weights of a case into a model, and gives its parameters by their names.

    What trains here must be what trains there, and nothing else.
    """
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    places = {name: place(name) for name in given}
    assert trained.keys() == set(places.values())
    with torch.no_grad():
        for name, value in given.items():
            trained[places[name]].copy_(value.float().view_as(trained[places[name]]))
    return {name: trained[own] for name, own in places.items()}


def check_gradients(case: Case, weights: dict[str, Any], prefix: str = "grad.") -> None:
    """Of all weights whose gradients the case has; of the large ones it has none."""
    relative, expected = tolerances(case)[1], case.group(prefix)
    assert expected and expected.keys() <= weights.keys()
    for name, gradient in expected.items():
        weight = weights[name]
        found = torch.zeros_like(weight) if weight.grad is None else weight.grad
        largest = float(gradient.abs().max())
        assert_close(found.view_as(gradient), gradient, f"gradient of {name}", relative * largest)


@pytest.mark.parametrize("case", find("tuning", "plevu*"), ids=str)
def test_plevu(case: Case) -> None:
    c, t = case.config["config"], case.tensors
    learnt = c["prefix"] + c["postfix"]
    model = tuned_model(case, Plevu(c["prefix"], c["postfix"], 2, c["temporal_heads"]), clip_of(case, "clipmodel."))
    names = [name for name in case.group("w.") if not name.startswith("clipmodel.")]

    def place(name: str) -> str:
        name = name.replace("temporalModelling.resblocks.", "frontend.tuned.blocks.")
        name = name.replace("in_proj_", "qkv.").replace("out_proj", "proj")
        name = name.replace("temporalEmbedding", "frontend.tuned.positions")
        return re.sub(r"^embedding", "text.embed.tuned.words", name)

    weights = fill(model, {name: t[f"w.{name}"] for name in names}, place)
    given = text_input(case) | video_input(case)
    given |= {name: given[name][:, : c["context"] - learnt] for name in ("text_ids", "text_mask")}  # all padding
    output, text = model.frontend(given["video"]), model.text(given["text_ids"], given["text_mask"])
    tolerance = tolerances(case)[0]
    assert_close(output.frames.mean(1), t["out.no_temporal.video_feat"], "frames", tolerance)
    assert_close(output.pooled, t["out.video_feat"], "video", tolerance)
    assert_close(text, t["out.text_feat"], "text", tolerance)

    features = model(given)
    logits = features["scale"] * features["video"] @ features["text"].T
    assert_close(logits, t["out.logits_video_by_text"], "logits", tolerance)
    F.cross_entropy(logits, torch.arange(len(logits))).backward()  # a video's own caption, among more texts than videos
    check_gradients(case, weights)
    rows = weights["embedding.weight"].grad.abs().sum(1).nonzero().flatten()
    assert rows.tolist() == case.config["text_prompt_rows_with_gradient"]


@pytest.mark.parametrize("case", find("tuning", "vop_base*"), ids=str)
def test_vop(case: Case) -> None:
    c, t = case.config["config"], case.tensors
    model = tuned_model(case, Vop(c["vp"], c["tpp"], c["tps"]), clip_of(case, "clip."))
    visual, texts = (t[f"w.{side}_prompt_learner.{side}_prompts"] for side in ("visual", "text"))

    def place(name: str) -> str:
        side, layer = name.split()
        if side == "visual":
            return f"frontend.blocks.{layer}.block.tuned.prompts.weight"
        return "text.embed.tuned.prompts.weight" if layer == "0" else f"text.blocks.{layer}.tuned.prompts.weight"

    given = {f"visual {layer}": rows for layer, rows in enumerate(visual)}
    given |= {f"text {layer}": rows for layer, rows in enumerate(texts)}
    weights = fill(model, given, place)
    batch = text_input(case) | video_input(case)
    output, text = model.frontend(batch["video"]), model.text(batch["text_ids"], batch["text_mask"])
    tolerance = tolerances(case)[0]
    assert_close(F.normalize(output.frames, dim=-1), t["out.frame_feat"], "frames", tolerance)
    assert_close(output.pooled, t["out.video_feat"], "video", tolerance)
    assert_close(F.normalize(text, dim=-1), t["out.text_feat"], "text", tolerance)

    features = model(batch)
    assert_close(features["text"] @ features["video"].T, t["out.sims"], "similarities", tolerance)
    loss = contrastive_loss(features["video"], features["text"], features["scale"])
    assert_close(loss, t["out.loss"], "loss", 10 * tolerance)
    loss.backward()
    for side in ("visual", "text"):
        expected = t[f"grad.{side}_prompt_learner.{side}_prompts"]
        gradient = torch.stack([weight.grad for name, weight in weights.items() if name.startswith(side)])
        largest = float(expected.abs().max())
        assert_close(gradient.view_as(expected), expected, f"gradient of {side} prompts", tolerances(case)[1] * largest)
