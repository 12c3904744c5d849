"""Tiny random models whose features merge behind the tower, with their real processors and a tokenizer of letters."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from integrations.tiny import hosts, video
from integrations.tiny_letters import IDS, SPECIAL, TEXT, TOKEN, finished, takes_letters, tokenizer
from integrations.tiny_qwen import glm4v, qwen2_5_omni, qwen2_5_vl, qwen2_vl, qwen3_5, qwen3_vl, qwen3_vl_moe

__all__ = [
    "APART",
    "AXES",
    "BY_OUTPUTS",
    "FRAMES",
    "MODELS",
    "NEEDS",
    "NEW",
    "PLACED",
    "TIMED",
    "TOKEN",
    "TWO_WAYS",
    "build",
    "hosts",
    "placeholder",
    "tokenizer",
    "video",
]

FRAMES = 8
# what the transformers at hand can do: take encoder outputs (5.18 on), and generate from positions of three axes
NEW = "mm_encoder_outputs" in inspect.signature(transformers.InternVLForConditionalGeneration.forward).parameters
PLACED = hasattr(transformers.GenerationMixin, "_prepare_position_ids_for_generation")
NEEDS = {
    **dict.fromkeys(("Qwen2-VL", "Qwen2.5-VL", "Qwen2.5-Omni", "Qwen3.5", "Qwen3.5-MoE"), PLACED),
    **dict.fromkeys(("GLM-4.1V", "GLM-4.5V", "GLM-4.6V"), PLACED),
    **dict.fromkeys(("Qwen3-VL", "Qwen3-VL-MoE"), NEW),
    **dict.fromkeys(("Gemma 4, small", "Gemma 4, large", "Molmo2"), NEW),
}
AXES = tuple(name for name in NEEDS if name.startswith(("Qwen", "GLM")))  # with positions of time, row and column
TIMED = (
    *(name for name in NEEDS if name != "Qwen2-VL"),
    "SmolVLM",
    "VideoLLaMA 3",
)  # told when frames were shown
TWO_WAYS = ("Gemma 4, large", "Molmo2")  # visual tokens attend to each other in both directions
# whose language model gets more than embeddings: features for deeper layers, numbers of tokens
BY_OUTPUTS = ("Qwen3-VL", "Qwen3-VL-MoE", "Gemma 4, small", "Gemma 4, large", "Molmo2")
APART = ("GLM-4.1V", "GLM-4.5V", "GLM-4.6V", "Molmo2", "SmolVLM")  # take images or videos in a prompt, not both


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
        text_config=transformers.Qwen2Config(**TEXT).to_dict(),
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
    return finished(transformers.InternVLForConditionalGeneration(config)), processor


def smolvlm() -> tuple[Any, Any]:
    # the processor's only need of another package is the word for a number
    module = importlib.import_module("transformers.models.smolvlm.processing_smolvlm")
    if module.num2words is None:
        words = [
            "none",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
        ]
        module.num2words = words.__getitem__
    config = transformers.SmolVLMConfig(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "image_size": 32,
            "patch_size": 4,
        },
        text_config=transformers.LlamaConfig(**TEXT).to_dict(),
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
    return finished(transformers.SmolVLMForConditionalGeneration(config)), processor


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
        text_config=transformers.LlamaConfig(**TEXT),
        vision_use_cls_token=True,
        projector_pooling_ratio=2,
        image_token_id=IDS["image_token_id"],
        video_token_id=IDS["video_token_id"],
        tie_word_embeddings=False,
    )
    sizes: dict[str, Any] = {"size": {"height": 32, "width": 32}, "do_center_crop": False}
    names = ("PerceptionLMImageProcessor", "PerceptionLMImageProcessorFast")  # the second one in transformers 4
    processor = takes_letters(transformers.PerceptionLMProcessor)(
        video_processor=transformers.PerceptionLMVideoProcessor(**sizes),
        image_processor=getattr(transformers, next(name for name in names if hasattr(transformers, name)))(
            tile_size=32, max_num_tiles=2, vision_input_type="thumb+tile"
        ),
        tokenizer=tokenizer(),
        patch_size=4,
        pooling_ratio=2,
    )
    return finished(transformers.PerceptionLMForConditionalGeneration(config)), processor


def video_llama_3() -> tuple[Any, Any]:
    family: Any = transformers
    config = family.VideoLlama3Config(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "patch_size": 4,
        },
        text_config=transformers.Qwen2Config(**TEXT).to_dict(),
        image_token_id=IDS["image_token_id"],
        video_token_id=IDS["video_token_id"],
        tie_word_embeddings=False,
    )
    processor = takes_letters(family.VideoLlama3Processor)(
        image_processor=family.VideoLlama3ImageProcessor(
            patch_size=4, size={"shortest_edge": 64, "longest_edge": 1024}
        ),
        tokenizer=tokenizer(),
        video_processor=family.VideoLlama3VideoProcessor(
            patch_size=4, size={"shortest_edge": 64, "longest_edge": 8 * 1024}
        ),
    )
    return finished(family.VideoLlama3ForConditionalGeneration(config)), processor


def gemma4(small: bool) -> tuple[Any, Any]:
    """With embeddings in every layer, as the smaller ones, or with a mask in both directions, as the larger ones."""
    family: Any = transformers
    sizes = {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "hidden_size": 32}
    layered = {"vocab_size_per_layer_input": len(TOKEN), "hidden_size_per_layer_input": 8 if small else 0}
    config = family.Gemma4Config(
        vision_config={
            **sizes,
            "num_attention_heads": 2,
            "head_dim": 16,
            "num_hidden_layers": 2,
            "patch_size": 4,
            "position_embedding_size": 128,
        },
        text_config={
            **TEXT,
            **sizes,
            **layered,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "sliding_window": 64,
            "global_head_dim": 16,
            "use_bidirectional_attention": None if small else "vision",
        },
        audio_config=None,
        tie_word_embeddings=False,
        boi_token_id=TOKEN["<img>"],
        eoi_token_id=TOKEN["</img>"],
        audio_token_id=TOKEN["<|audio|>"],
        image_token_id=IDS["image_token_id"],
        video_token_id=TOKEN["<|video|>"],
    )
    around = {"boi_token": "<img>", "eoi_token": "</img>", "boa_token": "<|boa|>", "eoa_token": "<|eoa|>"}
    processor = takes_letters(family.Gemma4Processor)(
        feature_extractor=family.Gemma4AudioFeatureExtractor(),
        image_processor=family.Gemma4ImageProcessor(patch_size=4, max_soft_tokens=70),
        tokenizer=tokenizer(**around, audio_token="<|audio|>"),
        video_processor=family.Gemma4VideoProcessor(patch_size=4),
    )
    return finished(family.Gemma4ForConditionalGeneration(config)), processor


def molmo2() -> tuple[Any, Any]:
    family: Any = transformers
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    text = {**TEXT, "head_dim": 8, "additional_vocab_size": 4}
    config = family.Molmo2Config(
        vision_config={
            **sizes,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "image_size": [32, 32],
            "patch_size": 4,
        },
        adapter_config={**sizes, "intermediate_size": 48, "text_hidden_size": 32, "vision_feature_layer": [2, 1]},
        text_config={**text, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        image_patch_id=TOKEN["<im_patch>"],
        image_start_token_id=TOKEN["<im_start>"],
        low_res_image_start_token_id=TOKEN["<low_res_im_start>"],
        image_end_token_id=TOKEN["<im_end>"],
        frame_start_token_id=TOKEN["<frame_start>"],
        frame_end_token_id=TOKEN["<frame_end>"],
        tie_word_embeddings=False,
    )
    sides: dict[str, Any] = {"size": {"height": 32, "width": 32}, "patch_size": 4}
    processor = family.Molmo2Processor(
        image_processor=family.Molmo2ImageProcessor(**sides, max_crops=2, overlap_margins=[1, 1]),
        video_processor=family.Molmo2VideoProcessor(**sides, pooling_size=[2, 2]),
        tokenizer=tokenizer(),
    )
    return finished(family.Molmo2ForConditionalGeneration(config)), processor


# what the newer ones of transformers have
_CLASSES = {
    "Qwen2.5-Omni": "Qwen2_5OmniThinkerModel",
    "Qwen3.5": "Qwen3_5ForConditionalGeneration",
    "Qwen3.5-MoE": "Qwen3_5MoeForConditionalGeneration",
    "GLM-4.5V": "Glm4vMoeForConditionalGeneration",
    "GLM-4.6V": "Glm46VForConditionalGeneration",
    "Gemma 4, small": "Gemma4ForConditionalGeneration",
    "Gemma 4, large": "Gemma4ForConditionalGeneration",
    "Molmo2": "Molmo2ForConditionalGeneration",
    "VideoLLaMA 3": "VideoLlama3ForConditionalGeneration",
}
_ALL: dict[str, Callable[[], tuple[Any, Any]]] = {
    "Qwen2-VL": qwen2_vl,
    "Qwen2.5-VL": qwen2_5_vl,
    "Qwen2.5-Omni": qwen2_5_omni,
    "Qwen3-VL": qwen3_vl,
    "Qwen3-VL-MoE": qwen3_vl_moe,
    "Qwen3.5": qwen3_5,
    "Qwen3.5-MoE": partial(qwen3_5, moe=True),
    "GLM-4.1V": partial(glm4v, "Glm4v"),
    "GLM-4.5V": partial(glm4v, "Glm4vMoe"),
    "GLM-4.6V": partial(glm4v, "Glm46V"),
    "VideoLLaMA 3": video_llama_3,
    "Gemma 4, small": partial(gemma4, small=True),
    "Gemma 4, large": partial(gemma4, small=False),
    "Molmo2": molmo2,
    "InternVL": internvl,
    "SmolVLM": smolvlm,
    "PerceptionLM, rotary": perception_lm,
}
MODELS = {name: make for name, make in _ALL.items() if hasattr(transformers, _CLASSES.get(name, "PreTrainedModel"))}


def build(name: str) -> tuple[Any, Any]:
    """A model and its processor, the same ones each time."""
    torch.manual_seed(0)
    return MODELS[name]()


def placeholder(name: str) -> str:
    """A video in a prompt, as the host's chat template writes it."""
    video = SPECIAL["video_token"]
    if "Gemma" in name:
        return "<|video|>"
    if "GLM" in name:
        return f"<|begin_of_video|>{video}<|end_of_video|>"
    return f"{SPECIAL['vision_start_token']}{video}{SPECIAL['vision_end_token']}" if "Qwen" in name else video
