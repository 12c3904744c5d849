"""Imports go downwards only. The table is the whole truth: a new part of the package needs a line here."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path

import pytest

import tempme_vl

ROOT = Path(__file__).parent.parent
CORE = {
    "state",
    "matching",
    "merging",
    "backbones",
    "families",
    "frontend",
    "pooling",
    "scheduling",
    "text",
    "card",
    "configs",
    "costs",
    "precision",
    "hub",
    "pretrained",
    "fit",
    "messages",
    "weights",
    "manifest",
    "schema",
    "libraries",
    "tuning",
    "registry",
    "registries",
}
COMMANDS = {"command", "command_line", "processes"}
MAY_IMPORT: dict[str, set[str]] = {
    # values and pure functions
    "precision": set(),
    "state": {"matching", "precision"},
    "matching": {"kernels", "precision"},
    "normalize": set(),
    "kernels": set(),  # they import Triton, and are imported for tensors on a GPU alone
    # saved folders
    "messages": set(),
    "registry": set(),
    "registries": {"registry"},  # by name, and imports what a name stands for when it is asked for
    "schema": {"data", "messages"},  # of data: how text and JSON are read
    "manifest": {"schema"},
    "fit": {"messages"},
    "card": {"manifest"},
    "hub": {"card", "manifest"},
    "pretrained": {"card", "hub", "manifest", "schema", "fit", "messages"},
    "weights": {"pretrained", "schema", "fit", "messages"},
    # processes that end together
    "processes": set(),
    "together": {"processes"},
    # how commands start and fail, and what they leave behind
    "reports": {"__init__"},
    "command_line": set(),
    "command": {"command_line", "reports", "processes", "together"},
    "libraries": set(),
    # what a front end is made of
    "costs": set(),
    "merging": {"state", "matching", "precision", "costs", "schema", "registries"},
    "compressors": {"merging", "state", "precision", "schema", "registries"},
    "backbones": {
        "state",
        "costs",
        "kernels",
        "pretrained",
        "weights",
        "fit",
        "schema",
        "messages",
        "libraries",
        "hub",
    },
    "scheduling": {"merging", "backbones"},
    "pooling": {"state", "precision"},
    "outputs": {"state", "pooling", "merging", "backbones"},
    "text": {"backbones", "precision", "pretrained", "weights", "fit", "schema", "libraries", "hub"},
    "families": {"backbones", "text", "registries", "pretrained", "weights", "manifest", "schema", "libraries", "hub"},
    "configs": {"backbones", "families", "merging", "messages", "pretrained", "scheduling", "schema"},
    "frontend": {
        *("state", "merging", "backbones", "families", "scheduling", "pretrained", "schema", "messages", "data"),
        *("card", "configs", "hub", "normalize", "pooling", "outputs"),
    },
    "__init__": CORE | {"tasks", "integrations", "pipeline"},
    # what of a model trains
    "tuning": {"schema", "registries", "state", "precision", "merging", "costs", "backbones", "text", "pooling"},
    # what is made of front ends
    "tasks": CORE | {"integrations"},
    "integrations": CORE | {"data", "compressors"},
    # of data: splits and predictions, to score them; of training: ranks; kernels and normalize beside their plain forms
    "evaluation": {*CORE, *COMMANDS, "kernels", "normalize"}
    | {"tasks", "integrations", "pipeline", "data", "training", "reports"},
    # what brings all of it together
    "pipeline": CORE | {"tasks", "data"},
    "recipes": CORE | {"tasks", "integrations", "evaluation", "data", "training", "reports"} | COMMANDS,
    "search": CORE | {"__init__", "tasks", "pipeline", "data", "reports"} | COMMANDS,
    "export": CORE | {"tasks", "reports"} | COMMANDS,
    # the command, which knows all others
    "cli": {"__init__", "command", "command_line", "recipes", "evaluation", "search", "export"},
    "lmms_eval": {"integrations", "libraries"},
    # side shelves, which know no model and not each other
    "data": {"messages", "normalize", "registries"},
    "training": {"processes", "together", "manifest", "schema", "libraries"},
}
# above a part, and named there for a type checker alone: what its mappings hold, and what it is applied to
TYPES: dict[str, set[str]] = {
    "registries": {"compressors", "data", "families", "integrations", "merging", "tasks", "tuning"},
    "tuning": {"frontend"},
}
SCRIPTS = ("recipes", "eval")
# of pyproject.toml, and perhaps not installed
SEARCHED = {"lancedb", "pyarrow", "faiss", "fastapi", "starlette", "uvicorn", "ray", "mteb", "datasets"} | {
    "sentence_transformers"
}
EXTRAS = {"lmms_eval", *SEARCHED}
HEAVY = {"deepspeed", "peft", "timm", "decord", "lancedb", "pyarrow", "faiss", "ray"}  # and not always needed


@cache
def imports(path: Path, functions: bool = True, types: bool = True) -> set[str]:
    """Dotted names that a file imports, `from a import b` as a.b.

    Args:
        functions: also in functions.
        types: also for a type checker alone.
    """
    found = set()
    tree = ast.parse(path.read_text())
    left = [part for part in ast.walk(tree) if isinstance(part, ast.FunctionDef) and not functions]
    left += [] if types else [part for part in ast.walk(tree) if isinstance(part, ast.If) and _asks_for_types(part)]
    outside = {id(node) for part in left for node in ast.walk(part)}
    for node in ast.walk(tree):
        if id(node) in outside:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively; write the package's name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _asks_for_types(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING" and not node.orelse


def known() -> set[str]:
    """Top-level names that may be imported from outside; the search through all installed packages takes a second."""
    # not `packages_distributions`: of Python 3.10 it finds only packages that have a top_level.txt
    files = (file for package in distributions() for file in package.files or ())
    installed = {file.parts[0].removesuffix(".py") for file in files if file.suffix == ".py"}
    return set(sys.stdlib_module_names) | installed | {"tempme_vl"} | EXTRAS


def part(name: str) -> str:
    """The part of tempme_vl that a dotted name lies in; what tempme_vl itself offers is its __init__."""
    names = name.split(".")
    return names[1] if len(names) > 1 and names[1] in MAY_IMPORT else "__init__"


PACKAGE = sorted((ROOT / "tempme_vl").rglob("*.py"))
SCRIPT_FILES = [path for folder in SCRIPTS for path in sorted((ROOT / folder).rglob("*.py"))]


def test_files_are_found() -> None:
    assert len(PACKAGE) > 30 and SCRIPT_FILES
    assert {path.relative_to(ROOT / "tempme_vl").parts[0].removesuffix(".py") for path in PACKAGE} == set(MAY_IMPORT)


def test_package_imports_downwards() -> None:
    wrong = {}
    for path in PACKAGE:
        own = path.relative_to(ROOT / "tempme_vl").parts[0].removesuffix(".py")
        used = {part(name) for name in imports(path) if name.split(".")[0] == "tempme_vl"} - {own}
        named = TYPES.get(own, set())
        if upwards := used - named - MAY_IMPORT[own]:
            wrong[path] = f"{own} may import {sorted(MAY_IMPORT[own])}, not {sorted(upwards)}"
        if run := named & {part(name) for name in imports(path, types=False)}:
            wrong[path] = f"{own} may import {sorted(run)} for a type checker alone"
    assert not wrong


def test_scripts_are_not_imported_and_everything_else_is_installed() -> None:
    may = known() - {*SCRIPTS, "tests"}
    wrong = {path: {name.split(".")[0] for name in imports(path)} - may for path in PACKAGE + SCRIPT_FILES}
    assert not {path: tops for path, tops in wrong.items() if tops}


def test_the_package_offers_its_names_on_first_use() -> None:
    homes = {f"{home}.{name}" for home, names in tempme_vl._HOMES.items() for name in names}
    assert homes == {name for name in imports(Path(tempme_vl.__file__)) if name.startswith("tempme_vl.")}
    assert {name.split(".")[-1] for name in homes} == set(tempme_vl.__all__) <= set(dir(tempme_vl))
    for home, names in tempme_vl._HOMES.items():
        for name in names:
            assert getattr(tempme_vl, name) is getattr(import_module(home), name)
    with pytest.raises(AttributeError, match="no attribute 'Frontend'"):
        _ = tempme_vl.Frontend


def test_heavy_libraries_are_imported_where_they_are_used() -> None:
    """Inside functions; timm also by the file that is about its towers."""
    for path in PACKAGE:
        tops = {name.split(".")[0] for name in imports(path, functions=False, types=False)}
        allowed = {"timm"} if path.parts[-2:] == ("backbones", "timm.py") else set()
        assert not tops & HEAVY - allowed, path


FRESH = """
import sys
def absent(*modules):
    found = set(modules) & set(sys.modules)
    assert not found, found

