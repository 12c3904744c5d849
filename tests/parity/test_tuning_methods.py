"""Ways of tuning: features, losses and gradients of the authors' code, and the same weights that train.

Cases are found in a folder (cases.py); what a weight of theirs is called here stands in a function for each method.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from cases import Case, assert_close, find
from torch import Tensor

from tempme_vl.merging import MergeSchedule
from tempme_vl.tasks.losses import contrastive_loss
from tempme_vl.tasks.retrieval import RetrievalModel
from tempme_vl.tuning import Tuning, find_tuning
from tempme_vl.tuning.dgl import Feature
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


def gradients(weights: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in weights.items()}


def check_gradients(case: Case, found: dict[str, Tensor], prefix: str = "grad.") -> None:
    """Of all weights whose gradients the case has; of the large ones it has none."""
    relative, expected = tolerances(case)[1], case.group(prefix)
    assert expected and expected.keys() <= found.keys()
    for name, gradient in expected.items():
        largest = float(gradient.abs().max())
        assert_close(found[name].view_as(gradient), gradient, f"gradient of {name}", relative * largest)


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
    check_gradients(case, gradients(weights))
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


DGL_CASES = [(case, variant) for case in find("tuning", "dgl*") for variant in case.config["info"]]


@pytest.mark.parametrize(("case", "variant"), DGL_CASES, ids=str)
def test_dgl(case: Case, variant: str) -> None:
    c, t = case.config["config"], case.tensors
    kind, feature = variant.split(".")
    feature = feature if feature in get_args(Feature) else "average_both"  # whatever they call it
    tuning = find_tuning("dgl", {"prompts": kind, "tokens": c["lpl"], "text_tokens": c["tpl"], "feature": feature})
    theirs = case.config["info"][variant]["trainable"]
    given = {name: t[f"w.{name}"] for name in theirs}
    added = {name for name in case.group("w.") if "rompt" in name}
    clip = {name.removeprefix("clip."): value.float() for name, value in case.group("w.").items() if name not in added}
    model = tuned_model(case, tuning, clip)

    def place(name: str) -> str:
        name = name.removeprefix("clip.")
        if name == "visual.prompt_embeddings":
            return "frontend.tuned.video.weight"
        for found, own in (
            (r"visual_prompt_embedding", "local"),
            (r"unified_prompt_embedding\.weight", "rows"),
            (r"prefix_text_prompt_proj_layer", "before"),
            (r"postfix_text_prompt_proj_layer", "behind"),
            (r"unified_prompt_mlp\.c_fc", "to_text.0"),
            (r"unified_prompt_mlp\.c_proj", "to_text.2"),
            (r"PromptTransformer\.resblocks\.0", "block"),
            (r"in_proj_", "qkv."),
            (r"out_proj", "proj"),
        ):
            name = re.sub(found, own, name)
        return f"frontend.tuned.prompts.{name}"

    weights = fill(model, given, place)
    seen: list[Tensor] = []
    model.frontend.tuned.register_forward_hook(lambda module, args, result: seen.append(args[2]))
    batch = {"text_ids": t["in.text_ids"], "text_mask": t["in.text_mask"], **video_input(case)}
    output = model.frontend(batch["video"], batch["frame_mask"])
    text, tolerance = model.text(batch["text_ids"], batch["text_mask"]), tolerances(case)[0]
    assert_close(text, t[f"out.{kind}.text_feat"].squeeze(1), "text", tolerance)
    hidden = t[f"out.{kind}.hidden_projected"]
    assert_close(seen[0], hidden[:, : c["lpl"]], "global prompts", tolerance)
    own = model.frontend.head(model.frontend.norm(output.tokens)).unflatten(1, (c["F"], -1))
    frames = hidden[:, c["lpl"] :].unflatten(1, (-1, c["F"])).transpose(1, 2)  # with local prompts behind CLS
    assert_close(own, torch.cat([frames[:, :, :1], frames[:, :, 1 + c["lpl"] :]], 2), "tokens", tolerance)
    expected = t[f"out.{variant}.video_feat"]
    assert_close(output.pooled.view_as(expected), expected, "video", tolerance)

    features = model(batch)
    logits = features["scale"] * features["text"] @ features["video"].T
    assert_close(logits, t[f"out.{variant}.logits_eval"], "logits", 10 * tolerance)
    loss = contrastive_loss(features["video"], features["text"], features["scale"])
    assert_close(loss, t[f"out.{variant}.loss"], "loss", 10 * tolerance)
    loss.backward()
    check_gradients(case, gradients(weights), f"grad.{variant}.")
    none = {name for name, weight in weights.items() if weight.grad is None or not weight.grad.any()}
    assert none == set(case.config["info"][variant]["zero_gradient"])


MV_CASES = [(case, variant) for case in find("tuning", "mv_adapter*") for variant in case.config["variants"]]


def merged_projections(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values of CLIP in one weight, and the names of its norms, as CLIP has them."""
    named = {}
    for name, value in weights.items():
        if ".attn.q_proj." in name:
            parts = [weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            named[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
        elif not re.search(r"attn\.[kv]_proj", name):
            named[name.replace("attn.ln.", "ln_1.").replace("mlp.ln.", "ln_2.")] = value
    return named


def split_projections(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """The other way."""
    weights = {}
    for name, value in named.items():
        if "adapter" in name or "attn.in_proj_" not in name:
            norm = {} if "adapter" in name else {"ln_1.": "attn.ln.", "ln_2.": "mlp.ln."}
            for ours, theirs in norm.items():
                name = name.replace(ours, theirs)
            weights[name] = value
        else:
            for part, one in zip("qkv", value.chunk(3), strict=True):
                weights[name.replace("in_proj_", f"{part}_proj.")] = one
    return weights


@pytest.mark.parametrize(("case", "variant"), MV_CASES, ids=str)
def test_mv_adapter(case: Case, variant: str) -> None:
    t = case.tensors
    given = case.config["variants"][variant]["adapter_config"]
    visual, words, shared = given["visual"]["mlp"], given["text"]["mlp"], given["modal_dynamic"]
    options = {
        "width": visual["cls_mid"],
        "heads": visual["n_head"],
        "words": words["seq_len"],
        "reads": visual["forward"],
        "norm_in": visual["lnin"],
        "calibrate_patches": "p" in visual["temporal"],
        "blocks": visual["adapter_idx"],
        "shared": shared["adapter_idx"],
        "factor": shared["factor_dim"],
        "factor_place": shared["position"],
    }
    theirs = merged_projections({name: value.float() for name, value in case.group("w.").items()})
    clip = {name.removeprefix("clip."): value for name, value in theirs.items() if "adapter" not in name}
    clip = {name: value for name, value in clip.items() if not name.startswith("prompt.")}
    model = tuned_model(case, find_tuning("mv_adapter", options), clip)

    def place(name: str) -> str:
        if found := re.fullmatch(r"clip\.prompt\.(\d+)", name):
            layer = shared["adapter_idx"][int(found[1])]
            return f"frontend.blocks.{layer}.block.tuned.layers.factors.vector.weight"
        for found, own in (
            (r"^clip\.visual\.transformer\.resblocks\.(\d+)", r"frontend.blocks.\1.block"),
            (r"^clip\.visual\.ln_pre", "frontend.embed.ln_pre"),
            (r"^clip\.visual\.ln_post", "frontend.norm"),
            (r"^clip\.transformer\.resblocks\.(\d+)", r"text.blocks.\1"),
            (r"^clip\.ln_final", "text.head.ln_final"),
            (r"mlp\.adapter\.(up|down)", r"tuned.layers.\1"),
            (r"mlp\.adapter\.ln_in", "tuned.layers.norm"),
            (r"mlp\.adapter\.md_proj", "tuned.layers.factors.made"),
            (r"mlp\.adapter\.positional_embedding", "tuned.positions.weight"),
            (r"mlp\.adapter\.cc", "tuned.video.weight"),
            (r"mlp\.adapter\.conv_rf_c", "tuned.of_cls"),
            (r"mlp\.adapter\.conv_rf_p", "tuned.of_patches"),
            (r"mlp\.adapter", "tuned"),
            (r"in_proj_", "qkv."),
            (r"out_proj", "proj"),
        ):
            name = re.sub(found, own, name)
        return name

    added = {name: value for name, value in theirs.items() if "shared_factor" not in name}
    added = {name: value for name, value in added.items() if re.search(r"adapter|clip\.prompt|bias", name)}
    weights = fill(model, added, place)
    batch = {"text_ids": t["in.text_ids"], "text_mask": t["in.text_mask"], **video_input(case)}
    output = model.frontend(batch["video"], batch["frame_mask"])
    text, tolerance = model.text(batch["text_ids"], batch["text_mask"]), tolerances(case)[0]
    assert_close(text, t[f"out.{variant}.sequence_output"].squeeze(1), "text", tolerance)
    assert_close(output.frames, t[f"out.{variant}.visual_output"], "frames", tolerance)
    features = model(batch)
    logits = features["scale"] * features["text"] @ features["video"].T
    assert_close(logits, t[f"out.{variant}.logits"], "logits", 10 * tolerance)
    loss = contrastive_loss(features["video"], features["text"], features["scale"])
    assert_close(loss, t[f"out.{variant}.loss"], "loss", 10 * tolerance)
    loss.backward()
    check_gradients(case, split_projections(gradients(weights)), f"grad.{variant}.")
