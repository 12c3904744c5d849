"""The text encoder and the fusion layers equal UMT's on seeded weights, rows of padding included."""

from __future__ import annotations

import pytest
import torch
from parity.cases import assert_close
from parity.umt import UmtCase, umt_cases

from tempme_vl.text import BertFusion, BertTextEncoder, bert_from_umt, bert_to_umt

CASES = umt_cases("umt_text_*")


def models_of(case: UmtCase, dtype: torch.dtype = torch.float32) -> tuple[BertTextEncoder, BertFusion]:
    text, fusion = bert_from_umt(case.group("w.text_encoder."), heads=case.config["bn"])
    return text.to(dtype).eval(), fusion.to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_text_and_fusion_states(case: UmtCase, dtype: torch.dtype) -> None:
    (text, fusion), t = models_of(case, dtype), case.tensors
    mask = t["in.attention_mask"]
    states = text(t["in.input_ids"], mask)
    assert_close(states, t["out.text_mode"], "text states")

    real = t["in.encoder_attention_mask"].to(dtype).unsqueeze(-1)  # a token that is not real stands for none
    keys = fusion.keys_values(t["in.encoder_hidden_states"].to(dtype), real)
    assert_close(fusion(states, mask, keys), t["out.fusion_mode"], "fusion states")
    reference = t["out.text_mode"].to(dtype)
    assert_close(fusion(reference, mask, keys), t["out.fusion_mode"], "fusion of the reference's states")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sizes_follow_from_the_weights(case: UmtCase) -> None:
    c, (text, fusion) = case.config, models_of(case)
    assert len(text.layers) == c["bf"]
    assert len(fusion.layers) == c["bl"] - c["bf"]
    assert text.shape.positions == c["bp"]
    assert fusion.shape.cross_width == case.tensors["in.encoder_hidden_states"].shape[-1]
    assert text.embeddings.word_embeddings.weight.shape == (c["bv"], c["bh"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_go_back_under_the_same_names(case: UmtCase) -> None:
    state = case.group("w.text_encoder.")
    del state["embeddings.position_ids"]
    actual = bert_to_umt(*models_of(case))
    assert actual.keys() == state.keys()
    assert all(torch.equal(actual[name], value) for name, value in state.items())
