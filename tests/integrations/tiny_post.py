"""Tiny random models whose features merge behind the tower, with their real processors and a tokenizer of letters."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers
from integrations.tiny import _finish, hosts, video
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

__all__ = ["FRAMES", "MODELS", "NEEDS", "NEW", "PLACED", "TOKEN", "build", "hosts", "placeholder", "video"]

FRAMES = 8
# what the transformers at hand can do: take encoder outputs (5.18 on), and generate from positions of three axes
NEW = "mm_encoder_outputs" in inspect.signature(transformers.InternVLForConditionalGeneration.forward).parameters
PLACED = hasattr(transformers.GenerationMixin, "_prepare_position_ids_for_generation")
NEEDS = {"Qwen2.5-VL": PLACED, "Qwen3-VL": NEW}
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
LETTERS = [chr(code) for code in range(32, 127)] + ["\n"]
TOKEN = {letter: number for number, letter in enumerate(["<pad>", "<s>", "</s>", "<unk>", *SPECIAL.values(), *LETTERS])}

_TEXT: dict[str, Any] = {
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
_IDS: dict[str, Any] = {
    "image_token_id": TOKEN["<|image_pad|>"],
    "video_token_id": TOKEN["<|video_pad|>"],
    "vision_start_token_id": TOKEN["<|vision_start|>"],
    "vision_end_token_id": TOKEN["<|vision_end|>"],
}
_QWEN_SIZES: dict[str, Any] = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}


def tokenizer() -> PreTrainedTokenizerFast:
    """Every letter is a token, so that each letter of a time that a host writes counts."""
    letters = Tokenizer(models.WordLevel(TOKEN, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=letters,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=SPECIAL,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def _takes_letters(processor: Any) -> Any:
    """A class of processors; that of transformers 4 names the tokenizers that it takes."""
    if hasattr(processor, "tokenizer_class"):
        processor.tokenizer_class = "AutoTokenizer"
    return processor


def _finished(model: Any) -> Any:
    model = _finish(model)
    model.generation_config.suppress_tokens = list(range(4 + len(SPECIAL)))
    model.generation_config.eos_token_id = None
    return model


def qwen2_5_vl() -> tuple[Any, Any]:
    config = transformers.Qwen2_5_VLConfig(
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 4,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,  # as published
        },
        text_config={**_TEXT, "rope_parameters": _rope([1, 1, 2]), "rope_scaling": _rope([1, 1, 2])},
        tie_word_embeddings=False,
        **_IDS,
    )
    processor = _takes_letters(transformers.Qwen2_5_VLProcessor)(
        image_processor=transformers.Qwen2VLImageProcessor(**_QWEN_SIZES),
        tokenizer=tokenizer(),
        video_processor=transformers.Qwen2VLVideoProcessor(
            **_QWEN_SIZES, size={"shortest_edge": 64, "longest_edge": 1024}
        ),
    )
    return _finished(transformers.Qwen2_5_VLForConditionalGeneration(config)), processor


def qwen3_vl() -> tuple[Any, Any]:
    config = transformers.Qwen3VLConfig(
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 4,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        text_config={**_TEXT, "head_dim": 8, "rope_parameters": _rope([2, 1, 1]), "rope_scaling": _rope([2, 1, 1])},
        tie_word_embeddings=False,
        **_IDS,
    )
    processor = _takes_letters(transformers.Qwen3VLProcessor)(
        image_processor=transformers.Qwen2VLImageProcessor(**_QWEN_SIZES),
        tokenizer=tokenizer(),
        video_processor=transformers.Qwen3VLVideoProcessor(
            **_QWEN_SIZES, size={"shortest_edge": 64, "longest_edge": 8 * 1024}
        ),
    )
    return _finished(transformers.Qwen3VLForConditionalGeneration(config)), processor


def _rope(section: list[int]) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section, "mrope_interleaved": True}


def internvl() -> tuple[Any, Any]:
    config = transformers.InternVLConfig(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "image_size": [32, 32],
            "patch_size": [4, 4],
        },
        text_config=transformers.Qwen2Config(**_TEXT).to_dict(),
        image_token_id=TOKEN["<IMG_CONTEXT>"],
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    processor = transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(size={"height": 32, "width": 32}),
        tokenizer=tokenizer(),
        video_processor=transformers.InternVLVideoProcessor(size={"height": 32, "width": 32}),
        image_seq_length=16,
    )
    return _finished(transformers.InternVLForConditionalGeneration(config)), processor


def smolvlm() -> tuple[Any, Any]:
    # the processor's only need of another package is the word for a number
    module = importlib.import_module("transformers.models.smolvlm.processing_smolvlm")
    if module.num2words is None:
        words = ["none", "one", "two", "three", "four", "five", "six", "seven", "eight"]
        module.num2words = words.__getitem__  # type: ignore[attr-defined]
    config = transformers.SmolVLMConfig(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "image_size": 32,
            "patch_size": 4,
        },
        text_config=transformers.LlamaConfig(**_TEXT).to_dict(),
        image_token_id=TOKEN["<|image_pad|>"],
        scale_factor=2,
        tie_word_embeddings=False,
    )
    edges: dict[str, Any] = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 32}}
    processor = transformers.SmolVLMProcessor(
        image_processor=transformers.SmolVLMImageProcessor(**edges),
        tokenizer=tokenizer(),
        video_processor=transformers.SmolVLMVideoProcessor(**edges),
        image_seq_len=16,
    )
    return _finished(transformers.SmolVLMForConditionalGeneration(config)), processor


def perception_lm() -> tuple[Any, Any]:
    tower = {
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "img_size": [32, 32],
        "patch_size": 4,
        "ref_feat_shape": (8, 8),
    }
    config = transformers.PerceptionLMConfig(
        vision_config=transformers.TimmWrapperConfig(
            architecture="vit_pe_core_tiny_patch16_384", model_args={**tower, "global_pool": ""}
        ),
        text_config=transformers.LlamaConfig(**_TEXT),
        vision_use_cls_token=True,
        projector_pooling_ratio=2,
        image_token_id=_IDS["image_token_id"],
        video_token_id=_IDS["video_token_id"],
        tie_word_embeddings=False,
    )
    sizes: dict[str, Any] = {"size": {"height": 32, "width": 32}, "do_center_crop": False}
    names = ("PerceptionLMImageProcessor", "PerceptionLMImageProcessorFast")  # the second one in transformers 4
    processor = _takes_letters(transformers.PerceptionLMProcessor)(
        video_processor=transformers.PerceptionLMVideoProcessor(**sizes),
        image_processor=getattr(transformers, next(name for name in names if hasattr(transformers, name)))(
            tile_size=32, max_num_tiles=2, vision_input_type="thumb+tile"
        ),
        tokenizer=tokenizer(),
        patch_size=4,
        pooling_ratio=2,
    )
    return _finished(transformers.PerceptionLMForConditionalGeneration(config)), processor


MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "Qwen2.5-VL": qwen2_5_vl,
    "Qwen3-VL": qwen3_vl,
    "InternVL": internvl,
    "SmolVLM": smolvlm,
    "PerceptionLM, rotary": perception_lm,
}


def build(name: str) -> tuple[Any, Any]:
    """A model and its processor, the same ones each time."""
    torch.manual_seed(0)
    return MODELS[name]()


def placeholder(name: str) -> str:
    """A video in a prompt, as the host's chat template writes it."""
    video = SPECIAL["video_token"]
    return f"{SPECIAL['vision_start_token']}{video}{SPECIAL['vision_end_token']}" if "Qwen" in name else video
