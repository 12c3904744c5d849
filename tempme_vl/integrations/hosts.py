"""Hosts by the name of their model's class. A new one is a file with a `Host` and a line in `tempme_vl.registries`, or,
from outside the package, `HOSTS.register("MineForConditionalGeneration", MineHost)` or an entry point of the group
"tempme_vl.hosts"."""

from __future__ import annotations

import transformers
from transformers import PreTrainedModel

from tempme_vl.integrations.base import Host
from tempme_vl.registries import HOSTS

__all__ = ["HOSTS", "find_host", "model_class"]


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
    found: type[PreTrainedModel] | None = find_host(name).model_class or getattr(transformers, name, None)
    if found is None:
        raise ValueError(
            f"transformers {transformers.__version__} has no {name}: take a version that has, or say in `model_class` "
            "of its Host where it is"
        )
    return found
