"""Host models and their processors, from a folder or the hub, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel, ProcessorMixin

from tempme_vl.integrations.hosts import find_host, model_class
from tempme_vl.manifest import FolderError
from tempme_vl.pretrained import require_hub


def load_host(source: str, name: str | None = None, **options: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A video-language model and its processor, from safetensors.

    Args:
        source: a folder, or a name on the hub.
        name: the model's class, one of `HOSTS`; default: the one that its configuration names.
        options: of its `from_pretrained`; float32 without a dtype, and no code of the folder is run without
            trust_remote_code=True.

    Raises:
        ValueError: nothing that can be loaded whole there, or a model that has no `Host`, before its weights are read.
    """
    options = {"dtype": torch.float32, "trust_remote_code": False, **options}
    trusted = options["trust_remote_code"]
    try:
        require_hub(source)
        if name is None:
            config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trusted)
            (name,) = config.architectures or ["a model without architectures"]
        find_host(name)
        model = load_weights(source, name, **options, use_safetensors=True)
        processor = transformers.AutoProcessor.from_pretrained(source, trust_remote_code=trusted)
    except FolderError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(
            f"could not load {source!r}: {error}\nExpected a video-language model of transformers with its processor "
            "and safetensors weights, in a folder or by its name on the hub"
        ) from error
    return model, processor


def load_weights(source: str | Path, name: str, **options: Any) -> PreTrainedModel:
    """A host's model.

    Args:
        name: of its class.
        options: of its `from_pretrained`.

    Raises:
        FolderError: some of its weights are not there: transformers would leave them random.
    """
    loaded: Any = model_class(name).from_pretrained(source, **options, output_loading_info=True)
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise FolderError(f"{source} lacks {len(missing)} weights of a {name}: {missing[:4]} ...")
    return model
