"""TempMe's own checkpoints: loaded as its users have them, they give the features that its own code gives.

The reference tensors are weights of the authors' model under the names of its best.pth, and the features that it made
of random videos and texts (LunarShen/TempMe e624930, tvr/models/modeling.py): once with merging, clip positions and
LoRA, once with LoRA alone.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, find
from torch import Tensor
from training.processes import exit_codes, start

from tempme_vl.backbones.open_clip_models import TINY_CONFIGS
from tempme_vl.data.motion import render_motion
from tempme_vl.merging import MergeSchedule, make_schedule
from tempme_vl.recipes.options.retrieval import RETRIEVAL
from tempme_vl.tasks.retrieval import RetrievalModel, create_retrieval_model, load_retrieval_model
from tempme_vl.tuning import Lora

CASES = [*find("tuning", "tempme_ckpt*"), *find("tuning", "lora_only*")]
each = pytest.mark.parametrize("case", CASES, ids=str)
HEAD = 16  # width of a head in all cases
VOCABULARY = 49408  # of CLIP


def weights_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("w."): value.float() for key, value in tensors.items() if key.startswith("w.")}


def numbers(text: str) -> tuple[int, ...]:
    """As their options write several: "8-9-10"."""
    return tuple(map(int, text.split("-")))


def options_of(case: Case) -> dict[str, Any]:
    """Their options under our names; LoRA without merging is written as joining clips of one."""
    c = case.config["config"]
    cross, intra = numbers(c["prop"])
    merge_frames = numbers(c["merge_frame_num"])
    if not c["tome_r"] and not cross and not intra and set(merge_frames) == {1}:
        return {"method": "none"}
    layers = {"merge_layers": numbers(c["merge_layer"]), "merge_frames": merge_frames}
    return {"method": "tempme", "r": c["tome_r"], **layers, "cross_percent": cross, "intra_percent": intra}


def sizes_of(case: Case) -> dict[str, Any]:
    """Their model as open_clip describes one."""
    c = case.config["config"]
    return {
        "embed_dim": c["embed"],
        "vision_cfg": {
            **{"image_size": c["img"], "patch_size": c["patch"]},
            **{"layers": c["vl"], "width": c["vw"], "head_width": HEAD},
        },
        "text_cfg": {
            **{"context_length": c["ctx"], "vocab_size": c["vocab"]},
            **{"width": c["tw"], "heads": c["tw"] // HEAD, "layers": c["tl"]},
        },
    }


def schedule_of(case: Case) -> MergeSchedule:
    c = case.config["config"]
    return make_schedule(layers=c["vl"], frames=c["F"], tokens=(c["img"] // c["patch"]) ** 2 + 1, **options_of(case))


def plain_model(case: Case, weights: dict[str, Tensor]) -> RetrievalModel:
    c = case.config["config"]
    return RetrievalModel.from_openai_state_dict(weights, c["vw"] // HEAD, schedule_of(case), c["tw"] // HEAD)


def check(model: RetrievalModel, case: Case) -> None:
    t = case.tensors
    output = model.frontend(t["in.video"].float(), t["in.video_mask"])
    text = model.text(t["in.text_ids"], t["in.text_mask"])
    assert output.tokens.shape[1] == schedule_of(case).output_tokens
    torch.testing.assert_close(output.pooled, t["out.video_feat"], rtol=0, atol=2e-5)
    torch.testing.assert_close(text, t["out.text_feat"], rtol=0, atol=2e-5)
    batch = {key.removeprefix("in."): t[key] for key in ("in.text_ids", "in.text_mask")}
    features = model({**batch, "video": t["in.video"].float(), "frame_mask": t["in.video_mask"]})
    logits = features["scale"] * features["text"] @ features["video"].T
    torch.testing.assert_close(logits, t["out.logits_eval"], rtol=0, atol=2e-4)


@each
@torch.no_grad()
def test_a_checkpoint_gives_the_features_of_its_authors(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    c, t, options = case.config["config"], case.tensors, options_of(case)
    monkeypatch.setitem(TINY_CONFIGS, "golden", sizes_of(case))
    torch.save(weights_of(t), tmp_path / "best.pth")
    model = create_retrieval_model("open_clip:golden", str(tmp_path / "best.pth"), num_frames=c["F"], **options)
    assert isinstance(model, RetrievalModel)
    check(model, case)

    # and so it does from a folder of this package, and from the state alone
    model.save_pretrained(tmp_path / "own")
    again = create_retrieval_model("open_clip:golden", str(tmp_path / "own"), num_frames=c["F"], **options)
    assert isinstance(again, RetrievalModel)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
    check(plain_model(case, weights_of(t)), case)


@pytest.mark.parametrize("case", find("tuning", "tempme_ckpt*"), ids=str)
def test_one_command_evaluates_a_checkpoint_of_its_authors(case: Case, tmp_path: Path) -> None:
    """On rendered videos, whose captions need all of CLIP's words: those of the reference are the first of them. What
    the command leaves in OUTPUT/best, and has evaluated, gives the reference's features."""
    sizes, weights, options = sizes_of(case), weights_of(case.tensors), options_of(case)
    rows = weights["clip.token_embedding.weight"]
    more = torch.randn(VOCABULARY - len(rows), rows.shape[1], generator=torch.Generator().manual_seed(0))
    torch.save({**weights, "clip.token_embedding.weight": torch.cat([rows, more])}, tmp_path / "best.pth")
    sizes["text_cfg"]["vocab_size"] = VOCABULARY
    counts = {"num_train": 2, "num_test": 4, "num_order_train": 0, "num_order_val": 0, "num_order_test": 0}
    root = render_motion(tmp_path / "motion", **counts)

    given = {"model": "open_clip:golden", "pretrained": tmp_path / "best.pth", "epochs": 0, "output": tmp_path / "run"}
    given |= {"dataset": "msrvtt", "data_root": root, "num_frames": case.config["config"]["F"], "holdout": 0}
    given |= {"max_words": case.config["config"]["ctx"], "batch_size": 2, "workers": 0, **options}
    arguments: list[str] = []
    for name, value in given.items():
        values = value if isinstance(value, tuple) else (value,)
        arguments += [f"--{name.replace('_', '-')}", *map(str, values)]
    log = tmp_path / "log"
    assert exit_codes(start(train_golden, sizes, arguments, log=log)) == [0], log.read_text()

    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["videos"], report["train_steps"], report["method"]) == (4, 0, options["method"])
    model = load_retrieval_model(tmp_path / "run" / "best")
    assert isinstance(model, RetrievalModel)
    with torch.no_grad():
        check(model.eval(), case)


