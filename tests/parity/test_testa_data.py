"""What TESTA's readers make of texts and files, and its rates."""

from __future__ import annotations

import csv
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from parity.cases import find

from tempme_vl.data.datasets import load_split
from tempme_vl.data.sampling import strided
from tempme_vl.data.splits import RetrievalSplit
from tempme_vl.text.tokenizers import clean_caption, clean_question
from tempme_vl.training.optim import warmup_cosine

CASES = find("testa", "testa_data*", outside=True, once=True)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("name", "clean"), [("pre_caption", clean_caption), ("pre_question", clean_question)])
def test_texts_are_cleaned_alike(case: Any, name: str, clean: Callable[[str], str]) -> None:
    """Blanks aside, which no tokenizer sees; there the words are counted before they are split into pieces."""
    rows = case.config[name]
    assert rows
    for row in rows:
        ours, theirs = clean(row["text"]).split(), row["out"].split()
        cut = max(len(ours), len(row["text"].split(" "))) > row["max_words"]
        assert theirs and (ours[: len(theirs)] if cut else ours) == theirs


def write_queryd(root: Path, given: dict[str, Any]) -> RetrievalSplit:
    names, words = given["names"], dict(given["captions"])
    words["video-bb"] = [[f"w{i}" for i in range(140)]]
    (root / "exists_test_list.txt").write_text("\n".join(names) + "\n")
    (root / "raw_captions_combined_filtered.pkl").write_bytes(pickle.dumps(words))
    return load_split("queryd", root, "test")


def write_condensed_movies(root: Path, given: list[str]) -> RetrievalSplit:
    rows = [["videoid", "split", "caption"], *(row.split(",", 2) for row in given if row.count(",") == 2)]
    rows[-1][2] = "Again him " + " ".join(f"w{i}" for i in range(140))
    with (root / "train_val_challf0.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return load_split("condensed_movies", root, "train")


def write_didemo(root: Path, given: list[dict[str, str]]) -> RetrievalSplit:
    (root / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    return load_split("didemo", root, "test")


def write_activitynet(root: Path, given: list[Any]) -> RetrievalSplit:
    long = {"video": "v_2.mp4", "caption": [" ".join(f"w{i}" for i in range(140))]}
    (root / "val.json").write_text(json.dumps([given[0], long]))
    return load_split("activitynet", root, "val_1")


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("name", "write", "limit"),
    [
        ("queryd", write_queryd, 128),
        ("condensedmovies", write_condensed_movies, 50),
        ("didemo", write_didemo, None),
        ("activitynet", write_activitynet, 50),
    ],
)
def test_layouts(case: Any, name: str, write: Callable[..., RetrievalSplit], limit: int | None, tmp_path: Path) -> None:
    layout = case.config["layouts"][name]
    split = write(tmp_path, layout["input"])
    first, *others = layout["out"]["text"]
    found = [text for texts in split.captions for text in texts]
    if limit is None:  # neither cleaned nor cut, and videos that are not there are left out there alone
        assert sorted(found[: 1 + len(others)]) == sorted([first, *others])
        return
    assert clean_caption(found[0]) == first
    last = clean_caption(found[1]).split()[:limit]
    assert " ".join(last).endswith((others[0] if isinstance(others[0], str) else others[0][0]).strip())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rates_of_epochs(case: Any) -> None:
    expected = case.config["lr_1e-5_10_epochs"]
    assert [1e-5 * warmup_cosine(epoch, 10, 0.0) for epoch in range(10)] == pytest.approx(expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_frames(case: Any) -> None:
    rows = case.config["frame_indices"]
    assert len(rows) > 10
    for row in rows:
        assert strided(row["frames"], row["num"]).tolist() == row["nlvl_uniform"], row["frames"]
