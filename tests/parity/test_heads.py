"""CLIP4Clip's heads and EERCF: scores, losses, gradients and two stages of ranking as of the authors' code."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity.cases import Case, assert_close, find
from torch import Tensor

from tempme_vl.backbones.open_clip_models import TINY_CONFIGS
from tempme_vl.evaluation.rerank import two_stages
from tempme_vl.merging import MergeSchedule
from tempme_vl.tasks.heads import find_head
from tempme_vl.tasks.retrieval import RetrievalModel, create_retrieval_model
from tempme_vl.tasks.similarity import PairContext
from tempme_vl.tasks.similarity.eercf import SHARP, EERCFHead, EERCFOptions, gated, pearson, weak

HEAD = 16  # width of a head in all cases
OF_THEIRS = {"meanP": "mean", "seqLSTM": "seqlstm", "seqTransf": "seqtransf", "tightTransf": "tighttransf"}
CLIP4CLIP = [(case, theirs) for case in find("tuning", "clip4clip_heads*") for theirs in OF_THEIRS]
eercf = pytest.mark.parametrize("case", find("tuning", "eercf*"), ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def numbers(case: Case) -> list[float]:
    """Of a case's tolerance, in its order."""
    return [float(number) for number in re.findall(r"\d+e-\d+", case.config["tolerance"])]


