"""UMT's whole retrieval model equals the original: similarities, contrastive loss, matching logits and their loss."""

from __future__ import annotations

import pytest
import torch
from parity.cases import assert_close
from parity.umt import UmtCase, umt_cases
from torch import Tensor

from tempme_vl import MergeSchedule
from tempme_vl.backbones.umt import Mode
from tempme_vl.tasks.losses import matching_loss, negative_weights, same_pairs, soft_contrastive_loss
from tempme_vl.tasks.umt_retrieval import UMTRetrievalModel

CASES = umt_cases("umt_ret_*")


def model_of(case: UmtCase, state: dict[str, Tensor], mode: Mode) -> UMTRetrievalModel:
    c = case.config
    schedule = MergeSchedule.identity(c["d"], c["T"], (c["img"] // c["p"]) ** 2, prefix=0)
    return UMTRetrievalModel.from_umt_state_dict(state, c["h"], c["bn"], c["img"], mode, schedule).eval()


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_retrieval_model(case: UmtCase) -> None:
    c, t, model = case.config, case.tensors, model_of(case, case.group("w."), "joint")
    frames = model.frontend(t["in.video"]).frames
    video, tokens = model.encode_video(t["in.video"])
    text, states = model.encode_text(t["in.input_ids"], t["in.attention_mask"])
    temperature = model.temperature()
    assert_close(frames, t["out.vision_proj"], "frame embeddings")
    assert_close(model.text_proj(states[:, 0]), t["out.text_proj"], "text embeddings")
    assert_close(video @ text.T, t["out.sim_v2t_notemp"], "cosines")
    assert_close(video @ text.T / temperature, t["out.sim_v2t_temp"], "similarities")

    own = torch.arange(c["B"])
    for name, ids in (("loss_vtc", own), ("loss_vtc_dup", t["in.idx_dup"])):
        loss = soft_contrastive_loss(video, text, temperature, same_pairs(ids))
        assert_close(loss, t[f"out.{name}"], name)
    similarity = video @ text.T / temperature
    assert_close(
        negative_weights(similarity, same_pairs(own)), t["out.neg_weights_v2t"], "weights of negative captions"
    )
    assert_close(
        negative_weights(similarity.T, same_pairs(own)), t["out.neg_weights_t2v"], "weights of negative videos"
    )

    keys, mask = model.keys_values(tokens), t["in.attention_mask"]
    all_video, all_text = own.repeat_interleave(c["B"]), own.repeat(c["B"])
    logits = model.fuse(states[all_text], mask[all_text], keys.select(all_video)).unflatten(0, (c["B"], -1))
    assert_close(logits, t["out.itm_logits_v_t"], "matching logits")
    match = model.match_logits(states[all_text], mask[all_text], keys.select(all_video))
    assert torch.equal(match, logits[..., 1].flatten())
    negative_video, negative_text = t["in.neg_video_for_text"], t["in.neg_text_for_video"]
    drawn = torch.cat([logits[own, own], logits[negative_video, own], logits[own, negative_text]])
    assert_close(matching_loss(drawn), t["out.loss_vtm_fixed_neg"], "matching loss")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pretraining_file_loads_whole(case: UmtCase) -> None:
    """Every weight is the one that the original loads from such a file into its retrieval model."""
    (file,) = umt_cases(case.path.stem.replace("_ret_", "_pretrain_ckpt_"))
    sources = file.entry["conversion"]["ret"]["source_of"]
    states = []
    for seed, state in enumerate((file.tensors, {key: file.tensors[names[0]] for key, names in sources.items()})):
        torch.manual_seed(seed)
        states.append(model_of(case, state, "per_frame").state_dict())
    loaded, expected = states
    assert loaded.keys() == expected.keys()
    for name, weight in loaded.items():
        assert torch.equal(weight, expected[name]), name
        # a weight that neither state dict filled is random, hence not equal, or of one value
        assert weight.numel() == 1 or weight.unique().numel() > 1, name
