"""What a saved folder holds: `manifest.json`, with the size and the SHA-256 of every file that is read back.

    python -m tempme_vl.manifest FOLDER     writes it anew, after a folder was changed on purpose

Reading a folder first compares: a file that was changed, cut or lost, or a further one that would be read, is a
`FolderError`. It finds accidents (copies that broke off, disks, edits), not attacks: who can change a file can change
the manifest, too. A folder without one, such as of an older version, is read as it is, which is logged. The
card (README.md) is listed too, but is there to be edited: another one is logged, and no error.

Hashing costs about a second for a gigabyte and CPU core (files are hashed side by side), which is little beside what
is done with a model that size. Training checkpoints are larger and written often: of their files above `SAMPLED` only
the size and some evenly spaced blocks count.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from tempme_vl.schema import ConfigError, Range, read, read_json

logger = logging.getLogger(__name__)

MANIFEST_FILE, CARD_FILE = "manifest.json", "README.md"
SAMPLED = 64 << 20  # bytes
_BLOCK, _BLOCKS = 1 << 20, 64

# Files that our loaders, transformers and peft look for by themselves; whatever else lies in a folder is nobody's.
READ = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*"),
    *("vocab.*", "merges.txt", "*.model", "answers.json", "tempme.json", "videollm.json", "adapter_*.*"),
    *("tokenizer*.json", "*token*_map.json", "added_tokens.json", "*processor*_config.json", "processor_config.json"),
    *("chat_template.*", "*.jinja", "*.py"),
)
FOLDERS = ("", "adapter", "llm", "tokenizer", "qformer_tokenizer")


class FolderError(ValueError):
    """A saved folder that is not as it was written; names the folder, the file, what was expected and what to do."""


@contextmanager
def errors_in(place: object, kind: type[Exception] = ValueError) -> Iterator[None]:
    """Makes an error a FolderError with the place in front; one that names it already stays.

    Args:
        kind: Exception around readers of other libraries, which fail of damaged files in many ways.
    """
    try:
        yield
    except kind as error:
        if isinstance(error, FolderError | ConfigError) and str(place) in str(error):
            raise
        what = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise FolderError(f"{place}: {what}") from error


@dataclass(frozen=True)
class Entry:
    """A file: its bytes, and the SHA-256 of all of them or, if `sampled`, of evenly spaced blocks."""

    size: Annotated[int, Range(0, 1 << 53)]
    sha256: str
    sampled: bool = False


@dataclass(frozen=True)
class Manifest:
    """Entries by path, relative to the folder, with "/"."""

    files: dict[str, Any]
    format: Annotated[int, Range(1, 1)] = 1


def write_manifest(folder: str | Path, everything: bool = False) -> None:
    """Writes manifest.json of the files that are there now; the last step of saving.

    Args:
        everything: a training checkpoint: all files count, whatever their names, and those above `SAMPLED` bytes by
            samples.
    """
    folder = Path(folder)
    names = _all_files(folder) if everything else _read_files(folder)
    if not everything and (folder / CARD_FILE).is_file():
        names.append(CARD_FILE)
    sampled = [everything and (folder / name).stat().st_size > SAMPLED for name in names]
    entries = _entries(folder, names, sampled)
    data = {"format": 1, "files": {name: asdict(entry) for name, entry in zip(names, entries, strict=True)}}
    partial = folder / f".{MANIFEST_FILE}.partial"
    partial.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(partial, folder / MANIFEST_FILE)


def check_manifest(folder: str | Path, only: Sequence[str] = ()) -> None:
    """Compares a folder with its manifest; a folder without one passes, with a line in the log.

    Args:
        only: check no other files than these.

    Raises:
        FolderError: a file is changed, cut or missing, a further one would be read, or the manifest itself is damaged.
    """
    folder = Path(folder)
    if not (folder / MANIFEST_FILE).exists():
        if not only:
            logger.warning("%s has no %s: its files are read as they are, unchecked", folder, MANIFEST_FILE)
        return
    expected = _read_manifest(folder)
    _compare_card(folder, expected, only)
    further = [name for name in only or _read_files(folder) if name not in expected and (folder / name).exists()]
    if further:
        raise FolderError(
            f"{folder}: {', '.join(further[:5])} would be read, and {'is' if len(further) == 1 else 'are'} not among "
            f"the {len(expected)} files that were saved. Move it away; {_on_purpose(folder)}"
        )
    names = [name for name in expected if not only or name in only]
    problems = []
    for name in names:
        path, entry = folder / name, expected[name]
        if not path.is_file():
            problems.append(f"{name} is {'no regular file' if path.exists() else 'missing'}")
        elif (size := path.stat().st_size) != entry.size:
            problems.append(f"{name} has {size} bytes instead of {entry.size}")
    if not problems:
        found = _entries(folder, names, [expected[name].sampled for name in names])
        problems = [
            f"{name} has other content (SHA-256 {entry.sha256[:12]}... instead of {expected[name].sha256[:12]}...)"
            for name, entry in zip(names, found, strict=True)
            if entry != expected[name]
        ]
    if problems:
        raise FolderError(
            f"{folder} is not as it was saved: {'; '.join(problems[:5])}{'; ...' if len(problems) > 5 else ''}. Copy "
            f"or save it again (was that interrupted?); {_on_purpose(folder)}"
        )


def listed_files(folder: str | Path) -> list[str]:
    """The files that a folder's manifest names, relative to it.

    Raises:
        FolderError: the manifest is damaged.
    """
    return list(_read_manifest(Path(folder)))


def _compare_card(folder: Path, expected: dict[str, Entry], only: Sequence[str]) -> None:
    """Takes the card out of what is expected; logs that it is another one."""
    entry, file = expected.pop(CARD_FILE, None), folder / CARD_FILE
    if entry is not None and not only and (not file.is_file() or _entry(file, False) != entry):
        logger.info("%s is not as it was saved, which says nothing of the model", file)


def _read_manifest(folder: Path) -> dict[str, Entry]:
    path = folder / MANIFEST_FILE
    try:
        files = read(Manifest, read_json(path), str(path)).files
        entries = {name: read(Entry, entry, f"{path}, {name!r}") for name, entry in files.items()}
    except ConfigError as error:
        raise FolderError(f"{error}. The manifest is damaged: copy the folder again; {_on_purpose(folder)}") from error
    if outside := [name for name in entries if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]:
        raise FolderError(f"{path}: expected files of this folder; got {outside[0]!r}; {_on_purpose(folder)}")
    return entries


def _on_purpose(folder: Path) -> str:
    return (
        f"if you changed the folder on purpose, write its manifest anew: python -m tempme_vl.manifest {folder} "
        f"(or delete {MANIFEST_FILE})"
    )


def _read_files(folder: Path) -> list[str]:
    """The files that loaders look for, relative to the folder."""
    found = []
    for part in FOLDERS:
        names = sorted(entry.name for entry in (folder / part).iterdir()) if (folder / part).is_dir() else []
        found += [f"{part}/{name}".lstrip("/") for name in names if any(fnmatch(name, pattern) for pattern in READ)]
    return [name for name in found if (folder / name).is_file() and name != MANIFEST_FILE]


def _all_files(folder: Path) -> list[str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path.relative_to(folder).as_posix() for path in paths if path.name != MANIFEST_FILE]


def _entries(folder: Path, names: Sequence[str], sampled: Sequence[bool]) -> list[Entry]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashlib lets other threads run
        return list(pool.map(lambda name, part: _entry(folder / name, part), names, sampled))


def _entry(path: Path, sampled: bool) -> Entry:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if sampled:
            for number in range(_BLOCKS):
                stream.seek(max(0, size - _BLOCK) * number // (_BLOCKS - 1))
                digest.update(stream.read(_BLOCK))
        else:
            while block := stream.read(_BLOCK):
                digest.update(block)
    return Entry(size, digest.hexdigest(), sampled)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit(f"usage: python -m tempme_vl.manifest FOLDER; got {sys.argv[1:]}")
    write_manifest(sys.argv[1])
