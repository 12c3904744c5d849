"""Starting from public BERT weights: transformers' names, those of older files, and what must not change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bert_reference import bert_config
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertForMaskedLM

from tempme_vl.tasks.qa.create import create_qa_model
from tempme_vl.text import BertDecoder, BertFusion, BertShape, BertTextEncoder
from tempme_vl.text.bert_weights import load_bert, load_bert_decoder, read_bert
from tempme_vl.text.tokenizers import word_vocabulary

SHAPE = BertShape.named("tiny", width=48, cross_width=32, vocab_size=40)


def masked_lm() -> BertForMaskedLM:
    torch.manual_seed(3)
    model = BertForMaskedLM(bert_config(SHAPE, SHAPE.layers)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def write(folder: Path, state: dict[str, Tensor]) -> Path:
    save_file({key: value.contiguous().clone() for key, value in state.items()}, folder / "model.safetensors")
    return folder


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As bert-base-uncased's file on the hub has them."""
    pairs = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for key, value in state.items():
        for ours, theirs in pairs.items():
            key = key.replace(ours, theirs)
        renamed[key] = value
    return renamed


@pytest.mark.parametrize("old", [False, True])
def test_without_a_video_the_text_side_is_that_bert(old: bool, tmp_path: Path) -> None:
    host = masked_lm()
    state = host.state_dict()
    bert = read_bert(write(tmp_path, old_names(state) if old else state))
    text, fusion = BertTextEncoder(SHAPE).eval(), BertFusion(SHAPE).eval()
    before = {key: value.clone() for key, value in fusion.state_dict().items() if "crossattention" in key}
    load_bert(text, fusion, bert)
    assert before and all(torch.equal(fusion.state_dict()[key], value) for key, value in before.items())
    with torch.no_grad():  # a cross-attention that adds nothing, so that only its norm is left
        for layer in fusion.layers:
            layer.crossattention.output = Nothing()
        ids, mask = torch.randint(5, 40, (2, 7)), torch.ones(2, 7, dtype=torch.int64)
        states = fusion(text(ids, mask), mask, fusion.keys_values(torch.randn(2, 3, 32)))
        expected = host.bert(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)


class Nothing(torch.nn.Module):
    def forward(self, seen: Tensor, x: Tensor) -> Tensor:
        return x


def test_the_decoder_starts_from_the_last_layers_and_the_language_head(tmp_path: Path) -> None:
    host = masked_lm()
    bert = read_bert(write(tmp_path, host.state_dict()))
    decoder = BertDecoder(SHAPE, 2)
    load_bert_decoder(decoder, bert)
    own = decoder.state_dict()
    for layer in range(2):
        theirs = host.bert.encoder.layer[layer + 1].state_dict()
        assert theirs and all(torch.equal(own[f"layers.{layer}.{key}"], value) for key, value in theirs.items())
    words = host.bert.embeddings.word_embeddings.weight
    assert torch.equal(own["embeddings.word_embeddings.weight"], words)
    assert torch.equal(own["head.dense.weight"], host.cls.predictions.transform.dense.weight)
    assert torch.equal(own["head.bias"], host.cls.predictions.bias)


def test_a_model_by_name_starts_from_it(tmp_path: Path) -> None:
    """What no BERT has is new; with a UMT checkpoint nothing but the classifier would be."""
    words = word_vocabulary([f"word{i}" for i in range(35)])
    shape = BertShape.named("tiny", vocab_size=len(words))
    torch.manual_seed(0)
    host = BertForMaskedLM(bert_config(shape, shape.layers))
    folder = str(write(tmp_path, host.state_dict()))
    model = create_qa_model(
        "open_clip:tiny", words, "decoder", ("word1",), None, "none", 4, text="tiny", text_pretrained=folder
    )
    layer = model.head.questions.text.layers[0]
    assert torch.equal(layer.output.dense.weight, host.bert.encoder.layer[0].output.dense.weight)
    new = {name for name, _ in model.named_parameters() if model.is_new_parameter(name)}
    assert new == {name for name, _ in model.named_parameters() if ".fusion." in name and ".crossattention." in name}
    scratch = create_qa_model("open_clip:tiny", words, "classifier", ("word1",), None, "none", 4)
    of_head = {name for name, _ in scratch.named_parameters() if name.startswith("head.")}
    assert {name for name, _ in scratch.named_parameters() if scratch.is_new_parameter(name)} == of_head


def test_berts_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected model.safetensors in .*; found \[\]"):
        read_bert(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read as a checkpoint"):
        read_bert(tmp_path)
    with pytest.raises(ValueError, match=r"expected the weights of a BERT in .*; got names like \['x'\]"):
        read_bert(write(tmp_path, {"x": torch.zeros(1)}))
    state = masked_lm().state_dict()
    bert = read_bert(write(tmp_path, {key: value for key, value in state.items() if ".layer.2." not in key}))
    with pytest.raises(ValueError, match=r"does not fit the text side: 16 missing: .*layer\.2"):
        load_bert(BertTextEncoder(SHAPE), BertFusion(SHAPE), bert)
    other = BertShape.named("tiny", width=64, vocab_size=40)
    with pytest.raises(ValueError, match=r"of other shapes: .* \(40, 48\) instead of \(40, 64\)"):
        load_bert_decoder(BertDecoder(other, 1), bert)
