"""Reference outputs of UMT: one JSON file per set of shapes, whose keys are the names of the tensor files beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from typing import Any

from parity.cases import FOLDER, Case
from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class UmtCase(Case):
    """One tensor file (`path`) and its entry in the JSON file."""

    entry: dict[str, Any] = field(compare=False)

    @property
    def config(self) -> dict[str, Any]:
        return self.entry["config"]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Those of the file; inputs and weights left out of it, to save space, are those of the model beside it."""
        own, listed = load_file(self.path), self.entry["tensors"]
        inputs = {key for key in listed if key.startswith("in.")} - own.keys()
        weights = bool(self.entry["n_weights"]) and not any(key.startswith("w.") for key in own)
        if not inputs and not weights:
            return own
        kind = self.path.stem.split("_")[1]
        whole = load_file(self.path.with_name(self.path.name.replace(f"_{kind}_", "_ret_")))
        own |= {key: whole[key] for key in inputs}
        part = "w.text_encoder." if kind == "text" else "w.vision_encoder."
        return own | {key: value for key, value in whole.items() if weights and key.startswith(part)}


def umt_cases(pattern: str) -> list[UmtCase]:
    """All tensor files that a JSON file lists and whose names without suffix match, such as "umt_text_*".

    None is an error, since a test without a case would pass unseen; a listed file that is not there fails on reading.
    """
    cases = [
        UmtCase(listing.parent / name, entry)
        for listing in sorted((FOLDER / "umt").glob("umt_*.json"))
        for name, entry in json.loads(listing.read_text()).items()
        if name.endswith(".safetensors") and fnmatch(name, f"{pattern}.safetensors")
    ]
    if not cases:
        raise FileNotFoundError(f"no tensor file {pattern} in a listing umt_*.json of {FOLDER / 'umt'}")
    return cases
