"""A question answering model, whatever its head: features, loss, ranks, learning rates, folders, models by name."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tasks import qa_runs
from tasks.qa_runs import (
    ANSWERS,
    FRAMES,
    HEADS,
    METHODS,
    OPTIONS,
    VOCABULARY,
    loss_of,
    make_batch,
    make_questions,
    stacked,
    tiny_qa,
)
from torch import Tensor, nn
from towers import random_video, tempme_schedule, tiny_frontend
from training.processes import run

from tempme_vl import VisualFrontend
from tempme_vl.manifest import write_manifest
from tempme_vl.tasks.inputs import VideoInput
from tempme_vl.tasks.qa import ClassifierHead, DecoderHead, VideoQAModel, load_qa_model
from tempme_vl.tasks.qa.create import create_qa_model
from tempme_vl.tasks.retrieval import RetrievalModel

CLIPS = {"video": random_video(FRAMES, videos=4), "frame_mask": torch.ones(4, FRAMES)}
ALL_HEADS = pytest.mark.parametrize("head", HEADS)


# ---- features


@pytest.mark.parametrize(("method", "mode"), [("tempme", "per_frame"), ("tome", "joint"), ("none", "per_frame")])
def test_tokens_are_normed_and_hold_every_token_of_the_video(method: str, mode: str) -> None:
    model = tiny_qa("decoder", method, mode).eval()
    video = model(CLIPS)
    assert video.keys() == {"tokens", "size"} == set(VideoQAModel.kept)
    output = model.frontend(CLIPS["video"], CLIPS["frame_mask"])
    assert video["tokens"].shape == (4, model.frontend.schedule.output_tokens, 64)
    assert torch.equal(video["tokens"], model.frontend.norm(output.tokens))
    assert torch.equal(video["size"], output.size) and video["size"].sum(1).eq(FRAMES * 16).all()


@ALL_HEADS
@pytest.mark.parametrize("method", METHODS)
def test_answers_about_a_video_equal_those_about_its_kept_tokens(head: str, method: str) -> None:
    model, questions = tiny_qa(head, method).eval(), make_questions(head)
    with torch.no_grad():
        expected = model(CLIPS | questions)
        kept = {name: expected[name] for name in model.kept}
        assert model(kept).keys() == kept.keys(), "nothing was asked"
        actual = model(kept | questions)
        batch = make_batch(head)
        losses = model(batch)["losses"]
        del batch["video"], batch["frame_mask"]
        assert torch.equal(model(batch | kept)["losses"], losses)
    assert actual.keys() == expected.keys() and "prediction" in expected
    assert all(torch.equal(actual[key], value) for key, value in expected.items())
    assert expected["prediction"].dtype == torch.int64 and expected["prediction"].shape[0] == 4


@ALL_HEADS
def test_a_video_is_encoded_once_for_all_its_questions(head: str) -> None:
    model, questions = tiny_qa(head).eval(), make_questions(head)
    rows = torch.tensor([1, 1, 3, 1])
    with torch.no_grad():
        kept = {name: value[rows] for name, value in model(CLIPS).items()}
        actual = model(kept | questions)
        expected = model({name: value[rows] for name, value in CLIPS.items()} | questions)
    assert all(torch.equal(actual[name], expected[name]) for name in ("prediction", "tokens"))


@ALL_HEADS
def test_questions_about_the_tokens_of_clip(head: str) -> None:
    """Any front end will do, its CLS tokens among the video's."""
    frontend, umt = tiny_frontend(tempme_schedule(FRAMES)), tiny_qa(head)
    assert frontend.shape.width == umt.frontend.shape.width
    model, batch = VideoQAModel(frontend, umt.head), make_batch(head)
    assert model(batch)["tokens"].shape[1] == frontend.schedule.output_tokens
    loss_of(model, batch).backward()
    for name, parameter in model.frontend.named_parameters():
        assert (parameter.grad is None) == name.startswith("head."), name


@pytest.mark.parametrize("head", ["classifier", "decoder"])
def test_a_model_reads_and_writes_as_its_head_does(head: str) -> None:
    model = created("umt:tiny", head)
    assert model.answers == ANSWERS and model.text([3]) == ANSWERS[3]
    for asked in (("word1 word2",), ("word1", "word14"), ("word1", None, ANSWERS[:3])):
        assert_equal(model.tokenize(*asked), model.head.tokenize(*asked))


# ---- loss


