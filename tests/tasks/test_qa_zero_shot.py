"""Zero-shot answers: the text of question and answer that fits the video best, by a retrieval model."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from tasks import umt_runs
from tasks.qa_runs import stacked
from torch import Tensor
from towers import random_video

from tempme_vl.tasks.qa.zero_shot import ZeroShotQA
from tempme_vl.tasks.retrieval import create_retrieval_model
from tempme_vl.tasks.umt_retrieval import UMTRetrievalModel

FRAMES = umt_runs.FRAMES
CLIPS = {"video": random_video(FRAMES, videos=4), "frame_mask": torch.ones(4, FRAMES)}
ANSWERS = ("word3", "word14 word5", "word1", "word20", "word9 word9", "word7")
QUESTIONS = ("word30 word31", "word40", "word30 word31 word32", "word41 word2")
OPTIONS = (("word3", "word4"), ("word1", "word2", "word5", "word6"), ANSWERS[:3], ("word8 word8", "word9"))
BOTH = pytest.mark.parametrize("family", ["open_clip", "umt"])


@cache
def retrieval(family: str) -> Any:
    if family == "umt":
        return umt_runs.tiny().eval()
    torch.manual_seed(0)
    return create_retrieval_model(
        "open_clip:tiny", None, "tempme", FRAMES, clip_position_std=0.1, **umt_runs.OPTIONS
    ).eval()


def asked_options(model: ZeroShotQA, filler: str = "word44") -> dict[str, Tensor]:
    """The four questions with their options, filled up to four by one that is not valid."""
    rows = []
    for question, options in zip(QUESTIONS, OPTIONS, strict=True):
        row = model.tokenize(question, None, (*options, *[filler] * (4 - len(options))))
        rows.append({**row, "option_valid": (torch.arange(4) < len(options)).long()})
    return stacked(rows)


@torch.no_grad()
def scores_text_by_text(family: str, video: int, texts: list[str]) -> Tensor:
    """(K,) by the retrieval model itself, one video and one text at a time."""
    model = retrieval(family)
    tokenizer = model.words.tokenizer(32)
    of_video = model({name: value[video][None] for name, value in CLIPS.items()})
    similarity, match = [], []
    for text in texts:
        ids, mask = (part[None] for part in tokenizer(text))
        of_text = model({"text_ids": ids, "text_mask": mask})
        similarity.append((of_video["video"] * of_text["text"]).sum())
        if family == "umt":
            match.append(model.fuse(of_text["states"], mask, model.keys_values(of_video["tokens"]))[0, 1])
    if family == "open_clip":
        return (model.logit_scale.log_scale.exp() * torch.stack(similarity)).softmax(0)
    # UMT's rule for multiple choice (its MSRVTT-MC evaluation)
    contrast = torch.stack(similarity) / model.temperature.temperature.item()
    return 0.7 * torch.stack(match).softmax(0) + 0.3 * contrast.softmax(0)


@BOTH
@pytest.mark.parametrize("rows", [1, 3, 1024])
def test_scores_of_options_are_those_of_each_text_alone(family: str, rows: int) -> None:
    """Whatever is encoded at once, and however a question's options are filled up to those of others."""
    model = ZeroShotQA(retrieval(family), rows=rows).eval()
    said = model(CLIPS | asked_options(model))
    assert said["scores"].shape == (4, 4) and said["prediction"].shape == (4, 1)
    for video, (question, options) in enumerate(zip(QUESTIONS, OPTIONS, strict=True)):
        expected = scores_text_by_text(family, video, [f"{question} {option}" for option in options])
        torch.testing.assert_close(said["scores"][video, : len(options)], expected, rtol=1e-4, atol=1e-6)
        assert said["scores"][video, len(options) :].eq(0).all()
        assert said["prediction"][video].item() == expected.argmax().item()
        assert expected.unique().numel() == len(options)


@BOTH
def test_the_list_of_answers_is_tried_where_there_are_no_options(family: str) -> None:
    model = ZeroShotQA(retrieval(family), ANSWERS).eval()
    assert model.answers == ANSWERS
    said = model(CLIPS | stacked([model.tokenize(question) for question in QUESTIONS]))
    assert said["scores"].shape == (4, len(ANSWERS))
    for video, question in enumerate(QUESTIONS):
        expected = scores_text_by_text(family, video, [f"{question} {answer}" for answer in ANSWERS])
        torch.testing.assert_close(said["scores"][video], expected, rtol=1e-4, atol=1e-6)
        assert model.text(said["prediction"][video].tolist()) == ANSWERS[int(expected.argmax())]


