"""Video-language models of transformers that read few tokens of a video, without a change to them.

A new one is a file with a `Host` and a line in `HOSTS`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from torch import nn

from tempme_vl.integrations.base import Costs, Feed, Host, SampledVideo, VisualTokens
from tempme_vl.integrations.compressed import Compressed, read_config
from tempme_vl.integrations.instructblip_video import InstructBlipVideoHost
from tempme_vl.integrations.internvl import InternVLHost
from tempme_vl.integrations.llava_next_video import LlavaNextVideoHost
from tempme_vl.integrations.llava_onevision import LlavaOnevisionHost
from tempme_vl.integrations.perception_lm import PerceptionLMHost
from tempme_vl.integrations.qwen2_5_vl import Qwen2_5_VLHost
from tempme_vl.integrations.qwen3_vl import Qwen3VLHost
from tempme_vl.integrations.smolvlm import SmolVLMHost
from tempme_vl.integrations.video_llava import VideoLlavaHost

__all__ = [
    "HOSTS",
    "Compressed",
    "Costs",
    "Feed",
    "Host",
    "SampledVideo",
    "VisualTokens",
    "compress",
    "find_host",
    "load_compressed",
]

# by the name of the model's class
HOSTS: dict[str, type[Host]] = {
    "VideoLlavaForConditionalGeneration": VideoLlavaHost,
    "LlavaNextVideoForConditionalGeneration": LlavaNextVideoHost,
    "LlavaOnevisionForConditionalGeneration": LlavaOnevisionHost,
    "InstructBlipVideoForConditionalGeneration": InstructBlipVideoHost,
    "PerceptionLMForConditionalGeneration": PerceptionLMHost,
    "Qwen2_5_VLForConditionalGeneration": Qwen2_5_VLHost,
    "Qwen3VLForConditionalGeneration": Qwen3VLHost,
    "InternVLForConditionalGeneration": InternVLHost,
    "SmolVLMForConditionalGeneration": SmolVLMHost,
}


def find_host(name: str) -> type[Host]:
    """The host of a model's class.

    Raises:
        ValueError: an unknown one.
    """
    if name not in HOSTS:
        raise ValueError(
            f"{name} is no video-language model that can be compressed; known are {', '.join(HOSTS)}. Another one "
            "needs a Host of its own (tempme_vl/integrations/base.py)"
        )
    return HOSTS[name]


def _unwrapped(model: Any) -> Any:
    """The host model inside peft's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def compress(
    model: Any,
    processor: Any,
    method: str = "tempme",
    num_frames: int = 8,
    clip_position_std: float = 0.0,
    feed: Feed | None = None,
    **options: Any,
) -> Compressed:
    """A model that reads few tokens of a video; prints its tokens and costs beside the host's own.

    Nothing in the model is patched, replaced or added, and it works on beside its compressed self; both share their
    weights.

    Args:
        model: a video-language model of transformers, one of `HOSTS`, or peft's wrapper of one.
        processor: its processor.
        method: "tempme", "tome" or "none".
        num_frames: F, frames sampled of every video.
        clip_position_std: TempMe's clip positions start as N(0, std^2); 0 starts at the pretrained function.
        feed: see `Compressed`.
        options: the method's own, as in `make_schedule`: r, merge_layers, ...

    Raises:
        ValueError: another model, or options that do not fit it.
    """
    inner = _unwrapped(model)
    host = find_host(type(inner).__name__).create(inner, processor, method, num_frames, options)
    for weight in host.merging.parameters():
        nn.init.normal_(weight, std=clip_position_std)
    compressed = Compressed(host, model, feed)
    print(compressed.describe())
    return compressed


def load_compressed(
    directory: str | Path, model: Any = None, processor: Any = None, feed: Feed | None = None, **options: Any
) -> Compressed:
    """What `Compressed.save_pretrained` wrote.

    Args:
        directory: with tempme.json, and with the model and its processor if these are not given.
        model, processor: to use in place of those of the folder, such as a model with peft's adapter.
        feed: see `Compressed`.
        options: of the model's `from_pretrained`, such as dtype and device_map.

    Raises:
        ValueError: a folder of something else, or a model of another class than the saved one.
    """
    config = read_config(directory)
    host_class = find_host(config["model"])
    if model is None:
        model = getattr(transformers, config["model"]).from_pretrained(directory, **options)
    if processor is None:
        processor = transformers.AutoProcessor.from_pretrained(directory)
    inner = _unwrapped(model)
    if type(inner).__name__ != config["model"]:
        raise ValueError(f"{directory} compresses a {config['model']}; got a {type(inner).__name__}")
    compressed = Compressed(host_class.restore(inner, processor, config), model, feed)
    compressed.load_merging(directory)
    return compressed