def train_golden(sizes: dict[str, Any], arguments: list[str]) -> None:
    """The retrieval recipe, where open_clip has a model of the sizes."""
    TINY_CONFIGS["golden"] = sizes
    RETRIEVAL.load()(RETRIEVAL.parse(arguments))


@pytest.mark.parametrize("case", find("tuning", "tempme_ckpt*"), ids=str)
@torch.no_grad()
def test_lora_and_clip_positions_matter(case: Case) -> None:
    """Without either the features are others by far more than the tolerance."""
    t = case.tensors
    for part in ("TVPt_LoRA", "TVPt_Video"):
        state = {key: value for key, value in weights_of(t).items() if part not in key}
        model = plain_model(case, state)
        difference = model.frontend(t["in.video"].float(), t["in.video_mask"]).pooled - t["out.video_feat"]
        assert difference.abs().max() > 1e-3, part


@each
def test_lora_beside_frozen_weights_trains_as_its_authors_have_it(case: Case) -> None:
    """Features, loss and gradients before LoRA is merged; merged, it is what their checkpoint loads as."""
    t, weights = case.tensors, weights_of(case.tensors)
    plain = {key: value for key, value in weights.items() if "TVPt_LoRA" not in key}
    model = plain_model(case, plain)
    model.tune(Lora(rank=case.config["config"]["lora_dim"]))
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    own = {key: own_name(key) for key in weights if "TVPt" in key}
    # that code keeps positions of joins that it does not make, and may leave out those of joins that it makes
    own = {key: value for key, value in own.items() if value in trained or "clip_position" not in value}
    assert own and trained.keys() >= {*own.values()}
    assert all("clip_position" in name for name in trained.keys() - {*own.values()})
    with torch.no_grad():
        for key, target in own.items():
            trained[target].copy_(weights[key].view_as(trained[target]))
        check(model, case)

    batch = {key.removeprefix("in."): value for key, value in t.items() if key.startswith("in.")}
    batch |= {
        "video": batch["video"].float(),
        "frame_mask": batch["video_mask"],
        "valid": torch.ones(len(t["in.video"])),
    }
    batch |= {"video_id": torch.arange(len(t["in.video"]))}
    batch["text_id"] = batch["video_id"]
    loss = model.loss(model(batch), batch)
    torch.testing.assert_close(loss, t["out.loss"], rtol=0, atol=2e-4)
    loss.backward()
    compared = 0
    for key in (key for key in t if key.startswith("grad.")):
        expected, gradient = t[key], trained[own[key.removeprefix("grad.")]].grad
        assert gradient is not None
        torch.testing.assert_close(
            gradient.view_as(expected), expected, rtol=0, atol=1e-4 * float(expected.abs().max()), msg=key
        )
        compared += 1
    assert compared

    folded = plain_model(case, weights).state_dict()
    merged = model.plain_state()
    assert merged.keys() == folded.keys()
    for key, value in folded.items():
        torch.testing.assert_close(merged[key], value, rtol=0, atol=1e-6, msg=key)


def own_name(key: str) -> str:
    """The parameter of a tuned model that holds a weight of theirs."""
    found = re.fullmatch(r"clip\.(visual\.|)transformer\.resblocks\.(\d+)\.(.*)", key)
    assert found is not None, key
    side, block, last = found.groups()
    tower = "frontend" if side else "text"
    if last == "TVPt_Video_Positional_embedding":
        return f"{tower}.blocks.{block}.before_attention.clip_position.weight"
    attention = f"{tower}.blocks.{block}.{'block.' if side else ''}attn.qkv"
    return f"{attention}.lora_{last[-1].upper()}.default.weight"
