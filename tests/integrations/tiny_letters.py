"""What tiny models of `tiny_post` are made with: a tokenizer of letters, sizes, random weights."""

from __future__ import annotations

from typing import Any

import transformers
from integrations.tiny import _finish
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "fake_image_token": "<fake>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}
# further words of processors, which know them by heart
MARKS = (
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
    *("<|image|>", "<|video|>", "<|audio|>", "<image|>", "<|boa|>", "<|eoa|>"),
    *(
        "<im_patch>",
        "<im_col>",
        "<im_start>",
        "<low_res_im_start>",
        "<frame_start>",
        "<im_end>",
        "<frame_end>",
        "<im_low>",
    ),
)
LETTERS = [chr(code) for code in range(32, 127)] + ["\n"]
_FIRST = ("<pad>", "<s>", "</s>", "<unk>", *SPECIAL.values(), *MARKS)
TOKEN = {letter: number for number, letter in enumerate([*_FIRST, *LETTERS])}

TEXT: dict[str, Any] = {
    "vocab_size": len(TOKEN),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
IDS: dict[str, Any] = {
    "image_token_id": TOKEN["<|image_pad|>"],
    "video_token_id": TOKEN["<|video_pad|>"],
    "vision_start_token_id": TOKEN["<|vision_start|>"],
    "vision_end_token_id": TOKEN["<|vision_end|>"],
}
_NAMED: dict[str, Any] = {
    "pad_token": "<pad>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "padding_side": "left",
    "model_input_names": ["input_ids", "attention_mask"],
}


def _special(named: dict[str, str]) -> dict[str, str]:
    return {**SPECIAL, **{f"mark_{number}": mark for number, mark in enumerate(MARKS)}, **named}


def tokenizer(**named: str) -> PreTrainedTokenizerFast:
    """Every letter is a token, so that each letter of a time that a host writes counts.

    Args:
        named: further tokens by the names that processors know them by.
    """
    letters = Tokenizer(models.WordLevel(TOKEN, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    letters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=letters, extra_special_tokens=_special(named), **_NAMED)


def byte_tokenizer() -> Any:
    """The same in the one class that AutoTokenizer reads for Qwen3.5, whatever class was saved."""
    names = {" ": "\u0120", "\n": "\u010a"}
    family: Any = transformers
    vocabulary = {names.get(key, key): TOKEN[key] for key in TOKEN}
    return family.Qwen3_5Tokenizer(vocab=vocabulary, merges=[], extra_special_tokens=_special({}), **_NAMED)


def takes_letters(processor: Any) -> Any:
    """A class of processors; that of transformers 4 names the tokenizers that it takes."""
    if hasattr(processor, "tokenizer_class"):
        processor.tokenizer_class = "AutoTokenizer"
    return processor


def finished(model: Any) -> Any:
    model = _finish(model)
    model.generation_config.suppress_tokens = list(range(len(_FIRST)))
    model.generation_config.eos_token_id = None
    return model
