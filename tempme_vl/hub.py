"""The Hugging Face hub: files and folders that are found there, and folders that are put there."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from tempme_vl.card import is_own, renamed
from tempme_vl.manifest import CARD_FILE, FOLDERS, MANIFEST_FILE, READ, check_manifest, listed_files, write_manifest

if TYPE_CHECKING:
    from typing_extensions import Unpack

CONFIG_FILE = "config.json"
HUB_SECONDS = 10.0

# what loaders would run, or transformers would take in place of safetensors
PICKLES = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
_SAVED = [f"{folder}/{pattern}".lstrip("/") for folder in FOLDERS for pattern in READ if pattern != "*.py"]
_READ = [*_SAVED, "*.py", CARD_FILE, MANIFEST_FILE]


class HubOptions(TypedDict, total=False):
    """Where on the hub a folder is, as transformers' `from_pretrained` has it.

    Attributes:
        revision: a branch, tag or commit; default: main.
        token: of the user, for private models; True for the one that is stored on this machine.
        cache_dir: where downloaded files are kept.
        local_files_only: nothing is asked of the hub: only what is in the cache is taken.
    """

    revision: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool


def split_options(options: Mapping[str, Any]) -> tuple[HubOptions, dict[str, Any]]:
    """Those of the hub, and all others."""
    names = HubOptions.__annotations__
    hub: Any = {name: value for name, value in options.items() if name in names}
    return hub, {name: value for name, value in options.items() if name not in names}


def is_hub_id(name: str) -> bool:
    """Whether a model on the hub can have this name: "organisation/model"."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def find_folder(source: str | Path, needed: str = CONFIG_FILE, **hub: Unpack[HubOptions]) -> Path:
    """A saved folder: a local one, or that of a model on the Hugging Face hub, downloaded if its files are not in the
    cache yet. Only what loaders read is, and no pickles.

    Args:
        source: the folder, or the model's name ("organisation/model"). A path that exists always is the path.
        needed: a file that it must have.
        hub: see `HubOptions`.

    Raises:
        ValueError: neither; or the model is not in the cache and the hub cannot be reached.
    """
    if Path(source).exists():
        return Path(source)
    name = str(source)
    if not is_hub_id(name):
        raise ValueError(
            f"expected a folder with {needed}, or a model of the Hugging Face hub by its name 'organisation/model'; "
            f"got {name!r}: there is no such folder, and no model can have this name"
        )
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        where = hub.get("cache_dir"), hub.get("revision")
        cached = huggingface_hub.try_to_load_from_cache(name, needed, cache_dir=where[0], revision=where[1])
        if not isinstance(cached, str) and not hub.get("local_files_only"):
            _reach_hub(name, needed)
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_READ, ignore_patterns=[*PICKLES], **hub))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ValueError(
            f"expected a folder with {needed}, or a model of the Hugging Face hub; got {name!r}: there is no such "
            f"folder here, and of the model the hub's client says: {error}"
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
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

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
    import huggingface_hub

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
    import huggingface_hub

    session, url = huggingface_hub.get_session(), huggingface_hub.hf_hub_url(source, name)
    # Which library sends depends on the client's version: httpx, httpx2, whose errors are no OSErrors, or requests.
    library = sys.modules[type(session).__module__.partition(".")[0]]
    failed = (OSError, getattr(library, "TransportError", OSError))
    try:
        session.head(url, timeout=HUB_SECONDS)
    except failed as error:
        raise ConnectionError(f"it is not in the local cache, and the hub cannot be reached ({error})") from error


# ---- to the hub


class Shareable:
    """A model that is saved in a folder, and can be put on the hub."""

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the folder, its card and its manifest."""
        raise NotImplementedError

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
    ) -> str:
        """Saves the model and puts it on the Hugging Face hub; see `push_folder`."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_folder(folder, repo_id, private, token, commit_message, revision)


def push_folder(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
) -> str:
    """Puts a saved folder, such as a run's OUTPUT/best, on the Hugging Face hub: the files of its manifest alone.

    Its card names the model as the hub does; a card that somebody has written there stays.

    Args:
        repo_id: "organisation/model", or "model" of the user; made if there is none.
        private: whether a new one is; default: as the organisation has it.
        token: default: the one that is stored on this machine.
        revision: a branch, made if there is none; default: main.

    Returns:
        the address of the commit.

    Raises:
        ValueError: a folder without a manifest, or what the hub refuses; FolderError: it is not as it was saved.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    folder = Path(folder)
    if not (folder / MANIFEST_FILE).is_file():
        raise ValueError(
            f"expected a folder that save_pretrained wrote, with {MANIFEST_FILE}, in {folder}; for one of an older "
            f"version write it first: python -m tempme_vl.manifest {folder}"
        )
    check_manifest(folder)
    api = huggingface_hub.HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as made:
            copy = Path(made)
            for name in listed_files(folder):
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                os.symlink((folder / name).resolve(), copy / name)
            _name_card(api, folder, copy, repo_id, revision)
            write_manifest(copy)
            done = api.upload_folder(
                repo_id=repo_id,
                folder_path=str(copy),
                commit_message=commit_message or "Upload of a tempme_vl model",
                revision=revision,
                delete_patterns=_SAVED,  # of an earlier model; what is in the folder is written anew
            )
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ValueError(f"{folder} could not be put on the hub as {repo_id!r}: {error}") from error
    return str(done.commit_url)


def _name_card(api: Any, folder: Path, copy: Path, repo_id: str, revision: str | None) -> None:
    """The card of the folder under the model's name on the hub, or the one that somebody has written there."""
    there = None
    if api.file_exists(repo_id, CARD_FILE, revision=revision):
        there = Path(api.hf_hub_download(repo_id, CARD_FILE, revision=revision)).read_text(encoding="utf-8")
    ours = (folder / CARD_FILE).read_text(encoding="utf-8") if (folder / CARD_FILE).is_file() else None
    if there is not None and not is_own(there):
        text: str | None = there
    else:
        text = renamed(ours, repo_id) if ours is not None and is_own(ours) else ours
    (copy / CARD_FILE).unlink(missing_ok=True)
    if text is not None:
        (copy / CARD_FILE).write_text(text, encoding="utf-8")