@ALL_HEADS
def test_loss_is_the_weighted_sum_over_the_number_of_questions(head: str) -> None:
    model, batch = tiny_qa(head).eval(), make_batch(head)
    features = model(batch)
    rows = batch.get("answer_row", torch.arange(4)).tolist()
    assert features["losses"].shape == (len(rows),) and features["losses"].unique().numel() == len(rows)
    for answer, row in enumerate(rows):
        alone = {key: batch[key][row][None] for key in (*make_questions(head), "video", "frame_mask")}
        alone |= {k: v[answer][None] for k, v in batch.items() if k in ("answer_ids", "answer_mask", "answer_class")}
        torch.testing.assert_close(model(alone)["losses"][0], features["losses"][answer])
    expected = (features["losses"] * batch["answer_weight"]).sum() / 4
    torch.testing.assert_close(model.loss(features, batch), expected)
    del batch["answer_weight"]
    torch.testing.assert_close(model.loss(features, batch), features["losses"].sum() / 4)


@ALL_HEADS
def test_no_influence_of_answers_of_no_weight(head: str) -> None:
    """They count as questions all the same, as UMT has it; the loss of a batch does not jump with what it holds."""
    model, batch = tiny_qa(head).eval(), make_batch(head)
    batch["answer_weight"] = torch.tensor([1.0, 0, 0, 1, 1] if head == "decoder" else [1.0, 0, 1, 1])
    losses = model(batch)["losses"]
    torch.testing.assert_close(loss_of(model, batch), (losses * batch["answer_weight"]).sum() / 4)
    loss_of(model, batch).backward()
    expected = gradients(model)
    for key in ("answer_ids", "answer_class"):
        if key in batch:
            batch[key] = batch[key].clone()
            batch[key][1] = batch[key][0]
    model.zero_grad()
    loss_of(model, batch).backward()
    assert_equal(gradients(model), expected)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys() and expected
    for name, value in expected.items():
        assert value.isfinite().all() and torch.equal(actual[name], value), name


@ALL_HEADS
@pytest.mark.parametrize("content", [0.0, torch.nan])
def test_unreadable_videos_have_no_influence(head: str, content: float) -> None:
    model, batch = tiny_qa(head).eval(), make_batch(head)
    batch["valid"] = torch.tensor([1.0, 0, 1, 1])
    loss_of(model, batch).backward()
    expected = gradients(model)
    features = model(batch)
    kept = torch.tensor([0, 3, 4] if head == "decoder" else [0, 2, 3])
    weighted = features["losses"] * batch["answer_weight"]
    torch.testing.assert_close(model.loss(features, batch), weighted[kept].sum() / 3)
    model.zero_grad()
    batch["video"][1] = content
    loss_of(model, batch).backward()
    assert_equal(gradients(model), expected)


@ALL_HEADS
def test_a_batch_without_any_readable_video_teaches_nothing(head: str) -> None:
    model, batch = tiny_qa(head).eval(), make_batch(head)
    batch["valid"] = torch.zeros(4)
    batch["video"][:] = torch.nan
    loss = loss_of(model, batch)
    loss.backward()
    assert loss == 0 and all(not gradient.any() for gradient in gradients(model).values())


@ALL_HEADS
def test_loss_of_two_ranks_is_that_of_the_whole_batch(head: str) -> None:
    """One rank holds two readable videos, the other one."""
    (whole,) = run(qa_runs.loss_and_gradient, head)
    for part in run(qa_runs.loss_and_gradient, head, world=2):
        assert part.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(part[name], value, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@ALL_HEADS
def test_half_precision(head: str) -> None:
    model, batch = tiny_qa(head).eval(), make_batch(head)
    expected = loss_of(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, batch)
        prediction = model(CLIPS | make_questions(head))["prediction"]
    assert loss.dtype == torch.float32 and prediction.dtype == torch.int64
    assert loss.item() == pytest.approx(expected.item(), rel=0.05)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# ---- gradients


@ALL_HEADS
@pytest.mark.parametrize("method", ["tempme", "none"])
def test_every_parameter_learns_and_checkpointing_is_exact(head: str, method: str) -> None:
    """In training, with dropped paths; of the keys' biases in BERT only rounding is left (softmax)."""
    plain, batch = tiny_qa(head, method, drop_path=0.3).train(), make_batch(head)
    checkpointed = deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    losses = [loss_of(model, batch) for model in (plain, checkpointed)]
    assert torch.equal(*losses) and not torch.equal(losses[0], loss_of(plain, batch, seed=1))
    for loss in losses:
        loss.backward()
    frozen = {name for name, p in plain.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in plain.named_parameters() if name.startswith("frontend.head.")} != set()
    # what adds the same to all options of a question changes no choice
    idle = (".self.key.bias", "classifier.2.bias") if head == "choice" else (".self.key.bias",)
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        if name in frozen:
            assert a.grad is None and b.grad is None
        else:
            assert torch.equal(a.grad, b.grad), name
            assert a.grad.abs().max() > 1e-8 or name.endswith(idle), name


@ALL_HEADS
def test_checkpointing_reaches_all_parts(head: str) -> None:
    model, batch, calls = tiny_qa(head).train(), make_batch(head), list[int]()
    parts = [model.head.questions.text, model.head.questions.fusion]
    parts += [model.head.decoder] if head == "decoder" else []
    blocks = [model.frontend.blocks[0].block.attn, *(part.layers[0].intermediate for part in parts)]
    for block in blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    for enable, times in ((False, 1), (True, 2), (False, 1)):
        model.set_grad_checkpointing(enable)
        calls.clear()
        loss_of(model, batch).backward()
        assert len(calls) == times * len(blocks)


# ---- new parameters


def new_of(model: VideoQAModel) -> set[str]:
    return {name for name, _ in model.named_parameters() if model.is_new_parameter(name)}


def test_what_no_pretrained_model_had_is_new() -> None:
    positions = {f"frontend.blocks.{layer}.before_attention.clip_position.weight" for layer in OPTIONS["merge_layers"]}
    mlp = {f"head.classifier.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")}
    assert new_of(tiny_qa("decoder")) == positions and new_of(tiny_qa("decoder", "none")) == set()
    for head in ("classifier", "choice"):
        assert new_of(tiny_qa(head)) == positions | mlp and new_of(tiny_qa(head, "tome")) == mlp
    for head in ("decoder", "classifier"):
        umt, clip = (created(f"{family}:tiny", head) for family in ("umt", "open_clip"))
        assert new_of(umt) == positions | (mlp if head == "classifier" else set())
        whole = {name for name, _ in clip.named_parameters() if name.startswith("head.")}
        assert new_of(clip) == positions | whole and mlp & whole == (mlp if head == "classifier" else set())


