"""TESTA's pre-training and captions equal the original: losses, negatives, gradients, ids that are written."""

from __future__ import annotations

import pytest
import torch
from parity.cases import Case, assert_close, find
from parity.testa import (
    assert_grads,
    batch_of,
    in_reference_order,
    schedule_of,
    text_of,
    tower_of,
    words_of,
)

from tempme_vl.tasks.losses import matching_loss
from tempme_vl.tasks.testa import TestaCaptioner, TestaPretrainingModel
from tempme_vl.tasks.testa.captioning import caption_loss
from tempme_vl.tasks.testa.model import Candidates, ContrastOptions
from tempme_vl.tasks.testa.public import load_public
from tempme_vl.text.beams import Writing
from tempme_vl.text.blip import BlipShape, started

PRETRAIN = find("testa", "testa_pretrain*", outside=True)
CAPTION = find("testa", "testa_caption*", outside=True)


@pytest.mark.parametrize("case", PRETRAIN, ids=str)
def test_one_step_of_pretraining(case: Case) -> None:
    t, out, j, weights = case.tensors, case.group("out."), case.config, case.group("w.")
    c, text = j["config"], text_of(case, j["config"]["heads"])
    frontend = tower_of(weights, c["vh"], c["img"], schedule_of(c, c["T"], c["vdepth"], c))
    options = ContrastOptions(c["queue"], c["momentum"], j["alpha"])
    model = TestaPretrainingModel(frontend, text, words_of(case, text), training=options)
    # the file holds what is tied once, under the encoder's name
    whole = weights | {name: weights[kept] for name, kept in j["tied"].items()}
    converted = load_public(model, whole, queues=True)
    assert not converted.missing and not converted.unused
    model.double().train()
    batch = batch_of(case)
    features = model(batch)
    for ours, theirs in (("video", "video_feat"), ("text", "text_feat")):
        assert_close(features[ours], out[theirs], ours)
    tokens = in_reference_order(features["tokens"], model.frontend.schedule.layer_counts[-1].clips)
    assert_close(tokens, out["video_embeds"], "tokens")
    contrast = model.contrast(features).loss()
    assert_close(contrast, out["loss_vtc"], "contrast")
    for found, name in zip(model.negatives(features, batch), ("weights_t2v", "weights_v2t"), strict=True):
        assert_close(found, out[name], name)
    among = Candidates(features["tokens"], batch["text_ids"], batch["text_mask"], torch.arange(len(tokens)))
    other = out["neg_video_for_text"].long(), out["neg_text_for_video"].long()
    logits = model.match(among, *other)
    assert_close(logits, out["vtm_logits"], "matching logits")
    assert_close(matching_loss(logits), out["loss_vtm"], "matching")
    assert_close(features["caption"], out["loss_lm"], "captions")
    ids = started(t["in.text_ids"], text.shape.decode).unsqueeze(1)
    keys = model.decoder.keys_values(features["tokens"], torch.ones(features["tokens"].shape[:2]))
    real = t["in.text_mask"].bool()
    assert_close(model.decoder(ids, keys).squeeze(1)[real], out["lm_logits"][real], "words")
    (contrast + matching_loss(logits) + features["caption"]).backward()
    assert_grads(case, model)


def captioner_of(case: Case) -> TestaCaptioner:
    j, weights = case.config, case.group("w.")
    c = j["config"]
    frontend = tower_of(weights, c["vh"], c["img"], schedule_of(c, c["T"], c["vdepth"], c))
    words = weights["text_decoder.bert.embeddings.word_embeddings.weight"]
    positions = weights["text_decoder.bert.embeddings.position_embeddings.weight"]
    sizes = {"mlp_width": c["inter"], "cross_width": c["vw"], "vocab_size": len(words), "positions": len(positions)}
    shape = BlipShape(width=words.shape[1], layers=c["layers"], heads=c["heads"], dropout=0.0, **sizes)
    model = TestaCaptioner(frontend, shape, tuple(j["vocab"]), j["prompt"])
    converted = load_public(model, weights)
    assert not converted.missing and not converted.unused
    return model.double().eval()


@pytest.mark.parametrize("case", CAPTION, ids=str)
def test_captions(case: Case) -> None:
    t, model = case.tensors, captioner_of(case)
    batch = {"video": t["in.video"].double().transpose(1, 2)}
    batch |= {"text_ids": t["in.text_ids"], "text_mask": t["in.text_mask"]}
    features = model(batch)
    tokens = in_reference_order(features["tokens"], model.frontend.schedule.layer_counts[-1].clips)
    assert_close(tokens, t["out.video_embeds"], "tokens")
    assert len(model.start) == case.config["prompt_length"]
    assert_close(features["caption"], t["out.loss"], "loss")
    keys = model.decoder.keys_values(features["tokens"], torch.ones(features["tokens"].shape[:2]))
    logits = model.decoder(started(t["in.text_ids"], len(model.vocabulary) - 2).unsqueeze(1), keys).squeeze(1)
    real = t["in.text_mask"].bool()
    assert_close(logits[real], t["out.logits"][real], "words")
    features["caption"].backward()
    assert_grads(case, model)
    whole = caption_loss(model.decoder, features["tokens"], t["in.text_ids"], real)
    assert whole != features["caption"], "the prompt does not count"


@pytest.mark.parametrize(
    ("case", "name"),
    [(case, name) for case in CAPTION for name in case.config["generate_options"] if name in case.config["generated"]],
    ids=str,
)
def test_ids_that_are_written(case: Case, name: str) -> None:
    t, model, o = case.tensors, captioner_of(case), case.config["generate_options"][name]
    with torch.no_grad():
        tokens = model({"video": t["in.video"].double().transpose(1, 2)})["tokens"]
    end, penalty = model.vocabulary.index("[SEP]"), o.get("repetition_penalty", 1.0)
    writing = Writing(end, 0, o["num_beams"], o["max_length"], o["min_length"], penalty)
    assert torch.equal(model.generate(tokens, writing), t[f"out.gen.{name}.ids"])
    assert model.caption(tokens, writing) == [text.strip() for text in case.config["generated"][name]]
