"""A hub without a network: what is put there can be found there."""

from __future__ import annotations

import fnmatch
import shutil
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories are folders below `root`, a branch each; takes the place of huggingface_hub's client.

    Attributes:
        asked: keywords of every download.
        told: keywords of every call of the API, by its name.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch):
        self.root, self.asked, self.told = root, [], []
        self.client, self.download = huggingface_hub.HfApi, huggingface_hub.snapshot_download
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
        monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(head=lambda *_, **__: None))
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda **given: self._tell("HfApi", **given) or self)

    def branch(self, repo_id: str, revision: str | None = None) -> Path:
        return self.root / "repositories" / repo_id / (revision or "main")

    def _tell(self, name: str, **given: Any) -> None:
        real = self.client if name == "HfApi" else getattr(self.client, name)
        signature(real).bind(*(() if name == "HfApi" else ("self",)), **given)  # as the real one takes it
        self.told.append((name, given))

    def snapshot_download(
        self, repo_id: str, allow_patterns: Any = None, ignore_patterns: Any = None, **options: Any
    ) -> str:
        signature(self.download).bind(repo_id, **options)
        self.asked.append(options)
        source = self.branch(repo_id, options.get("revision"))
        if not source.is_dir():
            raise FileNotFoundError(f"404 {repo_id}")
        cache = self.root / "cache" / repo_id
        shutil.rmtree(cache, ignore_errors=True)
        names = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, cache / name)
        return str(cache)

    # ---- of HfApi

    def create_repo(self, repo_id: str, **given: Any) -> Any:
        self._tell("create_repo", repo_id=repo_id, **given)
        repo_id = repo_id if "/" in repo_id else f"me/{repo_id}"
        self.branch(repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def create_branch(self, repo_id: str, branch: str, exist_ok: bool) -> None:
        self._tell("create_branch", repo_id=repo_id, branch=branch, exist_ok=exist_ok)
        self.branch(repo_id, branch).mkdir(exist_ok=exist_ok)

    def file_exists(self, repo_id: str, filename: str, revision: str | None = None) -> bool:
        return (self.branch(repo_id, revision) / filename).is_file()

    def hf_hub_download(self, repo_id: str, filename: str, revision: str | None = None) -> str:
        return str(self.branch(repo_id, revision) / filename)

    def upload_folder(self, repo_id: str, folder_path: str, delete_patterns: list[str], **given: Any) -> Any:
        self._tell("upload_folder", repo_id=repo_id, folder_path=folder_path, delete_patterns=delete_patterns, **given)
        target = self.branch(repo_id, given["revision"])
        for path in [path for path in target.rglob("*") if path.is_file()]:
            name = path.relative_to(target).as_posix()
            if any(fnmatch.fnmatch(name, pattern) for pattern in delete_patterns):
                path.unlink()
        shutil.copytree(folder_path, target, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")
