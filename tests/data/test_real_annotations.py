"""The readers on the public annotation files: TEMPME_ANNOTATIONS names a folder with one folder per data set.

MSRVTT_data.json is not public in one piece; the tests put one together from the id lists and the full test.
"""

import csv
import json
import os
import shutil
from pathlib import Path

import pytest

from tempme_vl.data.datasets import load_questions, load_split
from tempme_vl.data.splits import holdout_validation
from tempme_vl.data.videoqa import answer_vocabulary, coverage, read_questions, read_vocabulary

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
    assert (len(result.videos), result.num_captions) == (videos, captions)


def test_msrvtt_splits_do_not_overlap(msrvtt):
    ids = {
        split: {c.video_id for c in load_split("msrvtt", msrvtt, split).videos}
        for split in ("train_9k", "train_7k", "test_1k")
    }
    assert ids["train_7k"] < ids["train_9k"] and not ids["train_9k"] & ids["test_1k"]
    test = load_split("msrvtt", msrvtt, "test_1k")
    assert len({texts[0] for texts in test.captions}) == 995
    train, val = holdout_validation(load_split("msrvtt", msrvtt, "train_9k"), 500, seed=0)
    assert (len(train.videos), len(val.videos), len(set(val.captions))) == (8500, 500, 500)


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
    assert (len(result.videos), result.num_captions) == (videos, captions)


def test_didemo_from_its_original_files(tmp_path):
    for split, videos in (("val", 1065), ("test", 1004)):
        shutil.copy(ROOT / "didemo" / f"{split}_data.json", tmp_path)
        assert len(load_split("didemo", tmp_path, split).videos) == videos


@pytest.mark.parametrize(
    ("dataset", "split", "file", "count"),
    [
        ("didemo", "train", "train.jsonl", 8362),
        ("didemo", "test", "test.jsonl", 1004),
        ("activitynet", "train", "train.json", 10_009),
        ("activitynet", "val_1", "val.json", 4_917),
    ],
)
def test_the_layouts_of_testa_hold_the_same(tmp_path, dataset, split, file, count):
    public = load_split(dataset, ROOT / dataset, split)
    pairs = [(video.video_id, text) for video, (text,) in zip(public.videos, public.captions, strict=True)]
    if dataset == "didemo":
        (tmp_path / file).write_text("".join(json.dumps({"clip_name": i, "caption": t}) + "\n" for i, t in pairs))
    else:
        (tmp_path / file).write_text(json.dumps([{"video": f"{i}.mp4", "caption": [t]} for i, t in pairs]))
    found = load_split(dataset, tmp_path, split)
    assert len(found.videos) == count and found.captions == public.captions
    assert [video.video_id for video in found.videos] == [video.video_id for video in public.videos]


def test_lsmdc_format(tmp_path):
    (sample,) = (ROOT / "lsmdc").glob("*SAMPLE.csv")
    shutil.copy(sample, tmp_path / "LSMDC16_challenge_1000_publictect.csv")
    assert load_split("lsmdc", tmp_path, "test").num_captions == 3


@pytest.mark.parametrize(
    ("dataset", "split", "videos", "questions"),
    [
        ("msrvtt_qa", "val", 497, 12_278),
        ("msrvtt_qa", "test", 2990, 72_821),
        ("msvd_qa", "train", 1161, 30_933),
        ("msvd_qa", "val", 245, 6_415),
        ("msvd_qa", "test", 504, 13_157),
        ("activitynet_qa", "train", 3200, 32_000),
        ("activitynet_qa", "val", 1800, 18_000),
        ("activitynet_qa", "test", 800, 8_000),
    ],
)
def test_question_counts(dataset, split, videos, questions):
    result = load_questions(dataset, ROOT / dataset, split)
    assert (len({q.video for q in result.questions}), len(result.questions)) == (videos, questions)


def test_the_json_and_the_csv_of_msrvtt_qa_are_one():
    (derived,) = (ROOT / "msrvtt_qa").glob("val_qa*.json")
    assert read_questions(derived).questions == read_questions(ROOT / "msrvtt_qa" / "val.csv").questions


def test_answer_vocabularies():
    test = load_questions("msrvtt_qa", ROOT / "msrvtt_qa", "test")
    words = read_vocabulary(ROOT / "msrvtt_qa" / "ans_word.json")
    covered = [coverage(words[:size], test) for size in (1000, 1500, 4000)]
    assert covered == [100 * questions / 72_821 for questions in (65_654, 67_719, 70_452)]  # 90.2, 93.0, 96.7 %
    train = answer_vocabulary(load_questions("msvd_qa", ROOT / "msvd_qa", "train"))
    assert len(train) == 1852
    # the public list is the most frequent training answers too, and breaks ties in some other way
    assert len(set(train[:1000]) & set(read_vocabulary(ROOT / "msvd_qa" / "answer_set.txt"))) > 900
