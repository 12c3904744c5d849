"""Other libraries: the versions the package was tested with, and what it uses of them that they do not document.

All of it stands in `LIBRARIES`; tests/test_libraries.py compares the list with the code, and docs/libraries.md shows
it. Code that touches one of these names runs in `undocumented`: outside the tested versions it warns once, and where a
name is gone it says so, and what to do.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version


class LibraryChangedError(RuntimeError):
    """A library lacks something that the package needs of it; the message names its version and the tested ones."""


@dataclass(frozen=True)
class Use:
    """Names of a library that one file uses and the library does not document.

    Attributes:
        file: below tempme_vl/.
        names: imports, dotted; and attributes of objects of the library, as they are called there.
    """

    file: str
    names: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class Library:
    """The lowest and the highest version that the tests passed with, and what is used that is not documented."""

    lowest: str
    highest: str
    uses: tuple[Use, ...]


# by the name that pip knows
LIBRARIES: dict[str, Library] = {
    "torch": Library(
        "2.8.0",
        "2.14.1",
        (
            Use(
                "backbones/linear.py",
                ("torch.utils._python_dispatch._get_current_dispatch_mode", "_linear_pointwise"),
                "oneDNN's product with a bias, as torch.compile calls it; whether somebody counts torch's operators",
            ),
            Use("tasks/qa/llm.py", ("_apply",), "Module.to: rounded buffers of a language model displace its words"),
            Use("tasks/videollm.py", ("_apply",), "as in tasks/qa/llm.py"),
        ),
    ),
    "transformers": Library(
        "4.57.6",
        "5.24.0",
        (
            Use(
                "backbones/hf.py",
                ("encoder", "timm_model", "vision_model", "visual_projection"),
                "parts of a vision tower, which its own forward calls; all children are checked by name",
            ),
            Use(
                "backbones/hf_blocks.py",
                (
                    "lambda_1",
                    "lambda_2",
                    "layer_norm1",
                    "layer_norm2",
                    "layer_scale1",
                    "layer_scale2",
                    "layernorm_after",
                    "layernorm_before",
                    "scaling",
                ),
                "children of a block, called one by one, as merging goes between them; all are checked by name",
            ),
            Use(
                "integrations/compressed.py",
                ("mm_encoder_outputs",),
                "the argument of forward that takes features of a video (5.18 and newer); inputs_embeds without it",
            ),
            Use(
                "integrations/base.py",
                ("image_processor", "video_processor", "vision_tower"),
                "the host's own preprocessing, whether a processor reads images, and the tower of most hosts",
            ),
            Use(
                "integrations/instructblip_video.py",
                ("language_projection", "qformer", "qformer_tokenizer", "query_tokens", "vision_model"),
                "tower, Q-Former and projector",
            ),
            Use(
                "integrations/internvl.py",
                ("end_image_token", "image_token", "start_image_token"),
                "the words around a frame in the prompt",
            ),
            Use(
                "integrations/layer_attention.py",
                ("_attn_implementation",),
                "an attention module is called once more for the queries that are read, as it gives its weights",
            ),
            Use(
                "integrations/layer_run.py",
                ("_attn_implementation", "post_attention_layernorm", "self_attn"),
                "children of a language model's layers, on which hooks are; they are checked by name",
            ),
            Use(
                "integrations/layers.py",
                ("is_gradient_checkpointing",),
                "layers that run twice are refused where tokens become fewer between them",
            ),
            Use(
                "integrations/llava_next_video.py",
                ("multi_modal_projector", "vision_resampler"),
                "pooling and projector",
            ),
            Use(
                "integrations/llava_onevision.py",
                ("apply_pooling", "image_newline", "multi_modal_projector"),
                "pooling and projector, and the token behind a video",
            ),
            Use(
                "integrations/perception_lm.py",
                (
                    "gelu",
                    "linear_1",
                    "linear_2",
                    "multi_modal_projector",
                    "num_prefix_tokens",
                    "timm_model",
                    "vision_tower",
                ),
                "tower and projector, without its pooling where tokens have merged",
            ),
            Use(
                "integrations/gemma4.py",
                ("boi_token", "eoi_token", "max_soft_tokens", "video_processor"),
                "the words around a frame, and patches with padding",
            ),
            Use("integrations/glm4v.py", ("replace_frame_token_id",), "what the processor writes for a frame"),
            Use(
                "integrations/molmo2.py",
                (
                    "create_mm_token_type_ids",
                    "get_video_string",
                    "max_fps",
                    "video_processor",
                    "video_use_col_tokens",
                ),
                "what the processor writes for a frame, which words the mask takes as visual, and the assumed time",
            ),
            Use(
                "integrations/qwen.py",
                (
                    "_prepare_position_ids_for_generation",
                    "get_rope_index",
                    "video_processor",
                    "vision_end_token",
                    "vision_start_token",
                ),
                "positions of time, row and column that generate must keep, and the words around a clip",
            ),
            Use("integrations/qwen2_5_omni.py", ("videos_kwargs",), "sizes that the processor sets"),
            Use(
                "integrations/qwen_attention.py",
                ("proj", "qkv", "scaling"),
                "the attention of a block, with other keys than its own forward takes",
            ),
            Use(
                "integrations/qwen_parts.py",
                (
                    "attn",
                    "blocks",
                    "get_vision_bilinear_indices_and_weights",
                    "get_vision_interpolation_indices_and_weights",
                    "get_vision_position_ids",
                    "get_vision_window_index",
                    "interpolation_align_corners",
                    "interpolation_mode",
                    "num_grid_per_side",
                    "patch_size",
                    "pos_embed",
                    "rotary_pos_emb",
                    "spatial_merge_size",
                ),
                "what goes into the first block of a tower, and the order of its patches. The tower's class, all "
                "children of it and of its blocks are checked by name",
            ),
            Use("integrations/qwen_readings.py", ("scaling",), "the scale of a block's attention"),
            Use(
                "integrations/qwen_tower.py",
                (
                    "_attn_implementation",
                    "attn",
                    "blocks",
                    "deepstack_merger_list",
                    "deepstack_visual_indexes",
                    "merger",
                    "mlp",
                    "norm1",
                    "norm2",
                    "spatial_merge_size",
                ),
                "children of a tower and its blocks, called one by one, as merging goes between them",
            ),
            Use(
                "integrations/readings.py",
                ("post_layernorm", "vision_model"),
                "SigLIP's pooling head, asked how it attends to a frame",
            ),
            Use(
                "integrations/smolvlm.py",
                (
                    "DEFAULT_MEDIA_OUTTRO",
                    "DEFAULT_VIDEO_INTRO",
                    "FRAME_TIMESTAMP_MESSAGE",
                    "fake_image_token",
                    "global_image_token",
                    "image_token",
                    "num2words",
                    "text_model",
                    "video_processor",
                    "vision_model",
                ),
                "tower and decoder, and the words that the processor puts around frames",
            ),
            Use(
                "integrations/video_llama_3.py",
                ("merge_size", "video_processor", "vision_model"),
                "tower, and patches of a token's side",
            ),
            Use("integrations/video_llava.py", ("multi_modal_projector", "video_tower"), "tower and projector"),
        ),
    ),
    "open_clip_torch": Library(
        "3.0.0",
        "3.3.0",
        (
            Use(
                "backbones/open_clip_models.py",
                (
                    "open_clip.transformer.VisionTransformer",
                    "preprocess_cfg",
                    "visual",
                    "head_width",
                    "timm_model_name",
                    "timm_model_pretrained",
                ),
                "the visual tower of a model, and how it wants its pixels",
            ),
            Use(
                "backbones/open_clip_blocks.py",
                (
                    "open_clip.transformer.QuickGELU",
                    "open_clip.transformer.ResidualAttentionBlock",
                    "open_clip.transformer.VisionTransformer",
                    "attn_pool",
                    "c_fc",
                    "in_proj_bias",
                    "in_proj_weight",
                    "ln_post",
                    "out_proj",
                    "output_dim",
                    "patch_dropout",
                    "pool_type",
                    "resblocks",
                    "transformer",
                ),
                "a tower is taken apart once, when it is loaded; a block's children are checked by name",
            ),
            Use(
                "text/clip.py",
                (
                    "open_clip.transformer.TextTransformer",
                    "attn_mask",
                    "pool_type",
                    "resblocks",
                    "text_pool_type",
                    "transformer",
                ),
                "the text tower, taken apart as the visual one",
            ),
            Use("backbones/timm.py", ("pool", "trunk"), "open_clip's wrapper of a tower of timm"),
        ),
    ),
    "timm": Library(
        "1.0.31",
        "1.0.31",
        (
            Use(
                "backbones/timm.py",
                (
                    "timm.models.vision_transformer.Attention",
                    "timm.models.vision_transformer.Block",
                    "_model_args",
                    "act",
                    "attn_drop",
                    "attn_pool",
                    "drop_path1",
                    "drop_path2",
                    "fc2",
                    "fc_norm",
                    "global_pool",
                    "has_class_token",
                    "head_drop",
                    "img_size",
                    "k_norm",
                    "ls1",
                    "ls2",
                    "no_embed_class",
                    "num_prefix_tokens",
                    "patch_drop",
                    "pool_include_prefix",
                    "proj_drop",
                    "q_norm",
                ),
                "children of a tower and its blocks, called one by one, as merging goes between them; a block's "
                "children are checked by name. _model_args: the options of create_model, to build the tower again",
            ),
            Use("integrations/perception_lm.py", ("grid_size", "rope"), "whether a tower rotates, and its grid"),
        ),
    ),
    "deepspeed": Library(
        "0.17.0",
        "0.19.8",
        (
            Use(
                "training/distributed.py",
                ("__compatible_ops__",),
                "CPU: else an all-reduce for inference is compiled at start, for which there is no use",
            ),
            Use(
                "training/whole.py",
                ("ds_shape", "fp32_partitioned_groups_flat"),
                "the whole shape of a partitioned parameter, and a rank's parts as the optimizer has them (ZeRO-3)",
            ),
            Use("tasks/qa/llm.py", ("ds_id",), "whether parameters are partitioned, so that ranks generate in step"),
            Use("tasks/videollm.py", ("ds_id",), "as in tasks/qa/llm.py"),
        ),
    ),
    "peft": Library(
        "0.17.0",
        "0.21.2",
        (
            Use(
                "integrations/devices.py",
                ("active_adapters", "disable_adapters", "modules_to_save", "original_module"),
                "the copy of a tower that is trained in the place of the tower",
            ),
        ),
    ),
    "accelerate": Library(
        "1.15.0",
        "1.15.0",
        (Use("integrations/devices.py", ("_hf_hook", "hooks"), "where a part of a model that is offloaded runs"),),
    ),
    "lmms-eval": Library(
        "0.7.0",
        "0.7.3",
        (
            Use(
                "lmms_eval/__init__.py", ("lmms_eval.models.registry_v2.ModelManifest",), "how a plug-in says its name"
            ),
            Use(
                "lmms_eval/model.py",
                ("lmms_eval.api.instance.GenerationResult", "lmms_eval.api.model.lmms", "task_dict"),
                "the base class of models, and what an answer is",
            ),
        ),
    ),
}


def describe(package: str) -> str:
    """ "timm 1.0.31, tested with 1.0.17 to 1.0.31" """
    library = LIBRARIES[package]
    return f"{package} {_installed(package) or 'of unknown version'}, tested with {library.lowest} to {library.highest}"


@lru_cache
def check(package: str) -> None:
    """Warns, once in a process, of a version outside the tested ones."""
    library, installed = LIBRARIES[package], _installed(package)
    if installed and not _numbers(library.lowest) <= _numbers(installed) <= _numbers(library.highest):
        warnings.warn(
            f"tempme_vl uses undocumented parts of {package}: {describe(package)}. {_advice(package)}",
            stacklevel=2,
        )


@contextmanager
def undocumented(package: str) -> Iterator[None]:
    """Around code, or on a function, that uses what stands in `LIBRARIES[package]`.

    Raises:
        LibraryChangedError: in place of an ImportError or AttributeError in there.
    """
    check(package)
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise LibraryChangedError(
            f"tempme_vl found a part of {package} missing or changed: {error} ({describe(package)}). {_advice(package)}"
        ) from error


def _advice(package: str) -> str:
    library = LIBRARIES[package]
    return f"If anything fails, install a tested version: pip install '{package}>={library.lowest},<={library.highest}'"


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    """The release: (1, 0) for "1.0.0.dev3", as trailing zeros say nothing."""
    release = re.match(r"\d+(\.\d+)*", text)
    numbers = [int(part) for part in release[0].split(".")] if release else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)
