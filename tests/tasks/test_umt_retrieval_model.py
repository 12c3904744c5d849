"""UMT's retrieval model: both sides and their matching, hard negatives, unreadable videos, weights in and out."""

from __future__ import annotations

import json
import logging
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tasks import umt_runs
from tasks.umt_runs import OPTIONS, VOCABULARY, make_batch, tiny
from torch import Tensor, nn
from training.processes import run

from tempme_vl import MergeSchedule, VisualFrontend
from tempme_vl.backbones.umt import to_umt_names
from tempme_vl.manifest import write_manifest
from tempme_vl.tasks import umt_retrieval
from tempme_vl.tasks.losses import matching_loss, same_pairs, soft_contrastive_loss
from tempme_vl.tasks.umt_retrieval import UMTRetrievalModel, create_umt_retrieval_model
from tempme_vl.text import bert_to_umt
from tempme_vl.text.tokenizers import BertWords


def loss_of(model: UMTRetrievalModel, batch: dict[str, Tensor], seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return model.loss(model(batch), batch)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the model draws as negatives: videos for the captions, captions for the videos, and so on."""
    draws: list[Tensor] = []
    draw = umt_retrieval.draw_negatives

    def recorded(weights: Tensor) -> Tensor:
        draws.append(draw(weights))
        return draws[-1]

    monkeypatch.setattr(umt_retrieval, "draw_negatives", recorded)
    return draws


def test_either_side_alone() -> None:
    model, batch = tiny().eval(), make_batch()
    both = model(batch)
    assert both.keys() == {"video", "tokens", "text", "states", "temperature", "match", "match_valid"}
    video = model({key: batch[key] for key in ("video", "frame_mask")})
    text = model({key: batch[key] for key in ("text_ids", "text_mask")})
    assert video.keys() == {"video", "tokens", "temperature"} and text.keys() == {"text", "states", "temperature"}
    for side in (video, text):
        assert all(torch.equal(value, both[key]) for key, value in side.items())
    assert torch.equal(model.encode_video(batch["video"], batch["frame_mask"])[0], both["video"])
    assert torch.equal(model.encode_text(batch["text_ids"], batch["text_mask"])[0], both["text"])


@pytest.mark.parametrize("method", ["tempme", "tome", "none"])
@pytest.mark.parametrize("mode", ["per_frame", "joint"])
def test_features(mode: str, method: str) -> None:
    if (mode, method) == ("joint", "tempme"):
        with pytest.raises(ValueError, match="a joint encoder's are one clip"):
            tiny(method, mode=mode)
        return
    model, batch = tiny(method, mode=mode).eval(), make_batch()
    features = model(batch)
    tokens = model.frontend.schedule.output_tokens
    assert features["tokens"].shape == (4, tokens, 64) and features["states"].shape == (4, 7, 64)
    assert features["video"].shape == features["text"].shape == (4, 64)
    torch.testing.assert_close(features["text"].norm(dim=-1), torch.ones(4))
    assert (features["video"].norm(dim=-1) < 1 + 1e-6).all(), "a mean of unit vectors"
    output = model.frontend(batch["video"], batch["frame_mask"])
    assert torch.equal(features["video"], output.pooled)
    assert torch.equal(features["tokens"], model.frontend.norm(output.tokens)), "normed, as UMT's fusion has them"
    assert features["match"].shape == (12, 2) and features["match_valid"].all()
    assert features["temperature"].item() == pytest.approx(0.07)


def test_half_precision_gives_float32_features() -> None:
    model, batch = tiny().eval(), make_batch()
    expected = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        features = model(batch)
        loss = model.loss(features, batch)
    assert all(features[side].dtype == torch.float32 for side in ("video", "text", "temperature"))
    assert loss.dtype == torch.float32
    for side in ("video", "text"):
        assert (torch.cosine_similarity(features[side], expected[side], dim=-1) > 0.99).all()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_matched_pairs_are_the_own_ones_then_the_drawn_ones(drawn: list[Tensor]) -> None:
    """Logits of cached keys equal those of every pair computed by itself."""
    model, batch = tiny().double().eval(), make_batch(torch.float64)
    features = model(batch)
    other_video, other_text = drawn
    own = torch.arange(4)
    assert (other_video != own).all() and (other_text != own).all()
    texts, videos = torch.cat([own, own, other_text]), torch.cat([own, other_video, own])
    for logits, text, video in zip(features["match"], texts.split(1), videos.split(1), strict=True):
        mask = batch["text_mask"][text]
        words = model.encode_text(batch["text_ids"][text], mask)[1]
        keys = model.keys_values(model.encode_video(batch["video"][video], batch["frame_mask"][video])[1])
        torch.testing.assert_close(model.fuse(words, mask, keys)[0], logits, rtol=0, atol=1e-10)
        torch.testing.assert_close(model.match_logits(words, mask, keys)[0], logits[1], rtol=0, atol=1e-10)


def test_the_hardest_negatives_are_drawn(drawn: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """A caption's nearest video, and a video's nearest caption; similarities so far apart that chance has no say."""
    model, batch = tiny().eval(), make_batch()
    similarity_TV = torch.tensor([[0.0, 1, 5, 3], [6, 0, 1, 2], [4, 7, 0, 1], [2, 5, 3, 0]])
    video, text = torch.eye(4), similarity_TV
    tokens, states = model(batch)["tokens"], model(batch)["states"]
    monkeypatch.setattr(model, "encode_video", lambda *_: (video, tokens))
    monkeypatch.setattr(model, "encode_text", lambda *_: (text, states))
    model(batch)
    assert [draw.tolist() for draw in drawn[-2:]] == [[2, 0, 1, 1], [1, 2, 0, 0]]


def test_loss_is_the_contrast_plus_the_matching() -> None:
    model, batch = tiny().eval(), make_batch()
    batch["video_id"] = torch.tensor([0, 1, 0, 3])
    features = model(batch)
    same = same_pairs(batch["video_id"], batch["text_id"])
    contrast = soft_contrastive_loss(features["video"], features["text"], features["temperature"], same)
    matching = matching_loss(features["match"], features["match_valid"])
    torch.testing.assert_close(model.loss(features, batch), contrast + matching)
    assert contrast > 0 and matching > 0


def test_the_same_video_or_caption_is_never_a_negative(drawn: list[Tensor]) -> None:
    model, batch = tiny().eval(), make_batch()
    batch["video_id"], batch["text_id"] = torch.tensor([0, 1, 0, 3]), torch.tensor([0, 1, 2, 1])
    with torch.no_grad():
        for _ in range(15):
            assert model(batch)["match_valid"].all()
    allowed = [{1, 3}, {0, 2}, {1, 3}, {0, 2}]
    assert len(drawn) == 30
    for query, choices in enumerate(allowed):
        assert {int(draw[query]) for draw in drawn} == choices


def test_pairs_without_negatives_still_match(drawn: list[Tensor]) -> None:
    """One pair alone, or all of one video: a positive each, and no contrast."""
    model = tiny().eval()
    one = {key: value[:1] for key, value in make_batch().items()}
    all_of_one = {**make_batch(), "video_id": torch.zeros(4, dtype=torch.int64)}
    for batch, pairs in ((one, 1), (all_of_one, 4)):
        features = model(batch)
        assert features["match_valid"].tolist() == [True] * pairs + [False] * 2 * pairs
        expected = nn.functional.cross_entropy(features["match"][:pairs], torch.ones(pairs, dtype=torch.int64))
        if pairs == 1:
            torch.testing.assert_close(model.loss(features, batch), expected)
        loss_of(model, batch).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
    assert drawn[0].tolist() == [0] and drawn[4].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("broken", [[1], [0, 3], [0, 1, 2, 3]])
def test_unreadable_videos_have_no_influence(broken: list[int], drawn: list[Tensor]) -> None:
    """Whatever their pixels are; they are negatives of none and have none, and gradients stay finite."""
    results = []
    for pixels in (0.0, 5.0, torch.nan):
        model, batch = tiny().eval(), make_batch()
        batch["video"][broken], batch["valid"][broken] = pixels, 0.0
        torch.manual_seed(0)
        features = model(batch)
        loss = model.loss(features, batch)
        loss.backward()
        assert not features["match_valid"].view(3, 4)[:, broken].any()
        results.append((loss, {name: p.grad for name, p in model.named_parameters()}))
    left = [row for row in range(4) if row not in broken]
    assert all(int(draw[row]) in left for draw in drawn for row in left)
    (expected, expected_grads), *others = results
    assert (expected == 0) == (not left)
    for loss, grads in others:
        assert torch.equal(loss, expected)
        for name, gradient in grads.items():
            assert gradient.isfinite().all() and torch.equal(gradient, expected_grads[name]), name


@pytest.mark.parametrize("method", ["tempme", "none"])
def test_every_parameter_learns_and_checkpointing_is_exact(method: str) -> None:
    """In training, with dropout and dropped paths; of the keys' biases in BERT only rounding is left (softmax)."""
    plain, batch = tiny(method, drop_path=0.3).train(), make_batch()
    checkpointed = deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    losses = [loss_of(model, batch) for model in (plain, checkpointed)]
    assert torch.equal(*losses) and not torch.equal(losses[0], loss_of(plain, batch, seed=1))
    for loss in losses:
        loss.backward()
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
        assert a.grad.abs().max() > 1e-8 or name.endswith(".self.key.bias"), name


def test_checkpointing_reaches_all_parts() -> None:
    model, batch, calls = tiny().train(), make_batch(), []
    for part in (model.frontend.blocks[0].block.attn, model.text.layers[0].attention, model.fusion.layers[0].attention):
        part.register_forward_hook(lambda *_: calls.append(1))
    for enable, expected in ((False, 3), (True, 6)):
        model.set_grad_checkpointing(enable)
        calls.clear()
        loss_of(model, batch).backward()
        assert len(calls) == expected


def test_training_learns_to_tell_pairs_apart() -> None:
    model, batch = tiny().eval(), make_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    first = loss_of(model, batch).item()
    for step in range(30):
        optimizer.zero_grad()
        loss_of(model, batch, step).backward()
        optimizer.step()
    assert loss_of(model, batch).item() < 0.5 * first


def test_contrast_of_two_ranks_is_that_of_the_whole_batch() -> None:
    (whole,) = run(umt_runs.contrast)
    for part in run(umt_runs.contrast, world=2):
        assert part.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(part[name], value, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


# ---- folders


@pytest.mark.parametrize("mode", ["per_frame", "joint"])
def test_saved_model_comes_back(mode: str, tmp_path: Path) -> None:
    saved, batch = tiny("tome", mode=mode).eval(), make_batch()
    nn.init.constant_(saved.temperature.temperature, 0.2)
    saved.input = replace(saved.input, max_words=17)
    # line separators of Unicode are word pieces of BERT too
    saved.words = BertWords((*VOCABULARY[:-3], "\u2028", "\x85", "é"))
    saved.save_pretrained(tmp_path)
    loaded = UMTRetrievalModel.from_pretrained(tmp_path).eval()
    assert loaded.vocabulary == saved.vocabulary and loaded.input == saved.input
    assert (loaded.text.shape, loaded.fusion.shape) == (saved.text.shape, saved.fusion.shape)
    torch.manual_seed(0)
    expected = saved(batch)
    torch.manual_seed(0)
    actual = loaded(batch)
    assert all(torch.equal(actual[key], value) for key, value in expected.items())
    frontend = VisualFrontend.from_pretrained(tmp_path)
    assert torch.equal(frontend(batch["video"]).tokens, saved.frontend(batch["video"]).tokens)
    loaded.save_pretrained(tmp_path / "again")
    for name in ("config.json", "vocab.txt", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_weights_can_be_given(tmp_path: Path) -> None:
    model = tiny()
    doubled = {key: 2 * value for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, doubled)
    loaded = UMTRetrievalModel.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == doubled.keys() and all(torch.equal(loaded[key], value) for key, value in doubled.items())


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").unlink()
    write_manifest(tmp_path)
    with pytest.raises(ValueError, match=r"expected the words of the model in .*vocab.txt, one a line"):
        UMTRetrievalModel.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "kind": "retrieval"}))
    write_manifest(tmp_path)
    with pytest.raises(ValueError, match=r"expected a UMT retrieval model in .*; got one of kind 'retrieval'"):
        UMTRetrievalModel.from_pretrained(tmp_path)
    tiny().save_pretrained(tmp_path)
    state = {key: value for key, value in tiny().state_dict().items() if key != "match_head.bias"}
    save_file(state, tmp_path / "model.safetensors")
    write_manifest(tmp_path)
    with pytest.raises(ValueError, match=r"(?s)do not fit its config.json: .*match_head.bias"):
        UMTRetrievalModel.from_pretrained(tmp_path)


