"""Tiny random video-language models with their real processors and a tokenizer of words, all built here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

FRAMES, SIDE, PATCH = 4, 32, 8  # 16 patches a frame
WORDS = (
    *("what", "is", "the", "dog", "man", "doing", "in", "this", "video", "and", "that", "one", "why", "how", "many"),
    *("red", "blue", "two", "car", "runs", "sleeps", "eats"),
)
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<video>", "<image>")
TOKEN = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
NEW_WORDS = 4  # of an answer
ASK = "what is the dog doing in this <video> ?"

# transformers 4 checks the classes of a processor's parts
_TOKENIZER: Any = PreTrainedTokenizerFast
if not hasattr(transformers, "TokenizersBackend"):
    _TOKENIZER = transformers.LlamaTokenizerFast

_TEXT = {
    "vocab_size": len(TOKEN),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
_SIZES = {"size": {"height": SIDE, "width": SIDE}, "do_center_crop": False}
_PINPOINTS = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]]  # an image is itself and a tile or two


def tokenizer(named: bool = True) -> PreTrainedTokenizerFast:
    """Words, with <s> in front of every text and padding on the right, as language models are trained.

    Args:
        named: it knows its placeholders as video_token and image_token, which InstructBLIP's does not.
    """
    words = Tokenizer(models.WordLevel(TOKEN, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _TOKENIZER(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"video_token": "<video>", "image_token": "<image>"} if named else {},
        padding_side="right",
    )


def _finish(model: Any) -> Any:
    """Random weights large enough that what a model sees changes what it writes."""
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)
        elif weight.ndim == 1 and (weight == 0).all():
            torch.nn.init.normal_(weight, std=0.05)
    model.generation_config.pad_token_id = 0
    model.generation_config.suppress_tokens = list(range(len(SPECIAL)))  # words only, and as many as are asked for
    return model.eval()


def video_llava() -> tuple[Any, Any]:
    config = transformers.VideoLlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_VISION),
        text_config=transformers.LlamaConfig(**_TEXT),
        video_token_index=TOKEN["<video>"],
        image_token_index=TOKEN["<image>"],
    )
    processor = transformers.VideoLlavaProcessor(
        image_processor=transformers.VideoLlavaImageProcessor(**_SIZES),
        video_processor=transformers.VideoLlavaVideoProcessor(**_SIZES),
        tokenizer=tokenizer(),
        patch_size=PATCH,
    )
    return _finish(transformers.VideoLlavaForConditionalGeneration(config)), processor


def llava_next_video() -> tuple[Any, Any]:
    config = transformers.LlavaNextVideoConfig(
        vision_config=transformers.CLIPVisionConfig(**_VISION),
        text_config=transformers.LlamaConfig(**_TEXT),
        video_token_index=TOKEN["<video>"],
        image_token_index=TOKEN["<image>"],
        image_grid_pinpoints=_PINPOINTS,
    )
    processor = transformers.LlavaNextVideoProcessor(
        video_processor=transformers.LlavaNextVideoVideoProcessor(**_SIZES),
        image_processor=transformers.LlavaNextImageProcessor(
            **_SIZES, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=_PINPOINTS
        ),
        tokenizer=tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return _finish(transformers.LlavaNextVideoForConditionalGeneration(config)), processor


def llava_onevision() -> tuple[Any, Any]:
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**_VISION, vision_use_head=False),
        text_config=transformers.Qwen2Config(**_TEXT),
        video_token_index=TOKEN["<video>"],
        image_token_index=TOKEN["<image>"],
        image_grid_pinpoints=_PINPOINTS,
    )
    processor = transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(**_SIZES, image_grid_pinpoints=_PINPOINTS),
        tokenizer=tokenizer(),
        video_processor=transformers.LlavaOnevisionVideoProcessor(**_SIZES),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
    )
    return _finish(transformers.LlavaOnevisionForConditionalGeneration(config)), processor


def instructblip_video() -> tuple[Any, Any]:
    vision = transformers.InstructBlipVideoVisionConfig(**_VISION)
    qformer = transformers.InstructBlipVideoQFormerConfig(
        vocab_size=len(TOKEN),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        encoder_hidden_size=32,
        pad_token_id=0,
    )
    config = transformers.InstructBlipVideoConfig(
        vision_config=vision.to_dict(),
        qformer_config=qformer.to_dict(),
        text_config=transformers.LlamaConfig(**_TEXT).to_dict(),
        num_query_tokens=3,
        video_token_index=TOKEN["<video>"],
    )
    processor = transformers.InstructBlipVideoProcessor(
        video_processor=transformers.InstructBlipVideoVideoProcessor(**_SIZES),
        tokenizer=tokenizer(named=False),
        qformer_tokenizer=tokenizer(named=False),
        num_query_tokens=3,
    )
    model = _finish(transformers.InstructBlipVideoForConditionalGeneration(config))
    model.language_model.generation_config = model.generation_config
    return model, processor


def perception_lm() -> tuple[Any, Any]:
    tower = {"embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": [SIDE, SIDE], "patch_size": PATCH}
    config = transformers.PerceptionLMConfig(
        vision_config=transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=tower),
        text_config=transformers.LlamaConfig(**_TEXT),
        vision_use_cls_token=True,
        projector_pooling_ratio=2,
        image_token_id=TOKEN["<image>"],
        video_token_id=TOKEN["<video>"],
    )
    names = ("PerceptionLMImageProcessor", "PerceptionLMImageProcessorFast")  # the second one in transformers 4
    image_processor = getattr(transformers, next(name for name in names if hasattr(transformers, name)))
    processor = transformers.PerceptionLMProcessor(
        video_processor=transformers.PerceptionLMVideoProcessor(**_SIZES),
        image_processor=image_processor(tile_size=SIDE, max_num_tiles=2, vision_input_type="thumb+tile"),
        tokenizer=tokenizer(),
        patch_size=PATCH,
        pooling_ratio=2,
    )
    return _finish(transformers.PerceptionLMForConditionalGeneration(config)), processor


MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "VideoLlava": video_llava,
    "LlavaNextVideo": llava_next_video,
    "LlavaOnevision": llava_onevision,
    "InstructBlipVideo": instructblip_video,
    "PerceptionLM": perception_lm,
}


def feeds(name: str) -> list[str]:
    """Ways into a model that this version of transformers has."""
    forward = getattr(transformers, f"{name}ForConditionalGeneration").forward
    if name == "InstructBlipVideo" or "mm_encoder_outputs" not in inspect.signature(forward).parameters:
        return ["embeddings"]  # InstructBLIP's own generate runs its tower whatever it is given
    return ["encoder_outputs", "embeddings"]


# older ones write other words: refused
READS_IN_PARTS = Version(transformers.__version__) >= Version("5.23")
BEAMS_BY_TOKEN = Version(transformers.__version__) >= Version("5.19")


def mixes_up(inputs: Mapping[str, Any]) -> bool:
    """Whether this transformers would repeat tokens one by one for beams."""
    outputs = inputs.get("mm_encoder_outputs", {}).values()
    return not BEAMS_BY_TOKEN and any(output.pooler_output[0].shape[0] == 1 for output in outputs)


# what a table of versions says of hosts with one way in
ONE_WAY = {
    "embeddings": "video features go in by `inputs_embeds` alone",
    "encoder_outputs": "video features go in by `mm_encoder_outputs` alone",
}


def hosts(names: Sequence[str]) -> Callable[[Any], Any]:
    """Parametrizes a test; where no host runs in this transformers there is no test, rather than a skipped one."""

    def decorate(test: Any) -> Any:
        test.__test__ = bool(names)
        return pytest.mark.parametrize("name", names)(test)

    return decorate


def build(name: str) -> tuple[Any, Any]:
    """A model and its processor, the same ones each time."""
    torch.manual_seed(0)
    return MODELS[name]()


def video(number: int, frames: int = FRAMES, side: int = SIDE) -> np.ndarray:
    """(frames, side, side, 3) uint8, another video for every number."""
    return np.random.default_rng(number).integers(0, 256, (frames, side, side, 3), dtype=np.uint8)


def native_inputs(processor: Any, text: list[str], videos: list[np.ndarray]) -> Any:
    """What the host's own processor makes of prompts with one video each."""
    if "InstructBlip" in type(processor).__name__:  # writes the video in front by itself
        text = [" ".join(prompt.replace("<video>", " ").split()) for prompt in text]
        return processor(text=text, images=videos, return_tensors="pt", padding=True)
    return processor(text=text, videos=videos, return_tensors="pt", padding=True)


