"""One folder format for every model of the package: config.json and model.safetensors."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tempme_vl.fit import misfits
from tempme_vl.manifest import MANIFEST_FILE, FolderError, check_manifest, write_manifest
from tempme_vl.messages import shown
from tempme_vl.schema import ConfigError, read_json

M = TypeVar("M", bound=nn.Module)

CONFIG_FILE, WEIGHTS_FILE, VOCABULARY_FILE = "config.json", "model.safetensors", "vocab.txt"
ANSWERS_FILE = "answers.json"
HUB_SECONDS = 10.0


def save_model(directory: str | Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Writes the two files, and a manifest of all that the folder holds by now: save what else belongs to it first.

    Args:
        config: names its "kind" of model.

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
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    write_manifest(directory)


def load_model(
    directory: str | Path, kinds: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the weights of a folder that is as its manifest says.

    Args:
        kinds: those that the configuration's "kind" may be, with what they are in words; any without.

    Raises:
        ValueError: a file is missing, the message lists what is there; FolderError, ConfigError: see `check_manifest`,
            `load_kind` and `read_safetensors`.
    """
    directory = Path(directory)
    _require_files(directory)
    check_manifest(directory)
    return _read_config(directory, kinds), read_safetensors(directory / WEIGHTS_FILE)


def load_kind(directory: str | Path) -> str:
    """What kind of model lies in a folder.

    Raises:
        ValueError: as `load_model`.
    """
    directory = Path(directory)
    _require_files(directory)
    check_manifest(directory, only=(CONFIG_FILE,))
    return str(_read_config(directory)["kind"])


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


def _read_config(directory: Path, kinds: Mapping[str, str] | None = None) -> dict[str, Any]:
    file = directory / CONFIG_FILE
    config = read_json(file)
    if not isinstance(config, dict) or not isinstance(config.get("kind"), str):
        raise ConfigError(f"{file}: expected the settings of a model, with its 'kind'; is this another library's?")
    if kinds and config["kind"] not in kinds:
        expected = " or ".join(kinds.values())
        raise ConfigError(
            f"expected {expected} in {directory}; got one of kind {config['kind']!r} by its {CONFIG_FILE}"
        )
    return config


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


def hub_file(source: str | Path, name: str) -> Path:
    """A file of a local folder, or of a model on the Hugging Face hub, downloaded if it is not in its cache yet.

    Without a network that is said at once: the hub's own client would try for most of a minute.

    Args:
        source: the folder, or the model's name ("bert-base-uncased").

    Raises:
        ValueError: neither has the file, or it is not in the cache and the hub cannot be reached.
    """
    folder = Path(source)
    if folder.is_dir():
        if not (folder / name).is_file():
            raise ValueError(f"expected {name} in {folder}; found {sorted(entry.name for entry in folder.iterdir())}")
        return folder / name
    try:
        cached = huggingface_hub.try_to_load_from_cache(str(source), name)
        if isinstance(cached, str):
            return Path(cached)
        _reach_hub(str(source), name)
        return Path(huggingface_hub.hf_hub_download(str(source), name))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ValueError(
            f"expected a folder with {name}, or a model of the Hugging Face hub; got {str(source)!r}: {error}"
        ) from error


def require_hub(source: str | Path, *names: str) -> None:
    """Says at once that there is no network, where another library is about to load from the hub.

    Args:
        source: nothing is asked for a local folder.
        names: files of which one in the cache is enough; default: config.json.

    Raises:
        ValueError: none of them is in the cache, and the hub cannot be reached.
    """
    if Path(source).is_dir():
        return
    try:
        cached = [huggingface_hub.try_to_load_from_cache(str(source), name) for name in names or (CONFIG_FILE,)]
        if not any(isinstance(path, str) for path in cached):
            _reach_hub(str(source), (names or (CONFIG_FILE,))[0])
    except (OSError, ValueError) as error:
        raise ValueError(
            f"expected a folder, or a model of the Hugging Face hub; got {str(source)!r}: {error}"
        ) from error


def _reach_hub(source: str, name: str) -> None:
    """One request without a second try; ConnectionError where there is no network."""
    session, url = huggingface_hub.get_session(), huggingface_hub.hf_hub_url(source, name)
    # Which library sends depends on the client's version: httpx, httpx2, whose errors are no OSErrors, or requests.
    library = sys.modules[type(session).__module__.partition(".")[0]]
    failed = (OSError, getattr(library, "TransportError", OSError))
    try:
        session.head(url, timeout=HUB_SECONDS)
    except failed as error:
        raise ConnectionError(f"it is not in the local cache, and the hub cannot be reached ({error})") from error


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
