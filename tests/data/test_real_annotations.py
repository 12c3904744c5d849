"""The readers on the public annotation files: TEMPME_ANNOTATIONS names a folder with one folder per data set.

MSRVTT_data.json is not public in one piece; the tests put one together from the id lists and the full test.
"""

import csv
import json
import os
import shutil
from pathlib import Path

import pytest

from tempme_vl.data.datasets import load_split
from tempme_vl.data.splits import holdout_validation

ROOT = Path(os.environ["TEMPME_ANNOTATIONS"])


@pytest.fixture(scope="module")
def msrvtt(tmp_path_factory):
    root = tmp_path_factory.mktemp("msrvtt")
    for path in (ROOT / "msrvtt").glob("*.csv"):
        shutil.copy(path, root)
    (full_test,) = (ROOT / "msrvtt").glob("MSRVTT_data*.json")
    data = json.loads(full_test.read_text())
    tested = {video["video_id"] for video in data["videos"]}
    with (root / "MSRVTT_train.9k.csv").open(newline="") as file:
        ids = [row["video_id"] for row in csv.DictReader(file) if row["video_id"] not in tested]
    data["videos"] += [{"video_id": i, "split": "train"} for i in ids]
    data["sentences"] += [{"video_id": i, "caption": f"{i} caption {k}"} for i in ids for k in range(20)]
    (root / "MSRVTT_data.json").write_text(json.dumps(data))
    return root


@pytest.mark.parametrize(
    ("split", "videos", "captions"),
    [("train_9k", 9000, 180_000), ("train_7k", 7010, 140_200), ("test_1k", 1000, 1000), ("test_full", 2990, 59_800)],
)
def test_msrvtt(msrvtt, split, videos, captions):
    result = load_split("msrvtt", msrvtt, split)
    assert (len(result.clips), result.num_captions) == (videos, captions)


def test_msrvtt_splits_do_not_overlap(msrvtt):
    ids = {
        split: {c.video_id for c in load_split("msrvtt", msrvtt, split).clips}
        for split in ("train_9k", "train_7k", "test_1k")
    }
    assert ids["train_7k"] < ids["train_9k"] and not ids["train_9k"] & ids["test_1k"]
    test = load_split("msrvtt", msrvtt, "test_1k")
    assert len({texts[0] for texts in test.captions}) == 995
    train, val = holdout_validation(load_split("msrvtt", msrvtt, "train_9k"), 500, seed=0)
    assert (len(train.clips), len(val.clips), len(set(val.captions))) == (8500, 500, 500)


@pytest.mark.parametrize(
    ("dataset", "split", "videos", "captions"),
    [
        ("msvd", "train", 1200, 48_774),
        ("msvd", "val", 100, 4_290),
        ("msvd", "test", 670, 27_763),
        ("activitynet", "train", 10_009, 10_009),
        ("activitynet", "val_1", 4_917, 4_917),
        ("didemo", "train", 8362, 8362),
        ("didemo", "val", 1062, 1062),
        ("didemo", "test", 1004, 1004),
    ],
)
def test_counts(dataset, split, videos, captions):
    result = load_split(dataset, ROOT / dataset, split)
    assert (len(result.clips), result.num_captions) == (videos, captions)


def test_didemo_from_its_original_files(tmp_path):
    for split, videos in (("val", 1065), ("test", 1004)):
        shutil.copy(ROOT / "didemo" / f"{split}_data.json", tmp_path)
        assert len(load_split("didemo", tmp_path, split).clips) == videos


def test_lsmdc_format(tmp_path):
    (sample,) = (ROOT / "lsmdc").glob("*SAMPLE.csv")
    shutil.copy(sample, tmp_path / "LSMDC16_challenge_1000_publictect.csv")
    assert load_split("lsmdc", tmp_path, "test").num_captions == 3