def model_of(case: Case, head: str, dtype: torch.dtype, **options: Any) -> RetrievalModel:
    """A model on a case's CLIP, with a head on the weights that lie beside it, which are all of that head's."""
    c, weights = case.config["config"], {name: value.float() for name, value in case.group("w.").items()}
    clip = {name.removeprefix("clip."): value for name, value in weights.items() if name.startswith("clip.")}
    clip.pop("visual.conv2.weight", None)
    schedule = MergeSchedule.identity(c["vl"], c["F"], (c["img"] // c["patch"]) ** 2 + 1)
    model = RetrievalModel.from_openai_state_dict(clip, c["vw"] // HEAD, schedule, c["tw"] // HEAD)
    kind: Any = find_head(head, "retrieval")
    known = {field.name for field in fields(kind.options)}
    told = kind.options(**{name: value for name, value in options.items() if name in known})
    model.head = kind.create(PairContext(model.frontend, model.text), told)
    if model.head.learns:
        model.head.load_state_dict(kind.from_public(weights))
    return model.to(dtype).train()


def batch_of(case: Case, dtype: torch.dtype, pairs: int | None = None) -> dict[str, Tensor]:
    """A case's input: of its texts the first ones belong to its videos, if so many are asked for."""
    t = case.tensors
    ids = t["in.text_ids"][:pairs]
    batch = {"text_ids": ids, "text_mask": (torch.arange(ids.shape[1]) <= ids.argmax(1, keepdim=True)).long()}
    batch |= {"video": t["in.video"].to(dtype), "frame_mask": t["in.video_mask"]}
    if pairs is not None:
        batch |= {name: torch.arange(pairs) for name in ("video_id", "text_id")} | {"valid": torch.ones(pairs)}
    return batch


def check_gradients(case: Case, model: RetrievalModel, prefix: str, relative: float) -> None:
    """All that a case has, under the authors' names."""
    of_head = {name: weight.grad for name, weight in model.head.named_parameters()}
    with torch.no_grad():  # what gives weights their names gives them to gradients, too
        for weight in model.parameters():
            weight.copy_(torch.zeros_like(weight) if weight.grad is None else weight.grad)
    of_clip = model.openai_state_dict()
    expected = case.group(prefix)
    for name, gradient in expected.items():
        largest = float(gradient.abs().max())
        if name.startswith("clip."):
            assert_close(of_clip[name.removeprefix("clip.")], gradient, f"gradient of {name}", relative * largest)
            continue
        ((own, gradient),) = type(model.head).from_public({name: gradient}).items()
        # a constant that all logits share: what is left of its gradient is rounding
        tolerance = 1e-6 if own == "similarity_dense.bias" else relative * largest
        assert_close(of_head[own], gradient, f"gradient of {name}", tolerance)
    assert any(not name.startswith("clip.") for name in expected) == model.head.learns


@dtypes
@pytest.mark.parametrize(("case", "theirs"), CLIP4CLIP, ids=str)
def test_clip4clip(case: Case, theirs: str, dtype: torch.dtype) -> None:
    c, t = case.config["config"], case.tensors
    model = model_of(case, OF_THEIRS[theirs], dtype, layers=c["cross_layers"], dropout=0.0)
    absolute, relative = numbers(case)
    with torch.no_grad():
        model.eval()
        features = model(batch_of(case, dtype))
        logits = model.head.logits(features, features, features["scale"])
        assert_close(logits, t[f"out.{theirs}.logits_eval"], "logits", absolute)
    batch = batch_of(case, dtype, c["B"])
    features = model.train()(batch)
    loss = model.loss(features, batch)
    assert_close(loss, t[f"out.{theirs}.loss"], "loss", absolute)
    loss.backward()
    check_gradients(case, model, f"grad.{theirs}.", relative)


def eercf_of(case: Case, dtype: torch.dtype, weights: str = "default") -> RetrievalModel:
    """With the weights of the loss that a case names, under their names here."""
    names = {
        "weak_loss_weight": "weak_loss",
        "strong_loss_weight": "strong_loss",
        "cdcl_loss_weight": "pearson_loss",
        "video_weight": "video",
        **{f"{kind}{part}_weight": f"{kind}_{part}" for kind in ("weak", "strong") for part in ("frame", "patch")},
        **{f"cdcl_{part}_weight": f"pearson_{part}" for part in ("video", "frame", "patch")},
    }
    given = {names[name]: value for name, value in case.config[f"loss_weights_{weights}"].items()}
    if weights == "default":
        assert EERCFOptions(**given) == EERCFOptions()
    return model_of(case, "eercf", dtype, layers=case.config["config"]["cross_layers"], **given)


@dtypes
@eercf
@torch.no_grad()
def test_eercf_scores_and_two_stages(case: Case, dtype: torch.dtype) -> None:
    t, c = case.tensors, case.config["config"]
    of_features, of_logits = numbers(case)[:2]
    model = eercf_of(case, dtype).eval()
    head = model.head
    assert isinstance(head, EERCFHead)
    f = model(batch_of(case, dtype))
    assert_close(f["frames"], F.normalize(t["out.visual_output"], dim=-1), "frames", of_features)
    assert_close(f["patches"], F.normalize(t["out.visual_patches"], dim=-1).flatten(1, 2), "patches", of_features)
    assert_close(f["sentence"], F.normalize(t["out.sequence_output"].squeeze(1), dim=-1), "texts", of_features)
    scale, sentence = f["scale"], f["sentence"]
    pooled = {
        "strongframe": gated(sentence, f["frames"], f["timed"], 0.1),
        "strongpatch": gated(sentence, f["patches"], f["patches"], SHARP),
    }
    scores = {
        "video": head.similarity(f, f),
        "weakframe": head.weak_frames(sentence, f["frames"]),
        "weakpatch": weak(sentence, f["patches"]),
        **{name: torch.einsum("te,tve->tv", sentence, videos) for name, videos in pooled.items()},
    }
    for name, found in scores.items():
        assert_close(scale * found, t[f"out.eval.{name}"], name, of_logits)

    def fine(video: int, texts: Tensor) -> Tensor:
        text = {name: f[name][texts] for name in ("text", "sentence")}
        return (
            scale
            * head.fine(text, {name: f[name][video : video + 1] for name in (*head.fine_video_parts, "video")})[:, 0]
        )

    videos = len(f["video"])
    options: dict[str, Any] = {"device": torch.device("cpu"), "top_k": c["topk"], "keeps_rest": True, "progress": False}
    found = two_stages(fine, scale * scores["video"], torch.ones(videos).bool(), [range(videos)], **options)
    assert_close(found.t2v, t["out.two_stage.final"], "both stages", of_logits)


@dtypes
@eercf
@pytest.mark.parametrize("weights", ["default", "alt"])
def test_eercf_learns(case: Case, weights: str, dtype: torch.dtype) -> None:
    t, pairs = case.tensors, case.config["config"]["B"]
    _, of_logits, of_pearson, relative = numbers(case)
    model, batch = eercf_of(case, dtype, weights), batch_of(case, dtype, pairs)
    head = model.head
    assert isinstance(head, EERCFHead)
    f = model(batch)
    frames, patches = head.own(f["sentence"], f)
    for name, videos in (("strongframe", frames), ("strongpatch", patches)):
        assert_close(f["scale"] * f["sentence"] @ videos.T, t[f"out.train.{name}"], name, of_logits)
    for name, videos in (("video", f["video"]), ("frame", frames), ("patch", patches)):
        expected = t[f"out.train.pearson_{name}"]
        assert_close(pearson(f["sentence"], videos), expected, name, of_pearson * expected.abs().item())
    loss = model.loss(f, batch)
    assert_close(loss, t[f"out.train.{weights}.loss"], "loss", of_logits)
    loss.backward()
    check_gradients(case, model, f"grad.{weights}.", relative)


@pytest.mark.parametrize("head", ["seqlstm", "seqtransf", "tighttransf"])
@pytest.mark.parametrize("case", find("tuning", "clip4clip_heads*"), ids=str)
@torch.no_grad()
def test_a_checkpoint_of_its_authors_has_the_head(
    case: Case, head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """CLIP's matrices in half precision, as they are there; another head's file leaves this one to start anew."""
    c = case.config["config"]
    vision = {"image_size": c["img"], "layers": c["vl"], "width": c["vw"], "head_width": HEAD, "patch_size": c["patch"]}
    words = {"context_length": c["ctx"], "vocab_size": c["vocab"]}
    words |= {"width": c["tw"], "heads": c["tw"] // HEAD, "layers": c["tl"]}
    monkeypatch.setitem(TINY_CONFIGS, "golden", {"embed_dim": c["embed"], "vision_cfg": vision, "text_cfg": words})
    dropped = "clip.visual.conv2"
    weights = {name: value for name, value in case.group("w.").items() if not name.startswith(dropped)}
    file = tmp_path / "pytorch_model.bin.4"
    torch.save(weights, file)

    def made(layers: int) -> RetrievalModel:
        options = {} if head == "seqlstm" else {"layers": layers}
        model = create_retrieval_model("open_clip:golden", str(file), "none", c["F"], head=head, **options)
        assert isinstance(model, RetrievalModel)
        return model.eval()

    model, expected = made(c["cross_layers"]), model_of(case, head, torch.float32, layers=c["cross_layers"]).eval()
    assert model.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.head.state_dict().items():
        assert torch.equal(model.head.state_dict()[name], value), name
    if head != "seqlstm":
        with pytest.raises(ValueError, match=r"the head in .* does not hold the weights of this model: 12 unknown"):
            made(c["cross_layers"] - 1)
    torch.save({name: value for name, value in weights.items() if name.startswith("clip.")}, file)
    made(c["cross_layers"])
    torch.save({**{n: v for n, v in weights.items() if n.startswith("clip.")}, "other.weight": torch.ones(1)}, file)
    caplog.clear()
    made(c["cross_layers"])
    assert f"holds no whole head {head}, which starts anew" in caplog.text


@pytest.mark.parametrize("head", [name for name in OF_THEIRS.values() if name != "mean"] + ["eercf"])
@pytest.mark.parametrize("case", find("tuning", "clip4clip_heads*"), ids=str)
@torch.no_grad()
def test_heads_start_as_the_text_tower(case: Case, head: str) -> None:
    """As the case's map of what starts as what says, for blocks and positions; more blocks or places than there are."""
    clip, c = case.group("w.clip."), case.config["config"]
    told = {"layers": c["tl"] + 1} if head != "seqlstm" else {}
    weights = {f"w.clip.{name}": value.float() for name, value in clip.items()}
    plain = RetrievalModel.from_openai_state_dict(
        {name.removeprefix("w.clip."): value for name, value in weights.items() if "conv2" not in name},
        c["vw"] // HEAD,
        MergeSchedule.identity(c["vl"], c["F"], (c["img"] // c["patch"]) ** 2 + 1),
        c["tw"] // HEAD,
    )
    kind: Any = find_head(head, "retrieval")
    made = kind.create(PairContext(plain.frontend, plain.text), kind.options(**told)).state_dict()
    started = case.config["initialisation_before_randomising"]
    theirs = {ours: name for name, ours in OF_THEIRS.items()}.get(head, "seqTransf")
    compared = 0
    for name, start in started[theirs].items():
        if start in clip:
            ((own, value),) = kind.from_public({name: clip[start]}).items()
            assert torch.equal(made[own], value), name
            compared += 1
    assert compared == (1 if head == "seqlstm" else 1 + 12 * c["tl"])
    norms = [name for name in made if ".blocks." in name and "ln_1.weight" in name]
    if norms:  # the block that CLIP has none for
        assert len(norms) == c["tl"] + 1 and torch.equal(made[norms[-1]], torch.ones(c["tw"]))
    for matrix in ("global_mat.weight", "frame_logit.weight"):
        assert matrix not in made or torch.equal(made[matrix], torch.eye(len(made[matrix])))