def test_what_umt_weighs_is_a_share_of_the_options() -> None:
    """A clear match outweighs the most similar text; without a clear match, similarity decides."""
    model = ZeroShotQA(retrieval("umt")).eval()
    temperature = retrieval("umt").temperature.temperature.item()
    asked = {"option_ids": torch.zeros(1, 3, 4), "option_mask": torch.ones(1, 3, 4)}
    for match, similarity, expected in (
        ([9.0, 0.0, 0.0], [0.0, 1.0, 0.0], 0),
        ([0.1, 0.0, 0.0], [0.0, 1.0, 0.0], 1),
        ([0.0, 0.0, 0.0], [0.0, 0.0, 1.0], 2),
    ):
        model._encode = lambda *_, m=match, s=similarity: (torch.tensor(s), torch.tensor(m))
        scores = model._scores({}, asked)
        shares = 0.7 * torch.tensor(match).softmax(0) + 0.3 * (torch.tensor(similarity) / temperature).softmax(0)
        torch.testing.assert_close(scores[0], shares)
        assert scores.sum().item() == pytest.approx(1) and scores.argmax().item() == expected


@BOTH
def test_what_fills_up_a_row_has_no_influence(family: str) -> None:
    model = ZeroShotQA(retrieval(family)).eval()
    expected = model(CLIPS | asked_options(model))
    best = [options[int(row)] for options, row in zip(OPTIONS, expected["prediction"], strict=True)]
    for filler in (*best, "word0 word1 word2 word3"):
        said = model(CLIPS | asked_options(model, filler))
        torch.testing.assert_close(said["scores"], expected["scores"])
        assert torch.equal(said["prediction"], expected["prediction"])


@BOTH
def test_order_of_options_has_no_influence(family: str) -> None:
    model = ZeroShotQA(retrieval(family)).eval()
    order = torch.tensor([3, 0, 2, 1])
    asked = stacked([model.tokenize(question, None, OPTIONS[1]) for question in QUESTIONS])
    scores = model(CLIPS | asked)["scores"]
    other = model(CLIPS | {name: value[:, order] for name, value in asked.items()})["scores"]
    torch.testing.assert_close(other, scores[:, order])


@BOTH
def test_answers_about_a_video_equal_those_about_what_was_kept_of_it(family: str) -> None:
    model = ZeroShotQA(retrieval(family)).eval()
    video = model(CLIPS)
    assert set(video) == set(model.kept) == ({"video", "tokens"} if family == "umt" else {"video"})
    assert isinstance(model.retrieval, UMTRetrievalModel) == ("tokens" in model.kept)
    rows, asked = torch.tensor([2, 2, 0, 3]), asked_options(model)
    kept = model({name: value[rows] for name, value in video.items()} | asked)
    whole = model({name: value[rows] for name, value in CLIPS.items()} | asked)
    assert kept.keys() == whole.keys()
    torch.testing.assert_close(kept, whole)
    assert not torch.equal(kept["scores"], model(CLIPS | asked)["scores"]), "the video matters"


@BOTH
def test_a_template_makes_the_texts(family: str) -> None:
    plain = ZeroShotQA(retrieval(family), ANSWERS)
    turned = ZeroShotQA(retrieval(family), ANSWERS, template="{answer} word33 {question}")
    tokenizer = retrieval(family).words.tokenizer(32)
    for model, texts in (
        (plain, [f"word2 {answer}" for answer in ANSWERS]),
        (turned, [f"{answer} word33 word2" for answer in ANSWERS]),
    ):
        asked = model.tokenize("word2")
        assert asked.keys() == {"option_ids", "option_mask"}
        ids, masks = zip(*map(tokenizer, texts), strict=True)
        assert torch.equal(asked["option_ids"], torch.stack(ids))
        assert torch.equal(asked["option_mask"], torch.stack(masks))


def test_texts_are_cut_as_in_training() -> None:
    model = umt_runs.tiny()
    model.input = replace(model.input, max_words=5)
    assert ZeroShotQA(model, ANSWERS).tokenize("word1 " * 40)["option_ids"].shape == (len(ANSWERS), 5)
    model.input = replace(model.input, max_words=1000)
    assert ZeroShotQA(model, ANSWERS).tokenize("word1")["option_ids"].shape[1] == model.text.context_length


@BOTH
def test_it_is_not_trained(family: str) -> None:
    model = ZeroShotQA(retrieval(family), ANSWERS)
    with pytest.raises(ValueError, match="a zero-shot model is not trained; expected a question without its answer"):
        model.tokenize("word1", "word3")
    assert not any(value.requires_grad for value in model(CLIPS | asked_options(model)).values())


@BOTH
def test_a_question_needs_options_or_answers(family: str) -> None:
    with pytest.raises(ValueError, match=r"expected options, or a model with a list of answers, .* question 'word1'"):
        ZeroShotQA(retrieval(family)).tokenize("word1")


@BOTH
def test_half_precision(family: str) -> None:
    model = ZeroShotQA(retrieval(family)).eval()
    asked = asked_options(model)
    expected = model(CLIPS | asked)["scores"]
    with torch.autocast("cpu", torch.bfloat16):
        said = model(CLIPS | asked)
    assert said["scores"].dtype == torch.float32 and said["prediction"].dtype == torch.int64
    torch.testing.assert_close(said["scores"], expected, rtol=0.1, atol=0.05)
