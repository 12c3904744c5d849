"""The decoder head: rankings against brute force, options, generated answers, what it keeps in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tasks.qa_runs import (
    ANSWERS,
    END,
    SHAPE,
    START,
    VOCABULARY,
    decoder_head,
    loss_of,
    make_batch,
    make_questions,
    one_answer_each,
    stacked,
    texts,
    tiny_qa,
)
from torch import Tensor
from torch.nn.functional import pad

from tempme_vl.tasks.qa import DecoderHead, VideoQAModel, load_qa_model
from tempme_vl.tasks.qa.decoder import Ranking, Rule
from tempme_vl.text import BertDecoder

LIST = texts((3, 4, 3, 5, 3, 4, 5, 3, 4, 3), 5, 7, end=True)
VIDEO = ("video", "frame_mask")


def tiny(**options: Any) -> tuple[VideoQAModel, DecoderHead]:
    model = tiny_qa("decoder", **options).eval()
    assert isinstance(model.head, DecoderHead)
    return model, model.head


@torch.no_grad()
def asked(model: VideoQAModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """States and mask of the questions."""
    return model({key: batch[key] for key in (*VIDEO, *make_questions())})["states"], batch["question_mask"]


@torch.no_grad()
def likelihoods(head: DecoderHead, states: Tensor, mask: Tensor, words: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(Q, A): log p of every answer of a list and of its first word, each by itself, from the definition."""
    ids, answer_mask = words
    whole, first = torch.zeros(len(states), len(ids)), torch.zeros(len(states), len(ids))
    for q in range(len(states)):
        question = head.decoder.keys_values(states[q : q + 1], mask[q : q + 1])
        for a in range(len(ids)):
            pieces = ids[a, : int(answer_mask[a].sum())]
            log_p = head.decoder(pieces[None, None], question)[0, 0].log_softmax(-1)
            each = log_p[torch.arange(len(pieces) - 1), pieces[1:]]
            whole[q, a], first[q, a] = each.sum(), each[0]
    return whole, first


