"""Hosts by the name of their model's class. A new one is a file with a `Host` and its line in `HOSTS`, or, from outside
the package, `HOSTS.register("MineForConditionalGeneration", MineHost)` or an entry point of the group
"tempme_vl.hosts" (`tempme_vl.registry`)."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedModel

from tempme_vl.integrations.base import Host
from tempme_vl.registry import Registry

_HERE = "tempme_vl.integrations"
HOSTS: Registry[type[Host]] = Registry(
    "host",
    "tempme_vl.hosts",
    Host,
    {
        "VideoLlavaForConditionalGeneration": f"{_HERE}.video_llava:VideoLlavaHost",
        "LlavaNextVideoForConditionalGeneration": f"{_HERE}.llava_next_video:LlavaNextVideoHost",
        "LlavaOnevisionForConditionalGeneration": f"{_HERE}.llava_onevision:LlavaOnevisionHost",
        "InstructBlipVideoForConditionalGeneration": f"{_HERE}.instructblip_video:InstructBlipVideoHost",
        "PerceptionLMForConditionalGeneration": f"{_HERE}.perception_lm:PerceptionLMHost",
        "Qwen2_5_VLForConditionalGeneration": f"{_HERE}.qwen2_5_vl:Qwen2_5_VLHost",
        "Qwen3VLForConditionalGeneration": f"{_HERE}.qwen3_vl:Qwen3VLHost",
        "InternVLForConditionalGeneration": f"{_HERE}.internvl:InternVLHost",
        "SmolVLMForConditionalGeneration": f"{_HERE}.smolvlm:SmolVLMHost",
    },
)


def find_host(name: str) -> type[Host]:
    """The host of a model's class.

    Raises:
        ValueError: an unknown one.
    """
    if name not in HOSTS:
        raise ValueError(
            f"{name} is no video-language model that can be compressed; known are {', '.join(HOSTS)}. Another one "
            "needs a Host of its own (docs/add_a_host.md)"
        )
    return HOSTS[name]


def model_class(name: str) -> type[PreTrainedModel]:
    """The class of a host's model: what its `Host` says, else that of transformers.

    Raises:
        ValueError: an unknown host, or one that this transformers has no class of.
    """
    found: Any = find_host(name).model_class or getattr(transformers, name, None)
    if found is None:
        raise ValueError(
            f"transformers {transformers.__version__} has no {name}: take a version that has, or say in `model_class` "
            "of its Host where it is"
        )
    return found
