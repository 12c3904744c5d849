"""Video-language models of transformers that read few tokens of a video, without a change to them.

A new one is a file with a `Host` and a line in `tempme_vl.registries`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import ProcessorMixin

from tempme_vl.integrations.base import Costs, Feed, Host, VisualTokens
from tempme_vl.integrations.compressed import CONFIG_FILE, Compressed, read_config
from tempme_vl.integrations.costs import more_tokens
from tempme_vl.integrations.hosts import HOSTS, find_host
from tempme_vl.integrations.loading import load_host, load_weights
from tempme_vl.integrations.videos import SampledVideo
from tempme_vl.libraries import undocumented
from tempme_vl.manifest import check_manifest, errors_in
from tempme_vl.merging.tempme import ClipPosition
from tempme_vl.schema import THEIR_LAYERS, check_plain, read_json

logger = logging.getLogger(__name__)

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
    "load_host",
]


def _unwrapped(model: Any) -> nn.Module:
    """The host model inside peft's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _check_processor(processor: object) -> None:
    """Raises:
    ValueError: a part of a processor.
    """
    missing = [part for part in ("tokenizer", "video_processor") if not hasattr(processor, part)]
    if missing:
        raise ValueError(
            f"expected the model's whole processor, as transformers.AutoProcessor.from_pretrained gives it; this "
            f"{type(processor).__name__} has no {' and no '.join(missing)}"
        )


@undocumented("transformers")
def compress(
    model: nn.Module,
    processor: ProcessorMixin,
    method: str = "tempme",
    num_frames: int = 8,
    clip_position_std: float = 0.0,
    feed: Feed | None = None,
    **options: Any,
) -> Compressed:
    """A model that reads few tokens of a video.

    Its tokens and costs beside the host's own are what `Compressed.describe` gives; they are logged, too, as
    information, or as a warning where the language model reads more tokens than without.

    Nothing in the model is patched, replaced or added, and it works on beside its compressed self; both share their
    weights.

    Args:
        model: a video-language model of transformers, one of `HOSTS`, or peft's wrapper of one.
        processor: its processor.
        method: "tempme", "tome" or "none".
        num_frames: F, frames sampled of every video.
        clip_position_std: TempMe's clip positions start as N(0, std^2); 0 starts at the pretrained function.
        feed: see `Compressed`.
        options: the method's own, as in `make_schedule`: r, merge_layers, ...; for hosts that merge inside their tower
            also budget or tokens, as in `tempme_vl.create_frontend`.

    Raises:
        ValueError: another model, a part of a processor, or options that do not fit.
    """
    inner = _unwrapped(model)
    host_class = find_host(type(inner).__name__)
    _check_processor(processor)
    host = host_class.create(inner, processor, method, num_frames, options)
    for module in host.merging.modules():
        if isinstance(module, ClipPosition):
            nn.init.normal_(module.weight, std=clip_position_std)
    compressed = Compressed(host, model, feed)
    logger.log(logging.WARNING if more_tokens(host.costs()) else logging.INFO, "%s", compressed.describe())
    return compressed


@undocumented("transformers")
def load_compressed(
    directory: str | Path,
    model: nn.Module | None = None,
    processor: ProcessorMixin | None = None,
    feed: Feed | None = None,
    **options: Any,
) -> Compressed:
    """What `Compressed.save_pretrained` wrote.

    Args:
        directory: with tempme.json, and with the model and its processor if these are not given.
        model, processor: to use in place of those of the folder, such as a model with peft's adapter.
        feed: see `Compressed`.
        options: of the model's `from_pretrained`, such as dtype and device_map. Code of the folder is not run unless
            trust_remote_code=True is among them.

    Raises:
        ValueError: a folder of something else, a model of another class than the saved one, or a part of a processor.
        FolderError, ConfigError: a folder that is not as its manifest says, or settings that no model is made of.
    """
    directory = Path(directory)
    config = read_config(directory)
    check_manifest(directory)
    file = directory / CONFIG_FILE
    with errors_in(file):
        host_class = find_host(config["model"])
    options = {"trust_remote_code": False, **options}
    trusted = options["trust_remote_code"]
    if model is None:
        if (directory / "config.json").is_file():  # where peft's adapter alone is saved there is none
            check_plain(read_json(directory / "config.json"), str(directory / "config.json"), THEIR_LAYERS)
        with errors_in(directory, Exception):
            model = load_weights(directory, config["model"], **options)
    if processor is None:
        with errors_in(directory, Exception):
            processor = transformers.AutoProcessor.from_pretrained(directory, trust_remote_code=trusted)
    _check_processor(processor)
    inner = _unwrapped(model)
    if type(inner).__name__ != config["model"]:
        raise ValueError(f"{directory} compresses a {config['model']}; got a {type(inner).__name__}")
    with errors_in(file):
        compressed = Compressed(host_class.restore(inner, processor, config), model, feed)
    compressed.load_merging(directory)
    return compressed
