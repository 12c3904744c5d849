"""Tiny random models of the Qwen family, and of those built like it."""

from __future__ import annotations

from typing import Any

import transformers
from integrations.tiny_letters import IDS, TEXT, TOKEN, byte_tokenizer, finished, takes_letters, tokenizer

_QWEN_SIZES: dict[str, Any] = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}


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
            "fullatt_block_indexes": [2],
            "tokens_per_second": 2,  # as published
        },
        text_config={**TEXT, "rope_parameters": _rope([1, 1, 2]), "rope_scaling": _rope([1, 1, 2])},
        tie_word_embeddings=False,
        **IDS,
    )
    processor = takes_letters(transformers.Qwen2_5_VLProcessor)(
        image_processor=transformers.Qwen2VLImageProcessor(**_QWEN_SIZES),
        tokenizer=tokenizer(),
        video_processor=transformers.Qwen2VLVideoProcessor(
            **_QWEN_SIZES, size={"shortest_edge": 64, "longest_edge": 1024}
        ),
    )
    return finished(transformers.Qwen2_5_VLForConditionalGeneration(config)), processor


def qwen2_vl() -> tuple[Any, Any]:
    config = transformers.Qwen2VLConfig(
        vision_config={
            "depth": 3,
            "embed_dim": 32,
            "mlp_ratio": 2,
            "num_heads": 2,
            "hidden_size": 32,  # of the language model
            "patch_size": 4,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
        },
        text_config={**TEXT, "rope_parameters": _rope([1, 1, 2]), "rope_scaling": _rope([1, 1, 2])},
        tie_word_embeddings=False,
        **IDS,
    )
    processor = takes_letters(transformers.Qwen2VLProcessor)(
        image_processor=transformers.Qwen2VLImageProcessor(**_QWEN_SIZES),
        tokenizer=tokenizer(),
        video_processor=transformers.Qwen2VLVideoProcessor(
            **_QWEN_SIZES, size={"shortest_edge": 64, "longest_edge": 1024}
        ),
    )
    return finished(transformers.Qwen2VLForConditionalGeneration(config)), processor


def qwen3_vl() -> tuple[Any, Any]:
    config = transformers.Qwen3VLConfig(
        vision_config={**_QWEN3_TOWER, "deepstack_visual_indexes": [0, 1]},
        text_config={**TEXT, "head_dim": 8, "rope_parameters": _rope([2, 1, 1]), "rope_scaling": _rope([2, 1, 1])},
        tie_word_embeddings=False,
        **IDS,
    )
    return finished(transformers.Qwen3VLForConditionalGeneration(config)), _qwen3_processor(tokenizer())


def qwen3_vl_moe() -> tuple[Any, Any]:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    rope = {"rope_parameters": _rope([2, 1, 1]), "rope_scaling": _rope([2, 1, 1])}
    config = transformers.Qwen3VLMoeConfig(
        vision_config={**_QWEN3_TOWER, "deepstack_visual_indexes": [0, 1]},
        text_config={**TEXT, **experts, **rope, "head_dim": 8},
        tie_word_embeddings=False,
        **IDS,
    )
    return finished(transformers.Qwen3VLMoeForConditionalGeneration(config)), _qwen3_processor(tokenizer())


def qwen3_5(moe: bool = False) -> tuple[Any, Any]:
    family: Any = transformers
    name = "Qwen3_5Moe" if moe else "Qwen3_5"
    mixed = {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    experts["shared_expert_intermediate_size"] = 16
    rope = {**_rope([2, 1, 1]), "partial_rotary_factor": 1.0}
    config = getattr(family, f"{name}Config")(
        vision_config=_QWEN3_TOWER,
        text_config={**TEXT, **mixed, **(experts if moe else {}), "head_dim": 8, "rope_parameters": rope},
        tie_word_embeddings=False,
        **IDS,
    )
    return finished(getattr(family, f"{name}ForConditionalGeneration")(config)), _qwen3_processor(byte_tokenizer())


_QWEN3_TOWER: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "num_position_embeddings": 16,
}