def schedule(method: str, layers: int) -> dict[str, Any]:
    """Options of a method for a tower of `layers` blocks that are run."""
    if method == "tempme":
        joins = {"merge_layers": (layers - 2, layers - 1), "merge_frames": (2, 2)}
        return {"r": 2, **joins, "cross_percent": 40, "intra_percent": 20}
    return {"tome": {"r": 3}, "none": {}}[method]


def new_tokens(compressed: Any, text: Any, videos: Any, fps: Any = 24.0, **options: Any) -> Tensor:
    options = {"max_new_tokens": NEW_WORDS, "do_sample": False, **options}
    with torch.no_grad():
        return compressed.generate(**compressed.prepare(text, videos, fps=fps), **options)


@torch.no_grad()
def native_words(host: Any, native: Any, record: Callable[[str, object], None], **options: Any) -> Tensor:
    """What the host writes: its language model, on the embeddings that its own forward makes of the video, at its own
    positions where they have several axes.

    Its `generate` writes the same from the video itself. Only with beams some versions of transformers fail there, as
    they expand the video wrongly (GLM's of all versions: they count another token); that is told to `record`.
    """
    seen: dict[str, Any] = {}
    hook = host.language_model.register_forward_pre_hook(lambda *a: seen.update(a[2]), with_kwargs=True)
    host.model(**native)
    hook.remove()
    options = {"max_new_tokens": NEW_WORDS, "do_sample": False, **options}
    positions = seen.get("position_ids")
    placed = {"position_ids": positions} if positions is not None and positions.ndim == 3 else {}
    asked = {"inputs_embeds": seen["inputs_embeds"], "attention_mask": native["attention_mask"], **placed}
    written = host.target.generate(**asked, **options)[:, -NEW_WORDS:]
    known = Version(transformers.__version__) >= Version("5.23") and not type(host.model).__name__.startswith("Glm")
    strict = "num_beams" not in options or known
    try:
        own: Any = host.model.generate(**native, **options)[:, -NEW_WORDS:]
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if strict:
            raise
        own = None
        record("note", f"the host's own beam search from a video fails: {type(error).__name__}")
    if own is not None and not torch.equal(own, written):
        assert not strict, f"{own} from the video, {written} from its embeddings"
        record("note", "the host's own beam search from a video differs from that on its own embeddings")
    return written
