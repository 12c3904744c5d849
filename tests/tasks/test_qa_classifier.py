"""The classifier head: what its logits depend on, choosing among options with and without a list of answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tasks.qa_runs import ANSWERS, START, classifier_head, loss_of, make_batch, make_questions, stacked, texts, tiny_qa
from torch import Tensor
from torch.nn.functional import pad

from tempme_vl.tasks.qa import ClassifierHead, VideoQAModel, load_qa_model

BOTH = pytest.mark.parametrize("head", ["classifier", "choice"])
OPTIONS = (("word3", "word14", "word9"), ("word1", "nothing", "word3"), ("word9", "word14 word5", "word1"))


def head_of(kind: str = "classifier", **options: Any) -> ClassifierHead:
    torch.manual_seed(0)
    return classifier_head(**({"answers": ()} if kind == "choice" else {}), **options).eval()


def random_tokens(videos: int = 4, tokens: int = 10) -> tuple[Tensor, Tensor]:
    """Merged tokens and their sizes."""
    numbers = torch.Generator().manual_seed(6)
    size = torch.randint(1, 9, (videos, tokens, 1), generator=numbers).float()
    return torch.randn(videos, tokens, 64, generator=numbers), size


@torch.no_grad()
def logits_of(head: ClassifierHead, asked: dict[str, Tensor], tokens: Tensor, size: Tensor) -> Tensor:
    return head(tokens, size, asked)["logits"]


# ---- merged tokens


@BOTH
def test_a_token_counts_as_often_as_its_size_says(head: str) -> None:
    """Equal to as many tokens of size 1 as were merged into it, however they are split and in any order."""
    made, asked, (tokens, size) = head_of(head), make_questions(head), random_tokens()
    expected = logits_of(made, asked, tokens, size)
    assert expected.shape == (4, 3 if head == "choice" else len(ANSWERS))
    twice = torch.cat([tokens, tokens], dim=1)
    torch.testing.assert_close(logits_of(made, asked, twice, torch.cat([size / 2, size / 2], dim=1)), expected)
    uneven = torch.cat([size - 0.25, torch.full_like(size, 0.25)], dim=1)
    torch.testing.assert_close(logits_of(made, asked, twice, uneven), expected)
    for video in range(4):
        one = {key: value[video : video + 1] for key, value in asked.items()}
        apart = tokens[video].repeat_interleave(size[video, :, 0].long(), dim=0)[None]
        torch.testing.assert_close(logits_of(made, one, apart, torch.ones_like(apart[..., :1])), expected[video][None])
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(logits_of(made, asked, tokens[:, order], size[:, order]), expected)
    torch.testing.assert_close(logits_of(made, asked, tokens, 3 * size), expected, msg="shares alone count")
    assert (logits_of(made, asked, tokens, torch.ones_like(size)) - expected).abs().max() > 1e-3


@BOTH
def test_tokens_of_no_size_are_not_there(head: str) -> None:
    made, asked, (tokens, size) = head_of(head), make_questions(head), random_tokens()
    expected = logits_of(made, asked, tokens, size)
    more, none = torch.cat([tokens, 9 * tokens], dim=1), torch.cat([size, torch.zeros_like(size)], dim=1)
    torch.testing.assert_close(logits_of(made, asked, more, none), expected)


def test_sizes_can_be_left_out_of_account() -> None:
    made, asked, (tokens, size) = head_of(proportional=False), make_questions(), random_tokens()
    expected = logits_of(made, asked, tokens, torch.ones_like(size))
    assert torch.equal(logits_of(made, asked, tokens, size), expected)
    torch.testing.assert_close(logits_of(head_of(), asked, tokens, torch.ones_like(size)), expected)


# ---- questions


@BOTH
def test_padding_and_order_of_questions_do_not_matter(head: str) -> None:
    made, asked, (tokens, size) = head_of(head), make_questions(head), random_tokens()
    expected = logits_of(made, asked, tokens, size)
    torch.testing.assert_close(logits_of(made, {k: pad(v, (0, 5)) for k, v in asked.items()}, tokens, size), expected)
    name = "option" if head == "choice" else "question"
    noisy = asked | {f"{name}_ids": asked[f"{name}_ids"].where(asked[f"{name}_mask"].bool(), 9)}
    torch.testing.assert_close(logits_of(made, noisy, tokens, size), expected)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = {key: value[order] for key, value in asked.items()}
    torch.testing.assert_close(logits_of(made, shuffled, tokens[order], size[order]), expected[order])
    for video in range(4):
        one = slice(video, video + 1)
        alone = logits_of(made, {key: value[one] for key, value in asked.items()}, tokens[one], size[one])
        torch.testing.assert_close(alone, expected[one])


def test_every_word_and_the_video_matter() -> None:
    made, asked, (tokens, size) = head_of(), make_questions(), random_tokens()
    expected = logits_of(made, asked, tokens, size)
    for word in range(int(asked["question_mask"][1].sum())):
        ids = asked["question_ids"].clone()
        ids[1, word] = ids[1, word] % 20 + 6
        changed = logits_of(made, asked | {"question_ids": ids}, tokens, size)
        assert torch.equal(changed[[0, 2, 3]], expected[[0, 2, 3]]) and not torch.allclose(changed[1], expected[1])
    assert not torch.allclose(logits_of(made, asked, tokens.roll(1, 0), size.roll(1, 0)), expected, atol=1e-3)


# ---- answers


def test_words_and_classes() -> None:
    made = head_of()
    plain = made.tokenize("Word1, word2?")
    assert plain.keys() == {"question_ids", "question_mask"}
    assert plain["question_ids"].tolist() == [START, 6, 7] + [0] * 22
    for number, answer in enumerate(ANSWERS):
        asked = made.tokenize("word1", answer)
        assert asked.keys() == {"question_ids", "question_mask", "answer_class", "answer_weight"}
        assert (asked["answer_class"].item(), asked["answer_weight"].item()) == (number, 1.0)
        assert asked["answer_class"].dtype == torch.int64 and asked["answer_weight"].dtype == torch.float32
    unknown = made.tokenize("word1", "something else")
    assert (unknown["answer_class"].item(), unknown["answer_weight"].item()) == (0, 0.0)
    options = made.tokenize("word1", options=OPTIONS[1])
    assert options.keys() == {"question_ids", "question_mask", "option_class"}
    assert options["option_class"].tolist() == [2, -1, 0]


def test_prediction_is_the_likeliest_class() -> None:
    made, asked, (tokens, size) = head_of(), make_questions(), random_tokens()
    output = made(tokens, size, asked)
    assert output.keys() == {"logits", "prediction", "scores"} and output["logits"].dtype == torch.float32
    torch.testing.assert_close(output["scores"], output["logits"].exp() / output["logits"].exp().sum(1, keepdim=True))
    assert torch.equal(output["prediction"], output["logits"].argmax(1, keepdim=True))
    assert [made.text(row) for row in output["prediction"].tolist()] == [
        ANSWERS[int(n)] for n in output["logits"].argmax(1)
    ]
    losses = made(tokens, size, asked | {"answer_class": torch.tensor([2, 0, 7, 2])})["losses"]
    expected = -output["logits"].log_softmax(1)[torch.arange(4), torch.tensor([2, 0, 7, 2])]
    torch.testing.assert_close(losses, expected)


def test_answers_outside_the_list_teach_nothing() -> None:
    """They count as questions, though: the loss is that of the others over all of them."""
    model = tiny_qa("classifier").eval()
    batch = {key: value for key, value in make_batch("classifier").items() if not key.startswith("answer_")}
    known = batch | stacked([model.head.tokenize(f"word{n}", ANSWERS[n]) for n in range(4)])
    answers = (ANSWERS[0], "unknown", ANSWERS[2], "word5 word14")
    some = batch | stacked([model.head.tokenize(f"word{n}", answer) for n, answer in enumerate(answers)])
    torch.testing.assert_close(loss_of(model, some), model(known)["losses"][[0, 2]].sum() / 4)
    loss_of(model, some).backward()
    # the row of the class that stands in for unknown ones learns as if they were not there
    mine = model.head.classifier[2].bias.grad.clone()
    model.zero_grad()
    loss_of(model, known | {"answer_weight": torch.tensor([1.0, 0, 1, 0])}).backward()
    torch.testing.assert_close(model.head.classifier[2].bias.grad, mine)


# ---- options, with a list of answers


def test_options_of_the_list_are_chosen_by_their_logits() -> None:
    made, (tokens, size) = head_of(), random_tokens(3)
    asked = stacked([made.tokenize(f"word{n}", options=row) for n, row in enumerate(OPTIONS)])
    output = made(tokens, size, asked)
    every = logits_of(made, {key: asked[key] for key in ("question_ids", "question_mask")}, tokens, size)
    for n, row in enumerate(OPTIONS):
        expected = [every[n, ANSWERS.index(option)].item() if option in ANSWERS else -torch.inf for option in row]
        assert output["logits"][n].tolist() == expected
    assert torch.equal(output["prediction"], output["logits"].argmax(1, keepdim=True))


def test_unknown_options_are_never_chosen() -> None:
    """Not even where the class that stands in for them is the likeliest of all."""
    made, (tokens, size) = head_of(), random_tokens(3)
    with torch.no_grad():
        made.classifier[2].bias[0] = 1e4
    options = (("nothing", "word14", "none"), ("word1", "nothing", "none"), ("nothing", "none", "word9"))
    asked = stacked([made.tokenize("word1", options=row) for row in options])
    assert made(tokens, size, asked)["prediction"].tolist() == [[1], [0], [2]]


def test_rows_of_classes_are_filled_up_with_anything() -> None:
    made, (tokens, size) = head_of(), random_tokens(3)
    asked = stacked([made.tokenize(f"word{n}", options=row) for n, row in enumerate(OPTIONS)])
    expected = made(tokens, size, asked)
    best = logits_of(made, {key: asked[key] for key in ("question_ids", "question_mask")}, tokens, size).argmax(1)
    for filler in (torch.zeros(3, 2).long(), torch.full((3, 2), -1), best[:, None].expand(3, 2)):
        wider = asked | {"option_class": torch.cat([filler, asked["option_class"]], dim=1)}
        valid = torch.tensor([[0.0, 0, 1, 1, 1]]).expand(3, -1)
        output = made(tokens, size, wider | {"option_valid": valid})
        assert torch.equal(output["prediction"], expected["prediction"] + 2)
        assert torch.equal(output["logits"][:, 2:], expected["logits"]) and output["logits"][:, :2].eq(-torch.inf).all()


# ---- options, without a list


def test_every_option_is_read_behind_the_question() -> None:
    made, (tokens, size) = head_of("choice"), random_tokens(3)
    assert made.answers == () and made.classifier[2].out_features == 1
    questions = [f"word{n} word6" for n in range(3)]
    rows = [made.tokenize(question, options=row) for question, row in zip(questions, OPTIONS, strict=True)]
    assert rows[0].keys() == {"option_ids", "option_mask"} and rows[0]["option_ids"].shape == (3, 25)
    assert rows[0]["option_ids"][1].tolist() == [START, 5, 11, 19] + [0] * 21
    output = made(tokens, size, stacked(rows))
    for n, (question, options) in enumerate(zip(questions, OPTIONS, strict=True)):
        keys = made.questions.keys_values(tokens[n : n + 1], size[n : n + 1])
        for k, option in enumerate(options):
            ids, mask = (part[None] for part in made.questions.tokenize(f"{question} {option}"))
            alone = made.classifier(made.questions(ids, mask, keys)[:, 0])[0, 0]
            torch.testing.assert_close(output["logits"][n, k], alone)
    assert torch.equal(output["prediction"], output["logits"].argmax(1, keepdim=True))
    answers = torch.tensor([2, 0, 1])
    trained = [made.tokenize(q, o[a], o) for q, o, a in zip(questions, OPTIONS, answers.tolist(), strict=True)]
    assert torch.equal(stacked(trained)["answer_class"], answers)
    losses = made(tokens, size, stacked(trained))["losses"]
    torch.testing.assert_close(losses, -output["logits"].log_softmax(1)[torch.arange(3), answers])


def test_order_of_options_does_not_matter() -> None:
    made, asked, (tokens, size) = head_of("choice"), make_questions("choice"), random_tokens()
    expected, order = logits_of(made, asked, tokens, size), torch.tensor([2, 0, 1])
    shuffled = {key: value[:, order] for key, value in asked.items()}
    torch.testing.assert_close(logits_of(made, shuffled, tokens, size), expected[:, order])


@pytest.mark.parametrize("filler", ["repeated", "other words"])
def test_what_fills_up_a_row_of_options_has_no_influence(filler: str) -> None:
    """Not on the choice, the loss or its gradients."""
    model, batch = tiny_qa("choice").eval(), make_batch("choice")
    loss_of(model, batch).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    losses = model(batch)["losses"]
    answer = batch.pop("answer_class")
    chosen = model(batch)["prediction"]
    ids, mask = (part.view(4, 2, 7) for part in texts((3, 7) * 4, 7, 9, end=False))
    if filler == "repeated":  # the very option that was chosen
        ids, mask = (
            batch[f"option_{part}"][torch.arange(4)[:, None], chosen.expand(-1, 2)] for part in ("ids", "mask")
        )
    batch["option_ids"] = torch.cat([ids, batch["option_ids"]], dim=1)
    batch["option_mask"] = torch.cat([mask, batch["option_mask"]], dim=1)
    batch["option_valid"] = torch.tensor([[0.0, 0, 1, 1, 1]]).expand(4, -1)
    output = model(batch)
    assert torch.equal(output["prediction"], chosen + 2) and output["logits"][:, :2].eq(-torch.inf).all()
    batch["answer_class"] = answer + 2
    torch.testing.assert_close(model(batch)["losses"], losses)
    model.zero_grad()
    loss_of(model, batch).backward()
    actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


# ---- questions that cannot be


def test_questions_that_cannot_be_asked() -> None:
    with pytest.raises(ValueError, match=r"chooses among options, but the question has none: 'who is it\?'"):
        head_of("choice").tokenize("who is it?")
    with pytest.raises(ValueError, match=r"none of the options \['no', 'not'\] is among the 8 answers"):
        head_of().tokenize("word1", options=("no", "not"))
    with pytest.raises(ValueError, match=r"expected one of the options \['word1', 'word2'\] as the answer; got 'none'"):
        head_of("choice").tokenize("word1", "none", ("word1", "word2"))


# ---- learning


def learned(model: VideoQAModel, batch: dict[str, Tensor], steps: int) -> Tensor:
    """Predictions after training."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch, step).backward()
        optimizer.step()
    asked = {key: value for key, value in batch.items() if not key.startswith("answer_")}
    with torch.no_grad():
        return model(asked)["prediction"]


@pytest.mark.parametrize("head", ["classifier", pytest.param("choice", marks=pytest.mark.slow)])
def test_answers_are_learned(head: str, tmp_path: Path) -> None:
    """The same question about four videos: only the video tells the answer."""
    model, batch = tiny_qa(head).eval(), make_batch(head)
    batch = {key: batch[key] for key in ("video", "frame_mask", "valid")}
    answers = [ANSWERS[n] for n in (5, 0, 3, 1)]
    options = () if head == "classifier" else tuple(ANSWERS[:6])
    batch |= stacked([model.head.tokenize("word7 word9", answer, options) for answer in answers])
    prediction = learned(model, batch, 40)
    said = [ANSWERS[n] for n in prediction[:, 0].tolist()]
    assert said == answers
    if head == "classifier":
        assert [model.head.text(row) for row in prediction.tolist()] == answers
    model.save_pretrained(tmp_path)
    asked = {key: value for key, value in batch.items() if not key.startswith("answer_")}
    assert torch.equal(load_qa_model(tmp_path).eval()(asked)["prediction"], prediction)
