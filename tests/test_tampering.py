"""Damaged folders of every kind: an error that names the file, or the very model that was saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tamper

QUICK = ("frontend", "frontend-timm", "umt-retrieval", "qa-classifier")


def _names(verdicts: list[tamper.Verdict], *kinds: str) -> list[str]:
    return [f"{v.kind}: {v.mutation.file}: {v.mutation.name}: {v.said[:200]}" for v in verdicts if v.kind in kinds]


@pytest.mark.parametrize("name", QUICK)
def test_some_damage_is_named(tmp_path: Path, name: str) -> None:
    verdicts = tamper.tamper(name, tmp_path, part=13)
    assert len(verdicts) > 15 and not _names(verdicts, "unnamed", "untyped", "hang", "other")


@pytest.mark.parametrize("name", QUICK)
def test_without_a_manifest_the_settings_themselves_are_checked(tmp_path: Path, name: str) -> None:
    """What nobody could know without hashes (other weights, other words) loads; nothing fails in another way."""
    verdicts = tamper.tamper(name, tmp_path, bare=True, part=17)
    assert len(verdicts) > 10 and not _names(verdicts, "untyped", "hang")


@pytest.mark.slow
@pytest.mark.parametrize("name", tamper.KINDS)
def test_much_damage_is_named(tmp_path: Path, name: str) -> None:
    """A fifth; all of it: python tests/tamper.py."""
    verdicts = tamper.tamper(name, tmp_path, part=5)
    assert not _names(verdicts, "unnamed", "untyped", "hang", "other")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in tamper.KINDS if name not in QUICK])
def test_without_a_manifest_the_settings_of_all_kinds_are_checked(tmp_path: Path, name: str) -> None:
    verdicts = tamper.tamper(name, tmp_path, bare=True, part=31)
    # a tokenizer of transformers with a word of the number 10^9 takes its time, which nothing here can know
    ours = [verdict for verdict in verdicts if not verdict.mutation.file.startswith("tokenizer")]
    assert not _names(verdicts, "untyped") and not _names(ours, "hang")


@pytest.mark.parametrize("name", [name for name in tamper.KINDS if name.startswith(("qa-l", "comp", "video"))])
def test_a_manifest_holds_every_file_but_those_that_nobody_reads(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    tamper.KINDS[name].make(folder)
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    listed = set(json.loads((folder / tamper.MANIFEST).read_text())["files"])
    assert there - listed <= {tamper.MANIFEST, "README.md", "adapter/README.md"} and listed <= there
