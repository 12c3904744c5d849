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

from tempme_vl.hub import find_folder, split_options
from tempme_vl.integrations.base import Costs, Feed, Host, Keep, Request, VisualTokens, Where
from tempme_vl.integrations.compressed import Compressed
from tempme_vl.integrations.costs import more_tokens
from tempme_vl.integrations.folder import CONFIG_FILE, load_merging, read_config
from tempme_vl.integrations.hosts import HOSTS, find_host
from tempme_vl.integrations.loading import load_host, load_weights
from tempme_vl.integrations.stream import Stream
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
    "Stream",
    "VisualTokens",
    "as_requested",
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
    num_frames: int = 16,
    where: Where = "auto",
    budget: float | None = None,
    tokens: int | None = None,
    clip_position_std: float = 0.0,
    feed: Feed | None = None,
    frames_at_once: int | None = None,
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
        method: a name in `tempme_vl.METHODS`, which merge inside a tower or behind it, or in
            `tempme_vl.compressors.COMPRESSORS`, which work behind it.
        num_frames: F, frames sampled of every video.
        where: "tower" inside it, "behind" it; "auto" inside where the host's tower and the method allow it and the
            options are of that way, else behind.
        budget: the share of the host's own visual tokens to keep at most, 0 to 1: options that are not given are
            solved for. Methods that decide by the data keep about this share, or say that they have no such option.
        tokens: in place of budget the number of visual tokens of a video, CLS and newline tokens counted.
        clip_position_std: TempMe's clip positions start as N(0, std^2); 0 starts at the pretrained function.
        feed: see `Compressed`.
        frames_at_once: frames of a video that the tower sees at a time, without gradients, rounded to whole clips of
            its last block: the same tokens in the memory of so many frames, however long a video is. Default: all.
        options: the method's own, as in `make_schedule`: r, merge_layers, ...

    Raises:
        ValueError: another model, a part of a processor, a method that does not work there, or needs all frames at
            once, or options that do not fit.
    """
    request = Request(method, num_frames, where, Keep(budget, tokens), options, frames_at_once)
    compressed = as_requested(model, processor, request, clip_position_std, feed)
    try:
        level = logging.WARNING if more_tokens(compressed.host.costs()) else logging.INFO
        logger.log(level, "%s", compressed.describe())
    except ValueError as error:  # the videos to come may be of another size
        logger.warning("of frames of a usual size: %s", error)
    return compressed


def as_requested(
    model: nn.Module,
    processor: ProcessorMixin,
    request: Request,
    clip_position_std: float = 0.0,
    feed: Feed | None = None,
) -> Compressed:
    """`compress` without a word on what it costs, which is of frames of a usual size: where others come in, a limit
    may be reached that those cannot reach, or the other way round (`Compressed.counts` tells).

    Raises:
        ValueError: as `compress`.
    """
    inner = _unwrapped(model)
    host_class = find_host(type(inner).__name__)
    _check_processor(processor)
    host = host_class.create(inner, processor, request)
    host.see_at_once(request.frames_at_once)
    for module in host.merging.modules():
        if isinstance(module, ClipPosition):
            nn.init.normal_(module.weight, std=clip_position_std)
    return Compressed(host, model, feed)


@undocumented("transformers")
def load_compressed(
    source: str | Path,
    model: nn.Module | None = None,
    processor: ProcessorMixin | None = None,
    feed: Feed | None = None,
    **options: Any,
) -> Compressed:
    """What `Compressed.save_pretrained` wrote.

    Args:
        source: a folder with tempme.json, and with the model and its processor if these are not given; or the name of
            such a model on the Hugging Face hub, "organisation/model".
        model, processor: to use in place of those of the folder, such as a model with peft's adapter.
        feed: see `Compressed`.
        options: of the model's `from_pretrained`, such as dtype and device_map. Code of the folder is not run unless
            trust_remote_code=True is among them. Of the hub: revision, token, cache_dir, local_files_only
            (`tempme_vl.hub.HubOptions`).

    Raises:
        ValueError: a folder of something else, a model of another class than the saved one, or a part of a processor;
            or see `tempme_vl.hub.find_folder`.
        FolderError, ConfigError: a folder that is not as its manifest says, or settings that no model is made of.
    """
    hub, options = split_options(options)
    directory = find_folder(source, CONFIG_FILE, **hub)
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
        host = host_class.restore(inner, processor, config)
        host.see_at_once(config.get("frames_at_once"))
        compressed = Compressed(host, model, feed)
    load_merging(host, directory)
    return compressed
