"""One folder format for every model of the package: config.json, model.safetensors, the card and the manifest."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tempme_vl.card import Card, write_card
from tempme_vl.fit import misfits
from tempme_vl.hub import CONFIG_FILE
from tempme_vl.manifest import MANIFEST_FILE, FolderError, check_manifest, write_manifest
from tempme_vl.messages import shown
from tempme_vl.schema import ConfigError, Settings, read, read_json, write

M = TypeVar("M", bound=nn.Module)
C = TypeVar("C", bound="SavedConfig")
S = TypeVar("S", bound=Settings)

WEIGHTS_FILE, VOCABULARY_FILE, ANSWERS_FILE = "model.safetensors", "vocab.txt", "answers.json"
VERSION = 1  # of config.json, tempme.json and videollm.json


@dataclass(frozen=True)
class SavedConfig:
    """config.json of a model, beside "kind" and "version". A kind of model has its own class, which says what there is;
    the same class reads and writes it (`tempme_vl.schema`).

    Attributes:
        kind: as the file names it.
        what: the same in words, for errors.
    """

    kind: ClassVar[str]
    what: ClassVar[str]


def save_model(directory: str | Path, config: SavedConfig, state: Mapping[str, Tensor], card: Card) -> None:
    """Writes the files, and a manifest of all that the folder holds by now: save what else belongs to it first.

    A card that somebody has written or changed stays.

    Raises:
        ValueError: weights of unmerged adapters, which a plain model could not load.
    """
    adapters = [key for key in state if ".lora_" in key or ".base_layer." in key]
    if adapters:
        raise ValueError(
            f"{len(adapters)} weights belong to unmerged adapters ({adapters[0]}, ...): merge them first "
            "(peft's merge_and_unload), or save the adapter with peft's save_pretrained"
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    write_settings(directory / CONFIG_FILE, config, {"kind": config.kind})
    write_card(directory, card)
    write_manifest(directory)


def write_settings(file: Path, config: Settings, more: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Writes a dataclass as JSON (`tempme_vl.schema.write`), with the version of its keys.

    Args:
        more: what else stands in front.
    """
    file.write_text(json.dumps({**more, "version": VERSION, **write(config)}, indent=2) + "\n")


def read_settings(file: Path, kind: type[S]) -> S:
    """What `write_settings` wrote, without more; a file without a version is of version 1, which has the same keys.

    Raises:
        ConfigError: it is of a newer version, or see `tempme_vl.schema.read`.
    """
    return read(kind, require_version(read_json(file), file), str(file))


def load_model(directory: str | Path, *kinds: type[C]) -> tuple[C, dict[str, Tensor]]:
    """The configuration and the weights of a folder that is as its manifest says.

    Args:
        kinds: the classes that the configuration may be of.

    Raises:
        ValueError: a file is missing, the message lists what is there, or it is of another kind; FolderError,
            ConfigError: see `check_manifest`, `load_settings` and `read_safetensors`.
    """
    directory = Path(directory)
    _require_files(directory)
    check_manifest(directory)
    settings = _read_settings(directory)
    kind = next((kind for kind in kinds if kind.kind == settings["kind"]), None)
    if kind is None:
        raise ConfigError(
            f"expected {' or '.join(kind.what for kind in kinds)} in {directory}; got one of kind {settings['kind']!r} "
            f"by its {CONFIG_FILE}"
        )
    del settings["kind"]
    return read(kind, settings, str(directory / CONFIG_FILE)), read_safetensors(directory / WEIGHTS_FILE)


def load_any(directory: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """As `load_model`, whatever kind of model it is, which the settings tell ("kind")."""
    directory = Path(directory)
    _require_files(directory)
    check_manifest(directory)
    return _read_settings(directory), read_safetensors(directory / WEIGHTS_FILE)


def load_kind(directory: str | Path) -> str:
    """What kind of model lies in a folder.

    Raises:
        ValueError: as `load_model`.
    """
    directory = Path(directory)
    _require_files(directory)
    check_manifest(directory, only=(CONFIG_FILE,))
    return str(_read_settings(directory)["kind"])


def refuse_added_modules(config: Mapping[str, Any], directory: str | Path) -> None:
    """For readers of a part of a model, such as its visual tower.

    Raises:
        FolderError: a tuning's modules stayed in the model (`tempme_vl.tuning.base.AddedModules`).
    """
    if isinstance(tuned := config.get("tuning"), Mapping):
        raise FolderError(
            f"{directory} holds a model with modules of the tuning {tuned.get('name')!r}, which are no part of a "
            "tower's weights: tempme_vl.tasks.retrieval.load_retrieval_model reads it"
        )


def _require_files(directory: Path) -> None:
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (directory / name).is_file()]
    if missing:
        there = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else None
        found = "no such folder" if there is None else [name for name in there if name != MANIFEST_FILE]
        raise FolderError(f"expected {' and '.join(missing)} in {directory}; found {found}")