def _qwen3_processor(tokenizer: Any) -> Any:
    return takes_letters(transformers.Qwen3VLProcessor)(
        image_processor=transformers.Qwen2VLImageProcessor(**_QWEN_SIZES),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen3VLVideoProcessor(
            **_QWEN_SIZES, size={"shortest_edge": 64, "longest_edge": 8 * 1024}
        ),
    )


def _rope(section: list[int]) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section, "mrope_interleaved": True}


def qwen2_5_omni() -> tuple[Any, Any]:
    family: Any = transformers
    config = family.Qwen2_5OmniThinkerConfig(
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 40,  # a frame has 100352 pixels or more
            "window_size": 160,
            "fullatt_block_indexes": [1],
        },
        audio_config={"encoder_layers": 1, "d_model": 32, "encoder_attention_heads": 2, "encoder_ffn_dim": 32},
        text_config={**TEXT, "rope_parameters": _rope([1, 1, 2]), "rope_scaling": _rope([1, 1, 2])},
        audio_token_index=TOKEN["<|audio|>"],
        audio_start_token_id=TOKEN["<|boa|>"],
        audio_end_token_id=TOKEN["<|eoa|>"],
        image_token_index=IDS["image_token_id"],
        video_token_index=IDS["video_token_id"],
        vision_start_token_id=IDS["vision_start_token_id"],
        tie_word_embeddings=False,
    )
    around = {"vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"}
    sound = {"audio_token": "<|audio|>", "audio_bos_token": "<|boa|>", "audio_eos_token": "<|eoa|>"}
    sizes = {**_QWEN_SIZES, "patch_size": 40}
    processor = family.Qwen2_5OmniProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(
            **sizes, size={"shortest_edge": 160 * 160, "longest_edge": 320 * 320}
        ),
        video_processor=transformers.Qwen2VLVideoProcessor(**sizes),
        feature_extractor=transformers.WhisperFeatureExtractor(feature_size=128),
        tokenizer=tokenizer(**around, **sound),
    )
    return finished(family.Qwen2_5OmniThinkerForConditionalGeneration(config)), processor


def glm4v(kind: str) -> tuple[Any, Any]:
    """Glm4v, Glm4vMoe or Glm46V, which has the parts of the first."""
    family: Any = transformers
    marks = {
        f"{what}_{side}_token_id": TOKEN[f"<|{mark}_of_{what}|>"]
        for what in ("image", "video")
        for side, mark in (("start", "begin"), ("end", "end"))
    }
    tower = {
        **{name: size for name, size in _QWEN3_TOWER.items() if name != "num_position_embeddings"},
        "image_size": 16,
    }
    rope = {**_rope([1, 1, 2]), "partial_rotary_factor": 1.0}
    text = {**TEXT, "rope_parameters": rope, "rope_scaling": rope}
    if kind == "Glm4vMoe":
        text |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    parts = family.Glm4vMoeConfig if kind == "Glm4vMoe" else family.Glm4vConfig
    own = parts(vision_config=tower, text_config=text)
    config = getattr(family, f"{kind}Config")(
        vision_config=own.vision_config.to_dict(),
        text_config=own.text_config.to_dict(),
        image_token_id=IDS["image_token_id"],
        video_token_id=IDS["video_token_id"],
        tie_word_embeddings=False,
        **marks,
    )
    sizes = {**_QWEN_SIZES, "size": {"shortest_edge": 64, "longest_edge": 8 * 1024}}
    read = kind.removesuffix("Moe")
    processor = takes_letters(getattr(family, f"{read}Processor"))(
        image_processor=getattr(family, f"{read}ImageProcessor")(**sizes),
        tokenizer=tokenizer(),
        video_processor=getattr(family, f"{read}VideoProcessor")(**sizes),
    )
    return finished(getattr(family, f"{kind}ForConditionalGeneration")(config)), processor
