"""UMT's question answering equals the original: question states, training loss, losses of answers, both rankings."""

from __future__ import annotations

import pytest
import torch
from parity.cases import assert_close
from parity.umt import UmtCase, umt_cases
from safetensors.torch import load_file
from torch import Tensor

from tempme_vl import MergeSchedule
from tempme_vl.tasks.qa import DecoderHead, VideoQAModel
from tempme_vl.tasks.qa.umt import umt_qa_from_state_dict

CASES = umt_cases("umt_qa_*")


def model_of(case: UmtCase, state: dict[str, Tensor]) -> tuple[VideoQAModel, DecoderHead]:
    c = case.config
    schedule = MergeSchedule.identity(c["d"], c["T"], (c["img"] // c["p"]) ** 2, prefix=0)
    model = umt_qa_from_state_dict(state, c["h"], c["bn"], c["img"], "joint", schedule).eval()
    assert isinstance(model.head, DecoderHead)
    return model, model.head


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_question_states_and_training_loss(case: UmtCase) -> None:
    (model, _), t = model_of(case, case.group("w.")), case.tensors
    answers, counts = len(t["in.train_weights"]), t["in.train_k"]
    batch = {
        "video": t["in.video"],
        "frame_mask": torch.ones(t["in.video"].shape[:2]),
        "question_ids": t["in.question_ids"],
        "question_mask": t["in.question_mask"],
        "answer_ids": t["in.answer_ids"][:answers],
        "answer_mask": t["in.answer_mask"][:answers],
        "answer_row": torch.arange(len(counts)).repeat_interleave(counts),
        "answer_weight": t["in.train_weights"],
        "valid": torch.ones(len(counts)),
    }
    features = model(batch)
    assert_close(features["states"], t["out.question_states"], "question states")
    assert_close(model.loss(features, batch), t["out.train_loss"], "training loss")


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_answers_and_their_order(case: UmtCase) -> None:
    (model, head), t, k = model_of(case, case.group("w.")), case.tensors, case.config["K"]
    ids, mask, question_mask = t["in.answer_ids"], t["in.answer_mask"], t["in.question_mask"]
    video = model({"video": t["in.video"], "frame_mask": torch.ones(t["in.video"].shape[:2])})
    keys = head.questions.keys_values(video["tokens"], video["size"])
    states = head.questions(t["in.question_ids"], question_mask, keys)
    assert_close(states, t["out.question_states"], "question states")
    question = head.decoder.keys_values(states, question_mask)
    every = (len(question), *ids.shape)
    start = ids[:1, :1].expand(len(question), 1, 1)
    assert_close(head.decoder(start, question)[:, 0, 0], t["out.start_logits"], "logits of the first word")
    losses = head.decoder.sequence_loss(ids.expand(every), mask.expand(every), question)
    assert_close(losses, t["out.seq_loss"], "losses of all answers")

    for name, candidates in ((f"k{k}", k), ("all", len(ids))):
        ranking = head.rank(states, question_mask, ids, mask, candidates, rule="umt")
        assert torch.equal(ranking.answers, t[f"out.rank_ids_{name}"]), name
        assert_close(ranking.probabilities, t[f"out.rank_probs_{name}"], f"probabilities of {name}")
    once = head.rank(states, question_mask, ids, mask, k, rule="likelihood")
    assert torch.equal(once.answers[:, 0], t["out.top1_first_token_once"])


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_pretraining_file_fills_the_decoder(case: UmtCase) -> None:
    """From the fusion layers, the text encoder's words and its language head, as fine-tuning starts."""
    file = load_file(str(case.path).replace("_qa_", "_pretrain_ckpt_"))
    _, head = model_of(case, file)
    text, fusion_layers, decoder = head.questions.text, head.questions.fusion, head.decoder
    assert len(decoder.layers) == len(fusion_layers.layers)
    own, fusion = decoder.state_dict(), fusion_layers.state_dict()
    assert fusion and all(torch.equal(own[name], value) for name, value in fusion.items())
    for name, value in text.embeddings.state_dict().items():
        assert torch.equal(own[f"embeddings.{name}"], value)
    assert torch.equal(own["head.dense.weight"], file["text_encoder.cls.predictions.transform.dense.weight"])
    assert torch.equal(own["head.bias"], file["text_encoder.cls.predictions.bias"])
