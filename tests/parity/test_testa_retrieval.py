"""TESTA's retrieval equals the original: one training step with momentum and queue, gradients, and re-ranking."""

from __future__ import annotations

import pytest
import torch
from parity.cases import Case, assert_close, find
from parity.testa import assert_grads, batch_of, in_reference_order, retrieval_of, with_drawn
from parity.testa_ranks import step
from torch import Tensor
from training.processes import run

from tempme_vl.evaluation.rerank import rerank
from tempme_vl.tasks.losses import matching_loss
from tempme_vl.tasks.testa.contrast import Contrast
from tempme_vl.tasks.testa.public import public_names
from tempme_vl.text.tokenizers import BlipWords

CASES = find("testa", "testa_retrieval*", without="ranks", outside=True)


def rows(contrast: Contrast) -> dict[str, Tensor]:
    (v, t), (target_v, target_t) = contrast
    return {"sim_v2t": v, "sim_t2v": t, "targets_v2t": target_v, "targets_t2v": target_t}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_step(case: Case) -> None:
    out, model, batch = case.group("out."), retrieval_of(case), batch_of(case)
    features = model(batch)
    for ours, theirs in (
        ("tokens", "video_embeds"),
        ("video", "video_feat"),
        ("text", "text_feat"),
        ("momentum_video", "video_feat_m"),
        ("momentum_text", "text_feat_m"),
    ):
        found = features[ours]
        if ours == "tokens":
            found = in_reference_order(found, model.frontend.schedule.layer_counts[-1].clips)
        assert_close(found, out[theirs], ours)
    contrast = model.contrast(features, batch)
    for name, value in rows(contrast).items():
        assert_close(value, out[name], name)
    for_text, for_video, _ = model.negatives(features, batch)
    assert_close(for_text, out["weights_t2v"], "weights of videos")
    assert_close(for_video, out["weights_v2t"], "weights of texts")
    logits = with_drawn(model, features, batch, out)
    assert_close(logits, out["vtm_logits"], "matching logits")
    assert_close(contrast.loss(), out["loss_vtc"], "contrast")
    assert_close(matching_loss(logits), out["loss_vtm"], "matching")
    (contrast.loss() + matching_loss(logits)).backward()
    assert_grads(case, model)
    model.enqueue(features, batch)
    for ours, theirs in (("video", "image_queue"), ("text", "text_queue"), ("ids", "idx_queue"), ("place", "ptr")):
        assert_close(getattr(model.queue, ours), out[theirs], f"queue of {ours}")
    names = {public: name for name, public in public_names(model).items()}
    for public, value in case.group("out.after.").items():
        assert_close(model.state_dict()[names[public]], value, public)


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_reranked_scores(case: Case) -> None:
    t, j, model = case.tensors, case.config["eval"], retrieval_of(case).eval()
    if "out.eval_scores_t2v" not in t:
        pytest.skip("no evaluation in the file")
    # by the weights that the training step before has not moved: copies alone have
    video, tokens = model.encode_video(t["in.eval_video"].double().transpose(1, 2))
    ids, mask = t["in.eval_ids"], t["in.eval_mask"]
    similarity = model.encode_text(ids, mask) @ video.T
    given = {"device": torch.device("cpu"), "top_k": j["k_test"], "progress": False, "adds_similarity": True}
    found = rerank(model, tokens, ids, mask, similarity, **given)
    assert_close(found.t2v, t["out.eval_scores_t2v"], "text to video")
    assert_close(found.v2t, t["out.eval_scores_v2t"], "video to text")


@pytest.mark.parametrize("case", find("testa", "testa_retrieval*ranks*", outside=True), ids=str)
def test_one_step_of_several_ranks(case: Case) -> None:
    j, t = case.config, case.tensors
    weights = case.path.with_name(case.path.name.replace("_ranks", ""))
    ranks = run(step, case.path, weights, j["clips_per_rank"], world=j["world"])
    for number, found in enumerate(ranks):
        for name, value in case.group(f"out.rank{number}.").items():
            if not name.startswith("neg_"):
                assert_close(found[name], value, f"{name} of rank {number}")
        assert_close(found["queue"], t["out.image_queue"], "queue")
        assert torch.equal(found["ids"], t["out.idx_queue"].long())
        assert found["place"].item() == j["ptr_after"]
        expected = case.group("grad.")
        for name, grad in expected.items():
            value = found[f"grad.{name}"].reshape(grad.shape)
            assert_close(value, grad, name, 1e-5 * max(1, grad.abs().max().item()))
        assert expected


@pytest.mark.parametrize("case", find("testa", "testa_*", without="video", outside=True), ids=str)
def test_ids_of_texts(case: Case) -> None:
    j = case.config
    if "vocab" not in j:
        pytest.skip("no words in the file")
    read = [(j[name], key) for name, key in (("captions", "in.text"), ("questions", "in.q")) if name in j]
    assert read
    for texts, key in read:
        ids, mask = case.tensors[f"{key}_ids"], case.tensors[f"{key}_mask"]
        tokenize = BlipWords(tuple(j["vocab"])).tokenizer(ids.shape[1])
        for row, text in enumerate(texts):
            found, real = tokenize(j.get("prompt", "") + text)
            assert torch.equal(found, ids[row]) and torch.equal(real, mask[row]), text
