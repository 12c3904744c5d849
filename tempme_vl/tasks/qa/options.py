"""What the heads that answer questions can be told; plain data, read from a command line without importing torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

TEMPLATE = "Question: {question} Short answer:"  # BLIP-2's, which models without a chat format understand, too
Rule = Literal["likelihood", "umt", "generate"]
Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[str, ...] = get_args(Dtype)


@dataclass(frozen=True)
class BertOptions:
    """The heads classifier and decoder: BERT reads questions."""

    text: str | None = None
    """Size of the text side: bert-base, bert-large or tiny; default: UMT's own, bert-base for CLIP."""
    text_pretrained: str | None = None
    """A BERT that the text side starts from: a folder with model.safetensors or a hub name."""
    max_words: int = 25
    """Word pieces kept of a question, [CLS] included; of a language model's prompt, the template included."""


@dataclass(frozen=True)
class DecoderOptions(BertOptions):
    """The head decoder."""

    answer_words: int = 5
    """Word pieces kept of an answer, [CLS] and [SEP] included; of a language model's, its end token included."""
    rule: Rule | None = None
    """How the decoder answers: by log p(answer); UMT's own, which counts the first word twice; or word by word."""
    candidates: int = 128
    """Answers that the decoder scores whole: those with the likeliest first words."""


@dataclass(frozen=True)
class LLMOptions:
    """The head llm: a language model of transformers."""

    llm: str | None = None
    """The language model: a folder or a hub name, with safetensors weights."""
    template: str = TEMPLATE
    """Its prompt, with {question} in it."""
    max_words: int = 64
    answer_words: int = 8
    train_llm: bool = False
    """Train the language model whole; without it and without LoRA it stays as it is."""
    lora_rank: int = 0
    """LoRA on the language model; 0 for none."""
    lora_alpha: int = 16
    """The update is scaled by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Rate on the input of LoRA."""
    dtype: Dtype = "float32"
    """Of the language model's weights."""


# heads whose options have names of their own on the command line of the recipe
NAMED: dict[str, type[Any]] = {"classifier": BertOptions, "decoder": DecoderOptions, "llm": LLMOptions}
