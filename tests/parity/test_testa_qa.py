"""TESTA's question answering equals the original: the loss, gradients, the ranking of a list, and what it writes."""

from __future__ import annotations

import pytest
import torch
from parity.cases import Case, assert_close, find
from parity.testa import assert_grads, in_reference_order, schedule_of
from torch import Tensor, nn

from tempme_vl.tasks.qa.blip import BlipDecoderHead, qa_from_testa_state_dict
from tempme_vl.tasks.qa.model import VideoQAModel

CASES = find("testa", "testa_vqa*", outside=True)


def model_of(case: Case) -> VideoQAModel:
    j, weights = case.config, case.group("w.")
    c = j["config"]
    schedule = schedule_of(c, c["T"], c["vdepth"], c)
    given = weights, c["vh"], c["heads"], c["img"], schedule, tuple(j["vocab"]), 0.0
    return qa_from_testa_state_dict(*given).double().eval()


def head_of(model: VideoQAModel) -> BlipDecoderHead:
    assert isinstance(model.head, BlipDecoderHead)
    return model.head


def asked(case: Case) -> dict[str, Tensor]:
    t = case.tensors
    video = t["in.video"].double().transpose(1, 2)
    mask = torch.ones(video.shape[:2])
    return {"video": video, "frame_mask": mask, "question_ids": t["in.q_ids"], "question_mask": t["in.q_mask"]}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradients(case: Case) -> None:
    t, model = case.tensors, model_of(case)
    rows = torch.arange(len(t["in.q_ids"])).repeat_interleave(t["in.n"].long())
    batch = asked(case) | {"answer_ids": t["in.a_ids"], "answer_mask": t["in.a_mask"], "answer_row": rows}
    batch |= {"answer_weight": t["in.weights"].double(), "valid": torch.ones(len(t["in.q_ids"]))}
    features = model(batch)
    tokens = in_reference_order(features["tokens"], model.frontend.schedule.layer_counts[-1].clips)
    assert_close(tokens, t["out.video_embeds"], "tokens")
    assert_close(features["states"], t["out.question_states"], "states of questions")
    assert_close(features["losses"], t["out.loss_per_answer"], "losses of answers")
    loss = model.loss(features, batch)
    assert_close(loss, t["out.loss"], "loss")
    loss.backward()
    parts = {"frontend": model.frontend, "text": head_of(model).questions.text, "decoder": head_of(model).decoder}
    assert_grads(case, nn.ModuleDict(parts))


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_ranking_of_a_list(case: Case) -> None:
    t, j, model = case.tensors, case.config, model_of(case)
    head, states = head_of(model), model(asked(case))["states"]
    ids, mask, k = t["in.list_ids"], t["in.list_mask"], j["k_test"]
    question = head.decoder.keys_values(states, t["in.q_mask"])
    assert_close(head._first_words(question, ids).exp(), t["out.rank.first_token_prob"], "first words")
    ranking = head.rank(states, t["in.q_mask"], ids, mask, k)
    expected, place = t["out.rank.topk_ids"].long().sort(1)
    found, own_place = ranking.answers.sort(1)
    assert torch.equal(found, expected)
    shares = t["out.rank.neg_loss"].double().softmax(1).gather(1, place)
    assert_close(ranking.probabilities.gather(1, own_place), shares, "shares")
    best = ranking.answers[:, 0].tolist()
    assert best == t["out.rank.choice"].tolist()
    assert [j["answer_list"][number] for number in best] == j["rank_answers"]
    ranked = BlipDecoderHead(head.questions, head.decoder, tuple(j["answer_list"]), "likelihood", k, ids.shape[1])
    made = ranked(*(model(asked(case))[name] for name in ("tokens", "size")), asked(case))
    assert [ranked.text(row) for row in made["prediction"].tolist()] == j["rank_answers"]


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_answers_that_are_written(case: Case) -> None:
    t, o, model = case.tensors, case.config["generate_options"], model_of(case)
    head, states = head_of(model), model(asked(case))["states"]
    # the original lets answers look at the padding of questions
    written = head.generate(states, torch.ones_like(t["in.q_mask"]), o["max_length"] - 1)
    expected = t["out.generate.ids"][:, 1:]
    assert head.beams == o["num_beams"]
    assert torch.equal(written[:, : expected.shape[1]], expected) and not written[:, expected.shape[1] :].any()
    assert [head.text(row) for row in written.tolist()] == case.config["generated"]