def words_of(head: DecoderHead, answers: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Ids and mask (A, L), one `tokenize` each."""
    pairs = stacked([head.tokenize("word1", answer) for answer in answers])
    return pairs["answer_ids"], pairs["answer_mask"]


def assert_same(actual: Ranking, expected: Ranking) -> None:
    assert torch.equal(actual.answers, expected.answers)
    torch.testing.assert_close(actual.probabilities, expected.probabilities)


# ---- training


def test_states_are_those_of_the_question_encoder() -> None:
    (model, head), batch = tiny(), make_batch()
    features = model(batch)
    assert features.keys() == {"tokens", "size", "states", "losses"} and features["states"].shape == (4, 7, 48)
    assert torch.equal(asked(model, batch)[0], features["states"]), "answers have no part in them"
    keys = head.questions.keys_values(features["tokens"], features["size"])
    assert torch.equal(head.questions(batch["question_ids"], batch["question_mask"], keys), features["states"])


def test_losses_are_of_whole_answers() -> None:
    (model, head), batch = tiny(), make_batch()
    states, mask = asked(model, batch)
    whole, _ = likelihoods(head, states, mask, (batch["answer_ids"], batch["answer_mask"]))
    expected = -whole[batch["answer_row"], torch.arange(5)]
    torch.testing.assert_close(model(batch)["losses"], expected)
    single = one_answer_each(batch)
    torch.testing.assert_close(model(single)["losses"], expected[[0, 1, 3, 4]])


def test_padding_and_order_do_not_matter() -> None:
    (model, _), batch = tiny(), make_batch()
    expected = model(batch)["losses"]
    wider = {key: pad(v, (0, 3)) for key, v in batch.items() if key.endswith(("_ids", "n_mask", "r_mask"))}
    assert wider.keys() == {"question_ids", "question_mask", "answer_ids", "answer_mask"}
    torch.testing.assert_close(model(batch | wider)["losses"], expected)
    for key in ("question", "answer"):
        noisy = {f"{key}_ids": batch[f"{key}_ids"].where(batch[f"{key}_mask"].bool(), 9)}
        torch.testing.assert_close(model(batch | noisy)["losses"], expected)
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = {key: value[order] for key, value in batch.items() if key.startswith("answer_")}
    torch.testing.assert_close(model(batch | shuffled)["losses"], expected[order])


def test_answers_are_learned_then_ranked_first_and_generated() -> None:
    """The same question about four videos: only the video tells the answer."""
    (model, head), batch = tiny(), make_batch()
    ids, mask = texts((3, 4, 3, 4), 5, 8, end=True)
    batch = {key: batch[key] for key in (*VIDEO, *make_questions(), "valid")} | {"answer_ids": ids, "answer_mask": mask}
    for key in make_questions():
        batch[key] = batch[key][1].expand(4, -1)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3)
    for step in range(60):
        optimizer.zero_grad()
        loss_of(model, batch, step).backward()
        optimizer.step()
    states, question_mask = asked(model, batch)
    answers, answer_mask = torch.cat([LIST[0], ids]), torch.cat([LIST[1], mask])
    rules: tuple[Rule, ...] = ("likelihood", "umt")
    for rule in rules:
        ranking = head.rank(states, question_mask, answers, answer_mask, rule=rule)
        assert (ranking.answers[:, 0] - len(LIST[0])).tolist() == [0, 1, 2, 3]
        assert (ranking.probabilities[:, 0] > 0.8).all()
    spoken = [" ".join(VOCABULARY[n] for n in row if n > END).replace(" ##", "") for row in ids.tolist()]
    assert [head.text(row) for row in head.generate(states, question_mask).tolist()] == spoken


# ---- ranking


@pytest.mark.parametrize("rule", ["likelihood", "umt"])
def test_ranking_the_whole_list_equals_brute_force(rule: Rule) -> None:
    (model, head), batch = tiny(), make_batch()
    states, mask = asked(model, batch)
    whole, first = likelihoods(head, states, mask, LIST)
    score = whole + first if rule == "umt" else whole
    ranking = head.rank(states, mask, *LIST, candidates=10, rule=rule)
    assert torch.equal(ranking.answers, score.argsort(dim=1, descending=True))
    expected = score.softmax(1).gather(1, ranking.answers)
    torch.testing.assert_close(ranking.probabilities, expected, rtol=1e-4, atol=1e-6)
    assert_same(head.rank(states, mask, *LIST, candidates=128, rule=rule), ranking)


def test_candidates_are_those_of_the_likeliest_first_words() -> None:
    (model, head), batch = tiny(), make_batch()
    states, mask = asked(model, batch)
    whole, first = likelihoods(head, states, mask, LIST)
    for candidates in (1, 3, 7):
        chosen = first.argsort(dim=1, descending=True, stable=True)[:, :candidates]
        ranking = head.rank(states, mask, *LIST, candidates=candidates)
        assert torch.equal(ranking.answers.sort(dim=1).values, chosen.sort(dim=1).values)
        order = whole.gather(1, chosen).argsort(dim=1, descending=True)
        assert torch.equal(ranking.answers, chosen.gather(1, order))
        torch.testing.assert_close(ranking.probabilities.sum(1), torch.ones(4))


def test_the_rules_differ() -> None:
    """A first word that is likely in itself counts twice under UMT's rule."""
    (model, head), batch = tiny(), make_batch()
    states, mask = asked(model, batch)
    plain = head.rank(states, mask, *LIST)
    assert_same(head.rank(states, mask, *LIST, rule="likelihood"), plain)
    assert not torch.equal(head.rank(states, mask, *LIST, rule="umt").answers, plain.answers)


def test_ties_go_to_the_earlier_answer() -> None:
    (model, head), batch = tiny(), make_batch()
    ids, mask = (torch.cat([part[:1]] * 6) for part in LIST)
    ranking = head.rank(*asked(model, batch), ids, mask, candidates=4)
    assert ranking.answers.tolist() == [[0, 1, 2, 3]] * 4
    torch.testing.assert_close(ranking.probabilities, torch.full((4, 4), 0.25))


@pytest.mark.parametrize("rows", [1, 8, 13, 1000])
def test_ranking_in_parts_and_question_by_question(rows: int) -> None:
    (model, head), batch = tiny(), make_batch()
    states, mask = asked(model, batch)
    expected = head.rank(states, mask, *LIST, candidates=7)
    decoded: list[int] = []
    head.decoder.register_forward_pre_hook(lambda _, inputs: decoded.append(inputs[0][..., 0].numel()))
    assert_same(head.rank(states, mask, *LIST, candidates=7, rows=rows), expected)
    assert max(decoded) <= max(rows, 4) and sum(decoded) == 4 + 4 * 7
    for q in range(4):
        one = slice(q, q + 1)
        assert_same(
            head.rank(states[one], mask[one], *LIST, candidates=7, rows=rows),
            Ranking(expected.answers[one], expected.probabilities[one]),
        )


def test_rankings_that_cannot_be() -> None:
    (model, head), batch = tiny(), make_batch()
    states, mask = asked(model, batch)
    ids, answer_mask = LIST
    rules: tuple[Any, ...] = ("blip", "generate")
    for rule in rules:
        with pytest.raises(ValueError, match=f"expected a rule that ranks, likelihood or umt; got '{rule}'"):
            head.rank(states, mask, ids, answer_mask, rule=rule)
    for bad in ((ids, answer_mask, 0), (ids[:0], answer_mask[:0], 1), (ids, answer_mask[1:], 1)):
        with pytest.raises(ValueError, match=r"expected answers \(A, L\) with a mask alike, at least one"):
            head.rank(states, mask, *bad)
    wordless = answer_mask * torch.tensor([1, 0, 0, 0, 0])
    for bad_ids, bad_mask in ((ids, wordless), (ids[:, :1], answer_mask[:, :1])):
        with pytest.raises(ValueError, match="some of these have none"):
            head.rank(states, mask, bad_ids, bad_mask)


@pytest.mark.parametrize("rule", ["likelihood", "umt"])
@pytest.mark.parametrize("candidates", [1, 3, 128])
def test_prediction_is_the_first_of_the_ranking(rule: Rule, candidates: int) -> None:
    """One answer begins with a likely word and goes on with the unlikeliest, so that rule and candidates matter."""
    answers = ("word3", "word14", "word1", "word20 word8", "word9")
    (model, head), batch = tiny(answers=answers, rule=rule, candidates=candidates), make_batch()
    with torch.no_grad():
        for word, bias in (("word20", 8), ("[SEP]", 8), ("word8", -2)):
            head.decoder.head.bias[VOCABULARY.index(word)] = bias
    batch |= stacked([head.tokenize(f"word{n} word{2 * n}") for n in (1, 3, 6, 11)])
    states, mask = asked(model, batch)
    prediction = model({key: batch[key] for key in (*VIDEO, *make_questions())})["prediction"]
    words = words_of(head, answers)
    ranking = head.rank(states, mask, *words, candidates=candidates, rule=rule)
    assert ranking.answers.shape == (4, min(candidates, len(answers)))
    assert torch.equal(prediction, ranking.answers[:, :1]) and prediction.dtype == torch.int64
    said = [head.text(row) for row in prediction.tolist()]
    assert said == [answers[row[0]] for row in prediction.tolist()]
    assert [text == "word20 word8" for text in said] == [rule == "umt" or candidates == 1] * 4
    if candidates == 128:
        whole, first = likelihoods(head, states, mask, words)
        score = whole + first if rule == "umt" else whole
        assert torch.equal(prediction, score.argmax(1, keepdim=True))


def test_heads_that_cannot_be() -> None:
    rules: tuple[Any, ...] = ("likelihood", "umt")
    for rule in rules:
        with pytest.raises(ValueError, match=f"the rule '{rule}' ranks a list of answers, and there is none"):
            decoder_head(rule=rule)
    with pytest.raises(ValueError, match="expected one of the rules likelihood, umt, generate; got 'blip'"):
        decoder_head(answers=ANSWERS, rule="blip")


# ---- options


def test_words_of_questions_answers_and_options() -> None:
    head = decoder_head(answer_words=4)
    plain = head.tokenize("Word1, word2?")
    assert plain.keys() == {"question_ids", "question_mask"}
    assert plain["question_ids"].tolist() == [START, 6, 7] + [0] * 22
    assert plain["question_mask"].tolist() == [1] * 3 + [0] * 22
    pair = head.tokenize("word1", "word3s")
    assert pair["answer_ids"].tolist() == [START, 8, VOCABULARY.index("##s"), END]
    assert head.tokenize("word1", "word3")["answer_mask"].tolist() == [1, 1, 1, 0]
    options = head.tokenize("word1", options=("word3s", "word5"))
    assert options.keys() == {"question_ids", "question_mask", "option_ids", "option_mask"}
    for n, option in enumerate(("word3s", "word5")):
        answer = head.tokenize("word1", option)
        assert torch.equal(options["option_ids"][n], answer["answer_ids"])
        assert torch.equal(options["option_mask"][n], answer["answer_mask"])
    trained = head.tokenize("word1", "word5", ("word3s", "word5"))
    assert trained.keys() == head.tokenize("word1", "word5").keys(), "the right option is trained as any answer"


@pytest.mark.parametrize("rule", ["generate", "likelihood", "umt"])
def test_the_likeliest_option_is_chosen(rule: Rule) -> None:
    """By its likelihood, whatever the rule for answers in words; an option need not be among these."""
    answers = () if rule == "generate" else ANSWERS
    (model, head), batch = tiny(answers=answers, rule=rule), make_batch()
    options = [("word4", "word9 word2", "word3"), ("word17s", "word0", "word5"), ANSWERS[:3], ANSWERS[5:]]
    batch |= stacked([head.tokenize(f"word{n}", options=row) for n, row in enumerate(options)])
    states, mask = asked(model, batch)
    whole = torch.stack([likelihoods(head, states, mask, words_of(head, row))[0][q] for q, row in enumerate(options)])
    prediction = model({k: v for k, v in batch.items() if not k.startswith("answer_")})["prediction"]
    assert torch.equal(prediction, whole.argmax(1, keepdim=True)) and prediction.unique().numel() > 1


@pytest.mark.parametrize("filler", ["blank", "words"])
def test_what_fills_up_a_row_of_options_is_never_chosen(filler: str) -> None:
    (model, head), batch = tiny(), make_batch()
    asks = {key: batch[key] for key in (*VIDEO, *make_questions())}
    ids, mask = (part[None, :5].expand(4, -1, -1).clone() for part in LIST)
    expected = model(asks | {"option_ids": ids, "option_mask": mask})["prediction"]
    likeliest = head.generate(*asked(model, batch))[:, None]
    if filler == "blank":
        more, more_mask = torch.zeros(4, 2, 5, dtype=torch.int64), torch.zeros(4, 2, 5, dtype=torch.int64)
    else:  # likelier than all others
        more = torch.cat([torch.full((4, 1, 1), START), likeliest[..., :4]], dim=2).expand(4, 2, 5)
        more_mask = torch.ones_like(more)
        more_mask[..., 2:] = 0
    wider = {"option_ids": torch.cat([ids, more], 1), "option_mask": torch.cat([mask, more_mask], 1)}
    valid = torch.tensor([[1.0] * 5 + [0.0] * 2]).expand(4, -1)
    assert torch.equal(model(asks | wider | {"option_valid": valid})["prediction"], expected)
    assert not torch.equal(model(asks | wider)["prediction"], expected), "without the word that they are no options"
    # one of the options taken away: the next best
    best = torch.ones(4, 7).scatter(1, expected, 0.0) * valid
    second = model(asks | wider | {"option_valid": best})["prediction"]
    assert (second < 5).all() and (second != expected).all()


# ---- generation


def test_generated_texts() -> None:
    (model, head), batch = tiny(), make_batch()
    states, mask = asked(model, batch)
    ids = head.decoder.generate(head.decoder.keys_values(states, mask), START, END, 6)
    assert torch.equal(head.generate(states, mask, max_words=6), ids)
    rows = [row[: row.index(END)] if END in row else row for row in ids.tolist()]
    spoken = [" ".join(VOCABULARY[number] for number in row).replace(" ##", "") for row in rows]
    assert [head.text(row) for row in ids.tolist()] == spoken and any(spoken)
    assert head.generate(states, mask).shape == (4, 4), "as in training, 4 words"
    with torch.no_grad():
        head.decoder.head.bias[END] = 1e4
    assert [head.text(row) for row in head.generate(states, mask).tolist()] == [""] * 4


@pytest.mark.parametrize("answer_words", [2, 5, 7])
def test_prediction_is_generated_without_a_list(answer_words: int) -> None:
    (model, head), batch = tiny(answer_words=answer_words), make_batch()
    features = model({key: batch[key] for key in (*VIDEO, *make_questions())})
    assert features.keys() == {"tokens", "size", "states", "prediction", "scores"}
    states, mask = asked(model, batch)
    expected = head.generate(states, mask)
    assert expected.shape == (4, answer_words - 1) and torch.equal(features["prediction"], expected)
    # word by word, up to the end token
    question, chances = head.decoder.keys_values(states, mask), torch.ones(4)
    ended = torch.zeros(4, dtype=torch.bool)
    for place in range(answer_words - 1):
        before = torch.cat([torch.full((4, 1), START), expected[:, :place]], dim=1)
        likely = head.decoder(before.unsqueeze(1), question)[:, 0, -1].softmax(-1)
        chances = torch.where(ended, chances, chances * likely[torch.arange(4), expected[:, place]])
        ended = ended | (expected[:, place] == END)
    torch.testing.assert_close(features["scores"], chances.unsqueeze(1))


def test_a_list_does_not_bind_what_is_generated() -> None:
    (model, head), batch = tiny(), make_batch()
    listed, _ = tiny(answers=ANSWERS, rule="generate")
    asks = {key: batch[key] for key in (*VIDEO, *make_questions())}
    assert torch.equal(listed(asks)["prediction"], model(asks)["prediction"])
    assert listed.head.text([5, 6, END, 9]) == head.text([5, 6, END, 9]) == "word0 word1"


def test_pieces_of_words_are_joined() -> None:
    (model, head), batch = tiny(), make_batch()
    with torch.no_grad():
        head.decoder.head.bias[VOCABULARY.index("##s")] = 1e4
    states, mask = asked(model, batch)
    assert [head.text(row) for row in head.generate(states, mask, 2).tolist()] == ["##ss"] * 4
    head.questions.vocabulary = ()
    with pytest.raises(ValueError, match=r"expected a vocabulary of 30 words, \[CLS\] and \[SEP\] among them; got 0"):
        head.generate(states, mask)


# ---- folders


@pytest.mark.parametrize(
    "options",
    [
        {"answers": ANSWERS, "rule": "umt", "candidates": 3, "answer_words": 4},
        {"answers": ANSWERS[::-1], "rule": "likelihood", "candidates": 2, "answer_words": 5},
        {"answers": (), "rule": "generate", "candidates": 128, "answer_words": 7},
        {"answers": ("naïve \u2028 word1", "word2"), "rule": "generate", "layers": 3},
    ],
)
def test_how_it_answers_comes_back(options: dict[str, Any], tmp_path: Path) -> None:
    (saved, head), batch = tiny(**options), make_batch()
    saved.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["head"] == "decoder"
    loaded = load_qa_model(tmp_path).eval()
    assert isinstance(loaded.head, DecoderHead)
    for name in ("answers", "rule", "candidates", "answer_words"):
        assert getattr(loaded.head, name) == getattr(head, name)
        assert name not in options or getattr(head, name) == options[name]
        assert name == "answers" or config["head_config"][name] == getattr(head, name)
    assert len(loaded.head.decoder.layers) == options.get("layers", 2) and loaded.head.questions.shape == SHAPE
    asks = {key: batch[key] for key in (*VIDEO, *make_questions())}
    expected = saved(asks)["prediction"]
    assert torch.equal(loaded(asks)["prediction"], expected)
    assert [loaded.head.text(row) for row in expected.tolist()] == [head.text(row) for row in expected.tolist()]


def test_head_of_other_parts() -> None:
    """A head's parts answer under another rule in another head, as they are."""
    (model, head), batch = tiny(), make_batch()
    ranked = DecoderHead(head.questions, head.decoder, ANSWERS, "likelihood")
    assert isinstance(ranked.decoder, BertDecoder) and ranked.state_dict().keys() == head.state_dict().keys()
    states, mask = asked(model, batch)
    asks = {key: batch[key] for key in (*VIDEO, *make_questions())}
    again = VideoQAModel(model.frontend, ranked).eval()(asks)["prediction"]
    assert torch.equal(again, head.rank(states, mask, *words_of(head, ANSWERS)).answers[:, :1])
