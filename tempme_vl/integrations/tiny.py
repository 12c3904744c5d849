"""Tiny random hosts with their real processors, made on the spot: for trying things out on any machine.

What one is made of is said by its `Host` (`Host.tiny`); here is what all of them share.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

from tempme_vl.integrations.base import Host
from tempme_vl.integrations.hosts import HOSTS

SIDE = 32  # pixels
WIDTH = 64
_ENDING = "ForConditionalGeneration"  # of the names of classes, which those of tiny hosts leave out
_WORDS = ("USER:", "ASSISTANT:")
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def tiny_names() -> list[str]:
    """Of the hosts that there is a tiny one of. One that a host inherits is another host's."""
    return list(_tiny_hosts())


def _tiny_hosts() -> dict[str, type[Host]]:
    return {name.removesuffix(_ENDING): host for name, host in HOSTS.items() if "tiny" in vars(host)}


def tiny_host(name: str, texts: Iterable[str], seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A random model of less than a million weights, and its processor.

    Args:
        name: one of `tiny_names`.
        texts: whose words, told apart by spaces, are the tokenizer's.

    Raises:
        ValueError: another name.
    """
    hosts = _tiny_hosts()
    if name not in hosts:
        raise ValueError(f"there is no tiny {name!r}; expected one of {', '.join(hosts)}")
    words = sorted({word for text in texts for word in text.split()} | set(_WORDS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = hosts[name].tiny(words)
        for part in model.modules():  # the library's 0.02 is for wide models
            if isinstance(part, nn.Embedding):
                nn.init.normal_(part.weight, std=WIDTH**-0.5)
            elif isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=part.in_features**-0.5)
    return model, processor


def word_tokenizer(words: Iterable[str], named: Mapping[str, str]) -> PreTrainedTokenizerFast:
    """Of whole words, with <s> in front of every text.

    Args:
        words: have the numbers behind those of <pad>, <s>, </s>, <unk> and the named ones.
        named: special tokens by the names that processors know them by, such as video_token.
    """
    numbers = {word: number for number, word in enumerate(dict.fromkeys((*_SPECIAL, *named.values(), *words)))}
    whole = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    whole.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=whole,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=dict(named),
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
    )


def text_sizes(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Of a language model of two layers that knows the tokenizer's words."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "initializer_range": WIDTH**-0.5,  # it stays as it is but for LoRA, and the library's 0.02 would do nothing
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