# ---- folders


@ALL_HEADS
@pytest.mark.parametrize(("method", "mode"), [("tempme", "per_frame"), ("tome", "joint")])
def test_saved_model_comes_back(head: str, method: str, mode: str, tmp_path: Path) -> None:
    saved, batch = tiny_qa(head, method, mode).eval(), make_batch(head)
    saved.input = VideoInput("segment")
    # line separators of Unicode are word pieces of BERT too
    questions = saved.head.questions
    questions.vocabulary, questions.max_words = (*VOCABULARY[:-3], "\u2028", "\x85", "é"), 17
    saved.save_pretrained(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    files = ["README.md", "answers.json", "config.json", "manifest.json", "model.safetensors", "vocab.txt"]
    assert sorted(p.name for p in folder.iterdir()) == files
    loaded = load_qa_model(folder).eval()
    assert type(loaded.head) is type(saved.head) and loaded.head.answers == saved.head.answers
    same = loaded.head.questions
    assert (same.vocabulary, same.max_words, same.shape) == (questions.vocabulary, 17, questions.shape)
    assert same.proportional and loaded.input == saved.input == VideoInput("segment")
    assert not any(p.requires_grad for p in loaded.frontend.head.parameters())
    for asked in (batch, CLIPS | make_questions(head)):
        expected, actual = saved(asked), loaded(asked)
        assert expected.keys() == actual.keys()
        assert all(torch.equal(actual[key], value) for key, value in expected.items())
    frontend = VisualFrontend.from_pretrained(folder)
    assert torch.equal(frontend(batch["video"]).tokens, saved.frontend(batch["video"]).tokens)
    loaded.save_pretrained(tmp_path / "again")
    for name in ("answers.json", "config.json", "vocab.txt", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


@ALL_HEADS
def test_weights_can_be_given(head: str, tmp_path: Path) -> None:
    model = tiny_qa(head)
    doubled = {key: 2 * value for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, doubled)
    loaded = load_qa_model(tmp_path).state_dict()
    assert loaded.keys() == doubled.keys() and all(torch.equal(loaded[key], value) for key, value in doubled.items())


@pytest.mark.parametrize("proportional", [True, False])
def test_how_tokens_count_comes_back(proportional: bool, tmp_path: Path) -> None:
    tiny_qa("decoder", proportional=proportional).save_pretrained(tmp_path)
    assert load_qa_model(tmp_path).head.questions.proportional is proportional


@ALL_HEADS
def test_folders_that_do_not_fit(head: str, tmp_path: Path) -> None:
    model = tiny_qa(head)
    for file, message in (
        ("vocab.txt", r"expected the words of the model in .*vocab.txt, one a line"),
        ("answers.json", r"expected the answers of the model in .*answers.json; there is no such file"),
        ("model.safetensors", r"expected model.safetensors in "),
        ("config.json", r"expected config.json in "),
    ):
        model.save_pretrained(tmp_path)
        (tmp_path / file).unlink()
        write_manifest(tmp_path)
        with pytest.raises(ValueError, match=message):
            load_qa_model(tmp_path)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "kind": "umt_retrieval"}))
    write_manifest(tmp_path)
    with pytest.raises(ValueError, match=r"expected a question answering model in .*; got one of kind 'umt_retrieval'"):
        load_qa_model(tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected a retrieval model in .*; got one of kind 'video_qa'"):
        RetrievalModel.from_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = [key for key in state if key.startswith("head.")][-1]
    save_file({key: value for key, value in state.items() if key != name}, tmp_path / "model.safetensors")
    write_manifest(tmp_path)
    with pytest.raises(ValueError, match=rf"(?s)do not fit its config.json: .*{name}"):
        load_qa_model(tmp_path)


# ---- by name


def created(name: str, head: Any, method: str = "tempme", **options: Any) -> VideoQAModel:
    torch.manual_seed(0)
    return create_qa_model(
        name, VOCABULARY, head, ANSWERS, method=method, num_frames=FRAMES, **METHODS[method], **options
    )


@pytest.mark.parametrize("name", ["open_clip:tiny", "umt:tiny"])
@pytest.mark.parametrize("head", ["classifier", "decoder"])
@pytest.mark.parametrize("method", METHODS)
def test_models_by_name_answer_and_learn(name: str, head: str, method: str, tmp_path: Path) -> None:
    model = created(name, head, method, max_words=9).eval()
    assert type(model.head) is {"classifier": ClassifierHead, "decoder": DecoderHead}[head]
    assert model.frontend.schedule.method == method and model.head.answers == ANSWERS
    questions = stacked([model.head.tokenize(f"word{n} word1") for n in range(4)])
    assert questions["question_ids"].shape == (4, 9)
    said = model(CLIPS | questions)["prediction"]
    assert {model.head.text(row) for row in said.tolist()} <= set(ANSWERS)
    pairs = stacked([model.head.tokenize(f"word{n}", ANSWERS[n]) for n in range(4)])
    loss = loss_of(model, CLIPS | pairs | {"valid": torch.ones(4)})
    loss.backward()
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert loss.isfinite() and gradients(model).keys() == learning
    model.save_pretrained(tmp_path)
    assert torch.equal(load_qa_model(tmp_path).eval()(CLIPS | questions)["prediction"], said)


def test_settings_by_name() -> None:
    clip, umt = created("open_clip:tiny", "decoder"), created("umt:tiny", "decoder")
    assert isinstance(clip.head, DecoderHead) and isinstance(umt.head, DecoderHead)
    assert clip.head.questions.proportional and not umt.head.questions.proportional, "UMT's tokens are of one size"
    assert created("umt:tiny", "classifier").head.questions.proportional
    assert (clip.input, umt.input) == (VideoInput("uniform"), VideoInput("segment"))
    shape = clip.head.questions.shape
    assert (shape.width, shape.vocab_size, shape.cross_width) == (64, len(VOCABULARY), 64)
    assert len(clip.head.decoder.layers) == len(clip.head.questions.fusion.layers) == 1
    assert (clip.head.rule, clip.head.candidates, clip.head.answer_words) == ("likelihood", 128, 5)
    other = created("umt:tiny", "decoder", rule="umt", candidates=3, answer_words=4, clip_position_std=0.3)
    assert isinstance(other.head, DecoderHead)
    assert (other.head.rule, other.head.candidates, other.head.answer_words) == ("umt", 3, 4)
    assert all(p.any() for p in other.frontend.clip_positions.values())
    assert not any(p.any() for p in umt.frontend.clip_positions.values())
    free = create_qa_model("umt:tiny", VOCABULARY, method="none", num_frames=FRAMES)
    assert isinstance(free.head, DecoderHead) and (free.head.rule, free.head.answers) == ("generate", ())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "tiny"}, r"got 'tiny' \(known families: open_clip, umt"),
        ({"head": "answerer"}, r"'answerer' is no head for question answering; expected one of classifier, decoder, l"),
        ({"vocabulary": ()}, r"the head 'decoder' needs a vocabulary"),
        ({"candidates": "3"}, r"head 'decoder', 'candidates': expected a whole number"),
        ({"text": "bert-tiny"}, r"expected one of \['bert-base', 'bert-large', 'tiny'\]; got 'bert-tiny'"),
        ({"rule": "umt"}, r"the rule 'umt' ranks a list of answers, and there is none"),
        ({"method": "tempme", "budget": 0.0}, r"budget is a share of the GFLOPs without merging"),
    ],
)
def test_models_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"name": "umt:tiny", "vocabulary": VOCABULARY, "method": "none", "num_frames": FRAMES}
    with pytest.raises(ValueError, match=message):
        create_qa_model(**{**options, **changes})
