"""What lmms-eval's command line and tasks say, in the forms that `compress`, `generate` and the video reader take."""

from __future__ import annotations

import logging
import mimetypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tempme_vl.integrations import Compressed, compress, load_compressed, load_host
from tempme_vl.integrations.folder import CONFIG_FILE

logger = logging.getLogger(__name__)
MAX_NEW_TOKENS = 1024  # where a task says nothing; the harness's own models take as many


def load(
    pretrained: str, device: torch.device, dtype: str, options: Mapping[str, Any], trust_remote_code: bool = False
) -> Compressed:
    """A compressed model as it was saved, or a host model compressed by `options`."""
    if (Path(pretrained) / CONFIG_FILE).is_file():
        if options:
            raise ValueError(f"{pretrained} is compressed already by its {CONFIG_FILE}: leave out {sorted(options)}")
        compressed = load_compressed(pretrained, dtype=dtype, trust_remote_code=trust_remote_code)
        logger.info("%s", compressed.describe())
    else:
        model, processor = load_host(pretrained, dtype=dtype, trust_remote_code=trust_remote_code)
        given = {name: _numbers(name, value) for name, value in options.items()}
        compressed = compress(model, processor, **given)
    compressed.model.to(device)
    return compressed


def _numbers(name: str, value: Any) -> Any:
    """An option as `compress` takes it: --model_args has no lists, so that 16/18/20 stands for one."""
    if isinstance(value, str) and "/" in value:
        return tuple(int(part) for part in value.split("/"))
    return (value,) if name in ("merge_layers", "merge_frames") and isinstance(value, int) else value


def generation_options(kwargs: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """What ends an answer, and options of `generate`, of a task's generation_kwargs. Greedy unless a temperature or
    do_sample says otherwise; unknown ones are left to `generate`, which refuses them."""
    known = ("until", "image_aspect_ratio")  # the second is for images
    options = {key: value for key, value in kwargs.items() if value is not None and key not in known}
    limit = options.pop("max_gen_toks", MAX_NEW_TOKENS)
    options.setdefault("max_new_tokens", limit)
    temperature = options.pop("temperature", 1.0 if options.get("do_sample") else 0.0)
    options["do_sample"] = bool(options.get("do_sample", True) and temperature > 0)
    if options["do_sample"]:
        options["temperature"] = temperature
    else:
        options = {key: value for key, value in options.items() if key not in ("top_p", "top_k")}
    until = kwargs.get("until") or []
    return [until] if isinstance(until, str) else list(until), options


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of `stops`."""
    return text[: min((text.find(stop) for stop in stops if stop and stop in text), default=len(text))]


def video_of(visual: object) -> tuple[str, float | None, float | None]:
    """Path, start and end in seconds of what a task's doc_to_visual gives.

    Raises:
        ValueError: no video.
    """
    part: dict[str, Any] = visual if isinstance(visual, dict) else {"url": visual}
    path = part.get("url") or part.get("path")
    if isinstance(path, (str, Path)) and part.get("type", "video") == "video":
        kind = mimetypes.guess_type(str(path))[0] or "video"
        if kind == "image/gif" or not kind.startswith(("image", "audio")):
            return str(path), part.get("video_start"), part.get("video_end")
    raise ValueError(
        f"tempme_vl reads video files, and images of PIL: expected the path of a video or such an image from "
        f"the task's doc_to_visual, got {visual!r}; choose a task, or the variant of it, that gives these"
    )