# ---- public checkpoints


def public(model: UMTRetrievalModel, form: str = "retrieval") -> dict[str, Tensor]:
    """Its weights under the names of UMT's files; the pre-training form has "bert." in front of the text side's."""
    vision = to_umt_names(model.frontend.state_dict())
    state = {key if key.startswith("vision_proj.") else f"vision_encoder.{key}": v for key, v in vision.items()}
    prefix = "text_encoder.bert." if form == "pretraining" else "text_encoder."
    state |= {f"{prefix}{key}": value for key, value in bert_to_umt(model.text, model.fusion).items()}
    for theirs, ours in (("text_proj", model.text_proj), ("itm_head", model.match_head)):
        state |= {f"{theirs}.weight": ours.weight, f"{theirs}.bias": ours.bias}
    state["temp"] = model.temperature.temperature.squeeze(0)
    return {key: value.detach().clone() for key, value in state.items()}


def other_weights(method: str = "none") -> UMTRetrievalModel:
    """As a checkpoint would be: a warm temperature, and no weight as it starts."""
    model = tiny(method, seed=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        model.temperature.temperature.fill_(0.03)
    return model


@pytest.mark.parametrize("form", ["retrieval", "pretraining"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_public_file_loads_every_part(form: str, suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, file = other_weights(), tmp_path / f"umt{suffix}"
    state = public(source, form)
    if suffix == ".pth":
        torch.save({"model": state}, file)
    else:
        save_file(state, file)
    with caplog.at_level(logging.INFO, "tempme_vl"):
        created = create_umt_retrieval_model("umt:tiny", VOCABULARY, str(file), "none", num_frames=6)
    assert f"of the {form} form, converted to retrieval" in caplog.text and "0 missing" in caplog.text
    schedule = MergeSchedule.identity(6, 6, 16, 0)
    direct = UMTRetrievalModel.from_umt_state_dict(state, 4, 4, 32, "per_frame", schedule, VOCABULARY)
    for model in (created, direct):
        assert model.vocabulary == VOCABULARY and model.temperature().item() == pytest.approx(0.03)
        assert model.text.shape == model.fusion.shape
        actual = model.state_dict()
        assert actual.keys() == source.state_dict().keys()
        assert all(torch.equal(actual[key], value) for key, value in source.state_dict().items())


def test_vision_file_leaves_the_text_side_at_random(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, file = other_weights("tempme"), tmp_path / "stage1.pth"
    stage1 = {k: v for k, v in to_umt_names(source.frontend.state_dict()).items() if k.startswith("encoder.")}
    torch.save(stage1, file)
    torch.manual_seed(0)
    with caplog.at_level(logging.INFO, "tempme_vl"):
        model = create_umt_retrieval_model("umt:tiny", VOCABULARY, str(file), num_frames=6, **OPTIONS)
    assert "text_encoder.*" in caplog.text and "text_proj.weight" in caplog.text
    loaded, theirs = model.state_dict(), source.state_dict()
    same = {key for key, value in theirs.items() if torch.equal(loaded[key], value)}
    visual = {key for key in theirs if key.startswith("frontend.") and ".head." not in key and "position" not in key}
    assert same == visual
    with pytest.raises(ValueError, match=r"expected embeddings.*, encoder.layer.N"):
        UMTRetrievalModel.from_umt_state_dict(stage1, 4, 4, 32, "per_frame", MergeSchedule.identity(6, 6, 16, 0))


@pytest.mark.parametrize(
    ("drop", "add", "message"),
    [
        ("itm_head.bias", {}, "not the weights of UMT's retrieval model: 1 missing: itm_head.bias$"),
        ("temp", {}, "1 missing: temp$"),
        ("", {"mlm_head.weight": (2, 2)}, "1 unknown: mlm_head.weight$"),
        ("", {"text_proj.weight": (32, 64)}, r"projections do not fit the model: .*text_proj.weight"),
        ("text_encoder.encoder.layer.1.output.dense.bias", {}, r"1 missing: .*layer.1.output.dense.bias"),
    ],
)
def test_weights_that_do_not_fit(drop: str, add: dict[str, tuple[int, ...]], message: str) -> None:
    state: dict[str, Any] = {key: value for key, value in public(other_weights()).items() if key != drop}
    state |= {key: torch.zeros(shape) for key, shape in add.items()}
    with pytest.raises(ValueError, match=f"(?s){message}"):
        UMTRetrievalModel.from_umt_state_dict(state, 4, 4, 32, "per_frame", MergeSchedule.identity(6, 6, 16, 0))


def test_names_and_vocabularies_that_do_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "umt.pth"
    torch.save(public(other_weights()), file)
    with pytest.raises(ValueError, match=r"text side is .*vocab_size=50,.*; the model wants .*vocab_size=49,"):
        create_umt_retrieval_model("umt:tiny", VOCABULARY[:-1], str(file), "none")
    with pytest.raises(ValueError, match=r"expected one of UMT's models, such as 'umt:b16'; got 'open_clip:ViT-B-32'"):
        create_umt_retrieval_model("open_clip:ViT-B-32", VOCABULARY, None, "none")
    with pytest.raises(ValueError, match=r"UMT has no model 'b32'"):
        create_umt_retrieval_model("umt:b32", VOCABULARY, None, "none")