def _read_settings(directory: Path) -> dict[str, Any]:
    file = directory / CONFIG_FILE
    settings = require_version(read_json(file), file)
    if not isinstance(settings, dict) or not isinstance(settings.get("kind"), str):
        raise ConfigError(f"{file}: expected the settings of a model, with its 'kind'; is this another library's?")
    return settings


def require_version(settings: Any, file: Path) -> Any:
    """Settings without their version, which this package must know.

    Raises:
        ConfigError: they are of a newer version, or the number is none.
    """
    if not isinstance(settings, Mapping):
        return settings  # whoever reads them says so
    version = settings.get("version", VERSION)
    if type(version) is not int or version < 1:
        raise ConfigError(f"{file}, 'version': expected a whole number from 1 to {VERSION}; got {shown(version)}")
    if version > VERSION:
        raise ConfigError(
            f"{file} is of version {version}, and this tempme_vl reads versions up to {VERSION}: a newer tempme_vl has "
            "written it. Update tempme_vl (pip install --upgrade tempme_vl)"
        )
    return {key: value for key, value in settings.items() if key != "version"}


def read_safetensors(file: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        FolderError: it cannot be read; names the file.
    """
    try:
        return load_file(file)
    except Exception as error:  # damaged files fail in many ways
        raise FolderError(
            f"{file} cannot be read as safetensors; is it damaged, or only partly copied? The loader said: "
            f"{type(error).__name__}: {error}"
        ) from error


def save_vocabulary(directory: str | Path, words: Sequence[str]) -> None:
    """Writes vocab.txt, a word a line in the order of their ids, as BERT's own folders have it."""
    (Path(directory) / VOCABULARY_FILE).write_text("".join(f"{word}\n" for word in words), encoding="utf-8")


def load_vocabulary(directory: str | Path, size: int | None = None) -> tuple[str, ...]:
    """What `save_vocabulary` wrote.

    Args:
        size: words of the model; a model that was saved without any has none.

    Raises:
        ConfigError: there is no such file, it is no UTF-8, it ends within a word, or has another number of words.
    """
    file = Path(directory) / VOCABULARY_FILE
    if not file.is_file():
        raise ConfigError(f"expected the words of the model in {file}, one a line; there is no such file")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: expected words in UTF-8, one a line; {error}") from error
    # not splitlines: some words of BERT are line separators of Unicode
    words = text.split("\n")
    if words.pop():
        raise ConfigError(f"{file}: expected a line end behind every word; the last one is cut off")
    if len(set(words)) != len(words):
        raise ConfigError(f"{file}: expected distinct words; {len(words) - len(set(words))} are there again")
    if size is not None and words and len(words) != size:
        raise ConfigError(f"{file}: expected {size} words, as {CONFIG_FILE} says; got {len(words)}")
    return tuple(words)


def save_answers(directory: str | Path, answers: Sequence[str]) -> None:
    """Writes answers.json, the answers that a model can give, the most frequent one first."""
    (Path(directory) / ANSWERS_FILE).write_text(json.dumps(list(answers), indent=0) + "\n")


def load_answers(directory: str | Path) -> tuple[str, ...]:
    """What `save_answers` wrote.

    Raises:
        ConfigError: there is no such file, or it is no list of texts.
    """
    file = Path(directory) / ANSWERS_FILE
    if not file.is_file():
        raise ConfigError(f"expected the answers of the model in {file}; there is no such file")
    answers = read_json(file)
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        wrong = next((a for a in answers if not isinstance(a, str)), "") if isinstance(answers, list) else answers
        raise ConfigError(f"{file}: expected a list of texts; got {shown(wrong)}")
    return tuple(answers)


def sketch(make: Callable[[], M], directory: str | Path) -> M:
    """A model of a folder's configuration without memory for its weights, to compare them with those that are there
    (`require_fit`): so nothing larger than the weights file is ever made, whatever the configuration says.

    Args:
        make: makes the model with random weights.

    Raises:
        ConfigError: no model can be made of the configuration.
    """
    file = Path(directory) / CONFIG_FILE
    try:
        with torch.device("meta"):
            return make()
    except (ConfigError, FolderError):
        raise
    except Exception as error:  # what other libraries' classes are made of fails in many ways
        raise ConfigError(f"{file}: no model can be made of these settings: {type(error).__name__}: {error}") from error


def require_fit(model: nn.Module, state: Mapping[str, Tensor], directory: str | Path) -> None:
    """Raises:
    FolderError: a folder's weights are not those of its configuration (`misfits`).
    """
    if trouble := misfits(model.state_dict(), state):
        file = Path(directory) / WEIGHTS_FILE
        raise FolderError(f"the weights of {file} do not fit its {CONFIG_FILE}: {trouble}")


def build(make: Callable[[], M], state: Mapping[str, Tensor], directory: str | Path) -> M:
    """A model of a folder's configuration with the folder's weights.

    Raises:
        ConfigError, FolderError: see `sketch` and `require_fit`.
    """
    require_fit(sketch(make, directory), state, directory)
    model = make()
    model.load_state_dict(state)
    return model
