"""One name for one thing."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tempme_vl"
# what every recipe, command or data set has a function for
ALIKE = {"main", "defaults", "checked", "build_model", "evaluate", "read_split", "split_of"}


def test_what_a_data_set_holds_is_no_clip() -> None:
    """A clip is the paper's group of frames inside an encoder."""
    word = re.compile(r"(?<!np\.)\b[cC]lips?\b|\w*Clips?(?=[A-Z(]|\b)\w*|\w*_clips?\b|\bclips?_\w*")
    names = {"CLIP4Clip", "UMT4Clip", "YouTubeClips", "open_clip", "clip_name"}  # the last a key of DiDeMo's files
    found = {
        (path.name, match[0])
        for path in (PACKAGE / "data").glob("*.py")
        for match in word.finditer(path.read_text())
        if match[0] not in names
    }
    assert not found


@pytest.mark.parametrize("part", ["data", "evaluation", "recipes"])
def test_no_two_functions_have_one_name(part: str) -> None:
    homes = defaultdict(set)
    for path in (PACKAGE / part).rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.name not in ALIKE:
                homes[node.name].add(path.name)
    twice = {name: files for name, files in homes.items() if len(files) > 1}
    assert homes and not twice
