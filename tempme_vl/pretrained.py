"""One folder format for every model of the package: config.json and model.safetensors."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CONFIG_FILE, WEIGHTS_FILE, VOCABULARY_FILE = "config.json", "model.safetensors", "vocab.txt"
ANSWERS_FILE = "answers.json"
HUB_SECONDS = 10.0


def save_model(directory: str | Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Writes the two files; the configuration names its "kind" of model.

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


def load_model(directory: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the weights of a folder.

    Raises:
        ValueError: a file is missing; the message lists what is there.
    """
    directory = Path(directory)
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (directory / name).is_file()]
    if missing:
        found = sorted(p.name for p in directory.iterdir()) if directory.is_dir() else "no such folder"
        raise ValueError(f"expected {' and '.join(missing)} in {directory}; found {found}")
    return json.loads((directory / CONFIG_FILE).read_text()), load_file(directory / WEIGHTS_FILE)


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


def load_vocabulary(directory: str | Path) -> tuple[str, ...]:
    """What `save_vocabulary` wrote.

    Raises:
        ValueError: there is no such file.
    """
    file = Path(directory) / VOCABULARY_FILE
    if not file.is_file():
        raise ValueError(f"expected the words of the model in {file}, one a line; there is no such file")
    # not splitlines: some words of BERT are line separators of Unicode
    return tuple(file.read_text(encoding="utf-8").split("\n")[:-1])


def save_answers(directory: str | Path, answers: Sequence[str]) -> None:
    """Writes answers.json, the answers that a model can give, the most frequent one first."""
    (Path(directory) / ANSWERS_FILE).write_text(json.dumps(list(answers), indent=0) + "\n")


def load_answers(directory: str | Path) -> tuple[str, ...]:
    """What `save_answers` wrote.

    Raises:
        ValueError: there is no such file.
    """
    file = Path(directory) / ANSWERS_FILE
    if not file.is_file():
        raise ValueError(f"expected the answers of the model in {file}; there is no such file")
    return tuple(json.loads(file.read_text()))


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Loads all weights of a model.

    Args:
        source: where they come from, for the message.

    Raises:
        ValueError: keys missing or unknown, or other shapes; the message lists them.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the weights of {source} do not fit its {CONFIG_FILE}: {error}") from error
