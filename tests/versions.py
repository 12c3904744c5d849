"""The tests of all that builds on transformers, in several versions of it, and what came out in docs/versions.md.

    python tests/versions.py [VERSION ...]

Each version has an environment of its own in .venvs/, with what it needs in other versions than the environment that
runs this script has; all else is found there. The last version is that environment's own. A host that a version
cannot run must be refused, in a test, and a skipped test counts as failed. Only a run of all versions writes the page.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import venv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import pytest
from suite import END, PAGE, ROOT

HTTP = ("httpx==0.28.1", "httpcore==1.0.9", "certifi==2026.10.19.post1")
REQUESTS = ("requests==2.34.2", "charset-normalizer==3.5.3", "urllib3==2.8.0", "certifi==2026.10.19.post1")
# The oldest supported one, and where something changed; with what each needs in other versions than constraints.txt.
OLDER = {
    "4.57.6": ("huggingface_hub==0.36.2", "tokenizers==0.22.2", *REQUESTS),
    "5.0.0": ("huggingface_hub==1.33.0", "tokenizers==0.22.2", "typer-slim==0.24.0", *HTTP),
    "5.14.1": ("huggingface_hub==1.33.0", "tokenizers==0.22.2", *HTTP),
    "5.18.0": (),
}
HOSTS = tuple(f"tests/integrations/test_{name}.py" for name in ("hosts", "post_encoder", "where", "images"))
SHARED, TOWERS = "tests/integrations/test_compressed.py", "tests/backbones/test_hf.py"
PARTS = ("transformers", "tokenizers", "huggingface_hub", "peft")


@dataclass
class Case:
    """One test as it went.

    Attributes:
        file, test: where it stands.
        name: of the host or tower that it is of; "" if of none.
        passed: neither failed nor skipped.
        notes: what it recorded: ("note" or "refused", text).
    """

    file: str
    test: str
    name: str
    passed: bool = True
    notes: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Report:
    """All tests in one version.

    Attributes:
        versions: of the `PARTS`.
        cases: all of them.
        complete: pytest collected and ran all it found.
    """

    versions: dict[str, str]
    cases: list[Case]
    complete: bool


# ---- inside an environment


class Collector:
    """A plug-in of pytest that keeps what each test was and how it went."""

    def __init__(self) -> None:
        self.cases: dict[str, Case] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        for item in items:
            skipped = item.get_closest_marker("skip")
            if skipped and "empty parameter set" in skipped.kwargs.get("reason", ""):
                continue  # this transformers has no host of that kind
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            file = item.path.relative_to(ROOT).as_posix()
            self.cases[item.nodeid] = Case(file, item.originalname, parameters.get("name", ""))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.nodeid not in self.cases:
            return
        case = self.cases[report.nodeid]
        case.passed = case.passed and report.passed
        if report.when == "teardown":
            case.notes = [(kind, str(text)) for kind, text in report.user_properties]


def run_here(output: Path) -> None:
    """Runs the tests with the transformers of this interpreter and writes a `Report`."""
    collector = Collector()
    code = pytest.main(
        ["-n0", "-m", "", "-rfEs", "--tb=short", "-p", "no:cacheprovider", *HOSTS, SHARED, TOWERS], [collector]
    )
    complete = code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and bool(collector.cases)
    cases = [vars(case) for case in collector.cases.values()]
    output.write_text(json.dumps([{part: version_of(part) for part in PARTS}, cases, complete]))


# ---- outside


def python_of(version: str) -> str:
    """The interpreter of a version's environment, which is made or mended where that is needed."""
    if version == version_of("transformers"):
        return sys.executable
    folder = ROOT / ".venvs" / version
    python = str(folder / "bin" / "python")
    if not Path(python).exists():
        venv.create(folder, symlinks=True)
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own, site = (
        Path(subprocess.run([interpreter, "-c", ask], check=True, capture_output=True, text=True).stdout.strip())
        for interpreter in (sys.executable, python)
    )
    # a line of a .pth file comes behind the environment's own packages
    (site / "behind.pth").write_text(os.path.relpath(own, site) + "\n")
    exact = [f"transformers=={version}", *OLDER.get(version, ())]
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *exact], check=True)
    return python