HEAVY = ("deepspeed", "peft", "decord", "accelerate", "lancedb", "pyarrow", "faiss", "fastapi")
TOWERS = ("open_clip", "timm", "transformers", "torchvision", "torch._dynamo")
import tempme_vl
absent("torch", "numpy", "tokenizers")
from tempme_vl.cli import main
main(["--help"])
import tempme_vl.evaluation.videoqa
absent("torch", "numpy")
tempme_vl.create_frontend("umt:tiny", method="none")
absent(*HEAVY, *TOWERS, "av", "PIL", "tokenizers")
import tempme_vl.evaluation.encode, tempme_vl.evaluation.retrieval, tempme_vl.training.engine
from tempme_vl.recipes import retrieval, videoqa
tempme_vl.read_video, tempme_vl.VideoQA, tempme_vl.create_qa_model, tempme_vl.create_retrieval_model
absent(*HEAVY, *TOWERS)
tempme_vl.create_frontend("open_clip:tiny", method="none")
absent(*HEAVY, "transformers.modeling_utils", "tempme_vl.integrations")  # open_clip imports all of TOWERS
from tempme_vl.recipes import videollm
import tempme_vl.integrations, tempme_vl.tasks.videollm, tempme_vl.evaluation.measure
absent("deepspeed", "peft", "decord")  # of HEAVY, transformers' models import accelerate
"""


def test_a_fresh_process_imports_no_library_before_it_needs_it() -> None:
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def test_the_table_itself_has_no_circle() -> None:
    done: set[str] = set()
    while len(done) < len(MAY_IMPORT):
        ready = {name for name, below in MAY_IMPORT.items() if below <= done} - done
        assert ready, f"a circle among {sorted(set(MAY_IMPORT) - done)}"
        done |= ready


def test_modules_have_no_circle_either() -> None:
    """Of single files, with what they import inside functions, and without what a type checker alone reads."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in PACKAGE}

    def below(name: str, path: Path) -> set[str]:
        found = imports(path, types=False)
        return {other if other in files else other.rpartition(".")[0] for other in found} & set(files) - {name}

    left = {name: below(name, path) for name, path in files.items()}
    assert left["tempme_vl.merging"] >= {"tempme_vl.merging.base", "tempme_vl.registries"}
    while left:
        ready = [name for name, names in left.items() if not names & set(left)]
        assert ready, f"a circle among {sorted(left)}"
        for name in ready:
            del left[name]


def test_the_picture_of_the_floors_is_of_this_table() -> None:
    from floors import PICTURE, floors, picture

    assert floors({"a": {"b", "c"}, "b": {"c"}, "c": set(), "d": set()}) == [["c", "d"], ["b"], ["a"]]
    assert PICTURE.read_text() == picture(MAY_IMPORT), "draw it anew: make floors"


def test_the_page_of_the_public_names_has_them_all() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    shown = set(re.findall(r"`(\w+)[`(.]", page.partition("|---|---|")[2].partition("\n\n")[0]))
    assert set(tempme_vl.__all__) <= shown, set(tempme_vl.__all__) - shown
