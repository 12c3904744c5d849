"""Folders that the package wrote (`tempme_vl.pretrained`), as weights for another model: a second stage of training."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from tempme_vl.fit import load_strictly, misfits
from tempme_vl.messages import few, shown
from tempme_vl.pretrained import CONFIG_FILE, WEIGHTS_FILE, load_any, load_vocabulary, refuse_added_modules
from tempme_vl.schema import ConfigError, Settings, read, read_json, write

_log = logging.getLogger(__name__)

T = TypeVar("T", bound=Settings)

# what transformers writes into its configurations beside what describes a model
_NOTES = {"dtype", "torch_dtype", "transformers_version", "architectures"}
_POSITION = ".before_attention.clip_position.weight"


@dataclass(frozen=True)
class Export:
    """A folder's settings, as they were written, and weights."""

    folder: Path
    config: dict[str, Any]
    state: dict[str, Tensor]

    @property
    def kind(self) -> str:
        """Which model was saved: frontend, retrieval, umt_retrieval, testa_retrieval, testa_pretraining or video_qa."""
        return self.config["kind"]

    @property
    def frontend(self) -> dict[str, Tensor]:
        """Weights of the front end, by its own names."""
        return self.state if self.kind == "frontend" else part_of(self.state, "frontend.")

    def tower(self) -> dict[str, Tensor]:
        """Weights of the encoder alone, under the names of `tempme_vl.backbones.base.Backbone`."""
        return tower_part(self.frontend)

    def clip_positions(self) -> dict[str, Tensor]:
        """TempMe's, by layer: (clips before the join, D)."""
        return {key.split(".")[1]: value for key, value in self.frontend.items() if key.endswith(_POSITION)}

    def frontend_setting(self, name: str, kind: type[T]) -> T:
        """One of the front end's settings, as a dataclass.

        Raises:
            ConfigError: it is missing, or is something else.
        """
        return read(kind, self.config["frontend"].get(name), f"{self.folder / CONFIG_FILE}, 'frontend', {name!r}")

    def require_family(self, family: str) -> None:
        """Raises:
        ValueError: the front end has a tower of another family.
        """
        if self.config["frontend"].get("family") != family:
            raise ValueError(
                f"{self.folder} holds a tower of the family {self.config['frontend'].get('family')!r}; expected one of "
                f"{family!r}, as the model's name says"
            )


def find_export(path: str | Path) -> Export | None:
    """What a folder of the package holds, or None for whatever else the path names.

    Args:
        path: the folder, or model.safetensors in it.

    Raises:
        ValueError: modules of a tuning are among its weights; or see `tempme_vl.pretrained.load_any`.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent if path.name == WEIGHTS_FILE else None
    config = None if folder is None else read_config(folder)
    if folder is None or config is None or not isinstance(config.get("frontend"), dict) or "kind" not in config:
        return None
    refuse_added_modules(config, folder)
    return Export(folder, *load_any(folder))


def read_config(folder: Path) -> dict[str, Any] | None:
    """config.json, of whatever library, or None if there is none.

    Raises:
        ConfigError: it is not JSON, or no JSON object.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        return None
    config = read_json(file)
    if not isinstance(config, dict):
        raise ConfigError(f"{file}: expected an object of settings; got {shown(config)}")
    return config


def load_exported_tower(
    tower: nn.Module, config: Settings, export: Export, may_differ: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Loads an encoder's weights from a folder of the package, and says so.

    Args:
        tower: a `tempme_vl.backbones.base.Backbone`.
        config: a `tempme_vl.backbones.base.TowerConfig`, which the folder's must equal.
        may_differ: but for these keys, and those that say what is done with the tower.

    Returns:
        the clip positions of the folder's front end.

    Raises:
        ValueError: another family, other numbers or other weights.
    """
    ours = write(config)
    export.require_family(ours["family"])
    settings = {key: value for key, value in export.config["frontend"].items() if key != "schedule"}
    theirs = write(read(type(config), settings, f"{export.folder / CONFIG_FILE}, 'frontend'"))
    differ = [
        f"{key} {theirs.get(key)!r} instead of {ours.get(key)!r}"
        for key in sorted({*theirs, *ours} - {"preprocess", *may_differ})
        if _without_notes(theirs.get(key)) != _without_notes(ours.get(key))
    ]
    if differ:
        raise ValueError(f"{export.folder} holds another tower: {few(differ)}")
    weights = export.tower()
    load_strictly(tower, weights, str(export.folder))
    rest = Counter(key.split(".")[0] for key in export.state if export.kind != "frontend")
    del rest["frontend"]
    _log.info(
        "%s: this package's %s model, %d weights of the visual tower; unused by it: %s",
        *(export.folder, export.kind, len(weights)),
        ", ".join(f"{part} ({count})" for part, count in rest.items()) or "nothing",
    )
    return export.clip_positions()


def _without_notes(value: Any) -> Any:
    return {key: part for key, part in value.items() if key not in _NOTES} if isinstance(value, Mapping) else value


def load_exported_rest(model: nn.Module, export: Export, anew: Sequence[str] = ()) -> None:
    """Loads what stands beside the front end in a folder of the same kind of model, and says so.

    Args:
        anew: beginnings of names that keep their start, since they mean something else in this model.

    Raises:
        ValueError: missing, unknown or other weights.
    """
    left_out = ("frontend.", *anew)
    wanted = {key: value for key, value in model.state_dict().items() if not key.startswith(left_out)}
    given = {key: value for key, value in export.state.items() if not key.startswith(left_out)}
    if trouble := misfits(wanted, given):
        raise ValueError(f"{export.folder} does not hold the weights of this model: {trouble}")
    model.load_state_dict(given, strict=False)
    _log.info("%s: %d weights of the text side; new: %s", export.folder, len(given), few(list(anew)) or "nothing")


def require_vocabulary(export: Export, vocabulary: Sequence[str]) -> None:
    """Raises:
    ValueError: the folder's word embeddings belong to other words.
    """
    words = load_vocabulary(export.folder)
    if tuple(vocabulary) != words:
        raise ValueError(
            f"the model has {len(vocabulary)} words, and {export.folder} was trained with {len(words)} others: take "
            "those, tempme_vl.pretrained.load_vocabulary reads them"
        )


def part_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights under a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def tower_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a front end's weights those of its tower, under the names that they have there; a tower's stay.

    In a block of a front end the tower's block stands beside the steps of merging, as "block".
    """
    beside = re.compile(r"blocks\.\d+\.(?!block\.)")
    inside = re.compile(r"(blocks\.\d+)\.block\.")
    if not any(map(inside.match, state)):
        return dict(state)
    return {inside.sub(r"\1.", key, count=1): value for key, value in state.items() if not beside.match(key)}