def run(version: str) -> Report:
    """The tests in one version."""
    print(f"transformers {version}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "report.json"
        command = [python_of(version), str(Path(__file__).resolve()), "--here", str(output)]
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path})
        if not output.exists():
            return Report({"transformers": version}, [], False)
        versions, cases, complete = json.loads(output.read_text())
    assert versions["transformers"] == version, versions
    return Report(versions, [Case(**{**case, "notes": [tuple(n) for n in case["notes"]]}) for case in cases], complete)


# ---- the page


class Footnotes:
    """Texts with the letters that stand for them in a table."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def letter(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return chr(ord("a") + self.texts.index(text))


def cell(cases: Sequence[Case], footnotes: Footnotes | None) -> str:
    """How many passed; with footnotes, what they recorded too."""
    failed = sum(not case.passed for case in cases)
    text = str(len(cases) - failed) if cases else "-"
    if footnotes is not None:
        notes = dict.fromkeys(note for case in cases for note in case.notes)
        if any(kind == "refused" for kind, _ in notes):
            text = "refused"
        letters = sorted(footnotes.letter(said) for _, said in notes)
        text += f" ({', '.join(letters)})" if letters else ""
    return f"**{failed} failed**, {text}" if failed else text


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def page(reports: Sequence[Report]) -> str:
    """Its part of docs/versions.md: nothing in it changes from one run to the next, unless a result does."""
    versions = [report.versions["transformers"] for report in reports]
    torch = version_of("torch").split("+")[0]
    footnotes = Footnotes()

    def rows(files: Sequence[str], key: str, nameless: str = "", notes: Footnotes | None = None) -> list[list[str]]:
        """A row for each name or test of the files, in the order of the newest version; those of no name last."""
        found = [getattr(case, key) for report in reversed(reports) for case in report.cases if case.file in files]
        made = []
        for value in sorted(dict.fromkeys(found), key=lambda value: not value):
            chosen = [[c for c in r.cases if c.file in files and getattr(c, key) == value] for r in reports]
            label = (value or nameless).removeprefix("test_").replace("_", " ")
            made.append([label, *(cell(cases, notes) for cases in chosen)])
        return made

    hosts = rows(HOSTS, "name", "merging alone", footnotes)
    shared = ["prompts, labels, LoRA, folders"]
    shared += [cell([case for case in report.cases if case.file == SHARED], None) for report in reports]
    towers = rows([TOWERS], "name", "all of them")
    totals = [str(sum(case.passed for case in report.cases)) for report in reports]
    own = [[part, *(report.versions.get(part, "-") for report in reports)] for part in PARTS[1:]]
    return "\n".join(
        [
            "## Versions of transformers",
            "",
            "Written by `make versions` (`tests/versions.py`), which runs the tests of video-language models and of",
            "transformers' towers in several versions, each in an environment of its own. Numbers are tests that",
            "passed; a skipped one counts as failed. Tiny random models on CPU,",
            f"Python {platform.python_version()}, torch {torch}.",
            "",
            *table(["transformers", *versions], [*own, ["tests", *totals]]),
            "",
            "### Video-language models",
            "",
            *table(["host", *versions], [*hosts, shared]),
            "",
            *(f"- {footnotes.letter(text)}: {text}" for text in footnotes.texts),
            "",
            "With one way in there are fewer tests than with two. Our beam search is held to that of the host's",
            "language model on the embeddings that the host's own forward makes of a video, which should be the",
            "host's own.",
            "",
            "### Towers of transformers",
            "",
            *table(["tower", *versions], towers),
            "",
            "### What is tested of a video-language model",
            "",
            *table(["test", *versions], rows(HOSTS, "test")),
            "",
        ]
    )


def main() -> None:
    if sys.argv[1:2] == ["--here"]:
        run_here(Path(sys.argv[2]))
        return
    newest = version_of("transformers")
    every = [*(version for version in OLDER if version != newest), newest]
    chosen = sys.argv[1:] or every
    reports = [run(version) for version in chosen]
    text = page(reports)
    print(text)
    if chosen == every:
        suite, _ = PAGE.read_text().split(END)
        PAGE.write_text(f"{suite}{END}\n\n{text}")
    failed = [(r.versions["transformers"], c) for r in reports for c in r.cases if not c.passed]
    counts = Counter(version for version, _ in failed)
    broken = [r.versions["transformers"] for r in reports if not r.complete]
    if failed or broken:
        names = [f"{version}: {case.file}::{case.test} {case.name}" for version, case in failed]
        sys.exit("\n".join([*names, f"failed tests: {dict(counts)}; runs that did not end: {broken}"]))


if __name__ == "__main__":
    main()
