"""What a compression leaves in a folder: tempme.json, the weights that it learnt, and what its card says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from tempme_vl.card import PLACE, Card
from tempme_vl.fit import misfits
from tempme_vl.integrations.base import Host
from tempme_vl.manifest import FolderError, write_manifest
from tempme_vl.messages import shown
from tempme_vl.pretrained import VERSION, read_safetensors, require_version
from tempme_vl.schema import ConfigError, read_json

CONFIG_FILE, WEIGHTS_FILE = "tempme.json", "tempme.safetensors"


def save_merging(host: Host, directory: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """See `Compressed.save_merging`."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {"version": VERSION, "model": type(host.model).__name__, **host.config()}
    if host.frames_at_once is not None:
        config["frames_at_once"] = host.frames_at_once
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    state = host.merging.state_dict() if state is None else state
    if state:
        weights = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        save_file(weights, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    write_manifest(directory)


def load_merging(host: Host, directory: Path) -> None:
    """Reads the weights that `save_merging` wrote.

    Raises:
        FolderError: they do not fit.
    """
    file = directory / WEIGHTS_FILE
    state = read_safetensors(file) if file.is_file() else {}
    if trouble := misfits(host.merging.state_dict(), state):
        raise FolderError(f"{file} does not fit the schedule of {CONFIG_FILE}: {trouble}")
    host.merging.load_state_dict(state)


def read_config(directory: str | Path) -> dict[str, Any]:
    """What `save_merging` wrote to tempme.json, without the version.

    Raises:
        ValueError: there is none.
        ConfigError: it is none, names no model, or is of a newer version.
    """
    file = Path(directory) / CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"expected {CONFIG_FILE} in {directory}, as save_pretrained of a compressed model writes it")
    config = require_version(read_json(file), file)
    if not isinstance(config, dict) or not isinstance(config.get("model"), str):
        raise ConfigError(f"{file}: expected an object with 'model', the name of a class; got {shown(config)}")
    return config


def facts(host: Host) -> dict[str, str]:
    """See `Compressed.facts`."""
    costs = host.costs()
    height, width = costs.frame
    ours = "by the data" if costs.tokens is None else costs.tokens
    return {
        "method": host.config()["method"],
        "host": type(host.model).__name__,
        "frames": str(host.num_frames),
        "visual tokens of a video": f"{ours}; {costs.native_tokens} in the host's own way",
        "GFLOPs of the tower": f"{costs.tower:.4g}; {costs.native_tower:.4g} in the host's own way",
        "counted for frames of": f"{height} x {width} pixels",
        **host.facts(),
    }


def card(host: Host) -> Card:
    """See `Compressed.card`."""
    name, known = type(host.model).__name__, facts(host)
    code = (
        "from tempme_vl import read_video\n"
        "from tempme_vl.integrations import load_compressed\n\n"
        f'compressed = load_compressed("{PLACE}")\n'
        f'video = read_video("clip.mp4", {host.num_frames})\n'
        'prompt = f"{compressed.placeholder}\\nWhat happens?"\n'
        "answer = compressed.answer(prompt, [video.pixels], times=[video.times], max_new_tokens=30)\n"
    )
    method = known["method"]
    return Card(f"{name} that reads few tokens of a video: {method}", "video-text-to-text", known, code, (method,))
