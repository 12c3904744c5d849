"""Tiny random hosts with their real processors, made on the spot: for trying things out on any machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

SIDE = 32  # pixels
WIDTH = 64
_WORDS = ("USER:", "ASSISTANT:")
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_CHAT = (
    "{% for message in messages %}USER: {% for part in message['content'] %}{% if part['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %} "
    "ASSISTANT:"
)


def tiny_host(name: str, texts: Iterable[str], seed: int = 0) -> tuple[Any, Any]:
    """A random model of less than a million weights, and its processor.

    Args:
        name: one of `TINY`.
        texts: whose words, told apart by spaces, are the tokenizer's.

    Raises:
        ValueError: another name.
    """
    if name not in TINY:
        raise ValueError(f"there is no tiny {name!r}; expected one of {', '.join(TINY)}")
    words = sorted({word for text in texts for word in text.split()} | set(_WORDS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = TINY[name](words)
        for part in model.modules():  # the library's 0.02 is for wide models
            if isinstance(part, nn.Embedding):
                nn.init.normal_(part.weight, std=WIDTH**-0.5)
            elif isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=part.in_features**-0.5)
    return model, processor


def _video_llava(words: list[str]) -> tuple[Any, Any]:
    named = {"image_token": "<image>", "video_token": "<video>"}
    tokenizer = word_tokenizer(words, named)
    sizes: dict[str, Any] = {"size": {"height": SIDE, "width": SIDE}, "do_center_crop": False}
    vision = transformers.CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=8,
    )
    ids: dict[str, Any] = {
        f"{kind}_token_index": tokenizer.convert_tokens_to_ids(f"<{kind}>") for kind in ("image", "video")
    }
    config = transformers.VideoLlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**_text(tokenizer)), vision_feature_layer=-1, **ids
    )
    processor = transformers.VideoLlavaProcessor(
        image_processor=transformers.VideoLlavaImageProcessor(**sizes),
        video_processor=transformers.VideoLlavaVideoProcessor(**sizes),
        tokenizer=tokenizer,
        patch_size=8,
    )
    return transformers.VideoLlavaForConditionalGeneration(config), processor


def _qwen2_5_vl(words: list[str]) -> tuple[Any, Any]:
    named = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    around = {f"vision_{side}_token": f"<|vision_{side}|>" for side in ("start", "end")}
    tokenizer = word_tokenizer(words, named | around)
    ids: dict[str, Any] = {f"{n}_id": tokenizer.convert_tokens_to_ids(word) for n, word in (named | around).items()}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    sizes: dict[str, Any] = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
    config = transformers.Qwen2_5_VLConfig(
        vision_config={
            "depth": 4,
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_heads": 4,
            "out_hidden_size": WIDTH,
            "patch_size": 4,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1, 3],
            "tokens_per_second": 2,
            "initializer_range": WIDTH**-0.5,
        },
        text_config={**_text(tokenizer), "rope_parameters": rope, "rope_scaling": rope},
        tie_word_embeddings=False,
        **ids,
    )
    processor = transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**sizes),
        video_processor=transformers.Qwen2VLVideoProcessor(
            **sizes, size={"shortest_edge": 64, "longest_edge": SIDE * SIDE * 16}
        ),
        tokenizer=tokenizer,
        chat_template=_CHAT,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config), processor


TINY: dict[str, Callable[[list[str]], tuple[Any, Any]]] = {"VideoLlava": _video_llava, "Qwen2_5_VL": _qwen2_5_vl}


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


def _text(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
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
