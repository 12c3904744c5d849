"""The annotation files of TESTA's users, rows as its code reads them."""

from __future__ import annotations

import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest

from tempme_vl.data.datasets import Source, load_questions, load_split
from tempme_vl.data.files import AnnotationError

WORDS = {
    "video-aa": [["A", "Man", "walks", "."], ["He (slowly)", "sits", "!"]],
    "video-bb": [["no", "video"]],
    "video-cc": [["x"]],
}


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def write_queryd(root: Path, captions: object = WORDS, names: str = "video-bb\nvideo-aa\n") -> Path:
    write(root / "exists_test_list.txt", names)
    file = root / "raw_captions_combined_filtered.pkl"
    file.write_bytes(pickle.dumps(captions))
    return file


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_queryd_joins_all_words(tmp_path: Path, protocol: int) -> None:
    write_queryd(tmp_path).write_bytes(pickle.dumps(WORDS, protocol))
    test = load_split("queryd", tmp_path, "test")
    assert [video.video_id for video in test.videos] == ["video-bb", "video-aa"]
    assert test.captions == (("no video",), ("A Man walks . He (slowly) sits !",))
    assert (test.max_words, test.videos[0].start, test.videos[0].end) == (128, None, None)


def test_queryd_names_may_have_an_extension(tmp_path: Path) -> None:
    write_queryd(tmp_path, {"video-aa.mp4": [["a"]]}, "video-aa.mp4\n")
    assert load_split("queryd", tmp_path, "test").videos[0].video_id == "video-aa"


class Calls:
    """A pickle of it runs a command."""

    def __init__(self, made: Path):
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.made),)


def test_a_pickle_that_names_a_function_is_refused_and_not_run(tmp_path: Path) -> None:
    made = tmp_path / "made"
    file = write_queryd(tmp_path, {"video-aa": Calls(made)})
    with pytest.raises(AnnotationError, match=rf"{file.name}: expected a pickle of texts.*asks for posix\.mkdir"):
        load_split("queryd", tmp_path, "test")
    assert not made.exists()
    pickle.loads(file.read_bytes())
    assert made.exists()  # what python's own would have done


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ([], r"\.pkl: expected \{name"),
        ({"video-aa": []}, "entry 'video-aa': expected a list of sentences"),
        ({"video-aa": [["a", 5]]}, "'a sentence' must be a list of texts"),
        ({"video-aa": "a dog"}, "entry 'video-aa': expected a list of sentences"),
        ({5.0: [["a"]]}, "entry 5.0: expected an id"),
        ({"a": [["a"]], "a.mp4": [["b"]]}, "a again"),
        (WORDS, "line 2: video-zz has no captions in"),
    ],
)
def test_what_queryd_must_hold(tmp_path: Path, captions: object, message: str) -> None:
    write_queryd(tmp_path, captions, "video-aa\nvideo-zz\n")
    with pytest.raises(AnnotationError, match=message):
        load_split("queryd", tmp_path, "test")


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_damaged_pickles_are_refused_or_read_whole(tmp_path: Path, protocol: int) -> None:
    file, rng = write_queryd(tmp_path), random.Random(protocol)
    whole, refused = pickle.dumps(WORDS, protocol), 0
    for _ in range(300):
        data, place = bytearray(whole), rng.randrange(len(whole))
        if rng.random() < 0.3:
            del data[place:]
        else:
            data[place] = rng.randrange(256)
        file.write_bytes(data)
        try:
            found = load_split("queryd", tmp_path, "test")
        except AnnotationError as error:
            refused += 1
            assert str(tmp_path) in str(error)
        else:
            assert len(found.videos) == 2 and all(text.strip() for (text,) in found.captions)
    assert 100 < refused < 300


def test_condensed_movies(tmp_path: Path) -> None:
    rows = [
        "videoid,split,caption",
        'v1,train,"He runs (fast), away!"',
        "v2,val,b",
        "v3,train,no file",
        "v1,train,Again",
    ]
    write(tmp_path / "train_val_challf0.csv", "\n".join(rows) + "\n")
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "v1.mkv").touch()
    train = load_split("condensed_movies", tmp_path, "train")
    assert [video.path.name for video in train.videos] == ["v1.mkv", "v3.mp4"]
    assert train.captions == (("He runs (fast), away!", "Again"), ("no file",))
    assert load_split("condensed_movies", tmp_path, "validation").captions == (("b",),)
    write(tmp_path / "test_challf0.csv", "split,videoid,caption\ntest,v9,c\n")
    test = load_split("condensed_movies", tmp_path, "test")
    assert test.captions == (("c",),) and "no scores" in test.note
    write(tmp_path / "test_challf0.csv", "split,videoid,caption\nval,v9,c\n")
    with pytest.raises(AnnotationError, match=r"csv, line 2: expected a split test; got 'val'"):
        load_split("condensed_movies", tmp_path, "test")


def test_condensed_movies_are_tested_on_what_has_scores(tmp_path: Path) -> None:
    rows = ["videoid,split,caption", *(f"t{i},train,caption {i}" for i in range(501)), "v,val,b"]
    write(tmp_path / "train_val_challf0.csv", "\n".join(rows) + "\n")
    train, val, test = Source("condensed_movies", tmp_path).all_captions()
    assert val is not None and (len(train.videos), len(val.videos), test.name) == (1, 500, "condensed_movies/val")


def test_didemo_lines_of_one_video_need_not_be_neighbours(tmp_path: Path) -> None:
    entries = [("a", "First. Second (one)!"), ("b", "B"), ("a", "Another of a")]
    write(tmp_path / "train.jsonl", "".join(json.dumps({"clip_name": n, "caption": c}) + "\n" for n, c in entries))
    train = load_split("didemo", tmp_path, "train")
    assert [video.video_id for video in train.videos] == ["a", "b"]
    assert train.captions == (("First. Second (one)!", "Another of a"), ("B",))
    assert {(video.start, video.end) for video in train.videos} == {(0.0, 31.0)}
    write(tmp_path / "didemo_train_label.tmass.csv", "video_path,text\n/x/c.avi,c\n")
    assert load_split("didemo", tmp_path, "train").captions == (("c",),)


def test_activitynet_lists(tmp_path: Path) -> None:
    write(tmp_path / "val.json", [{"video": "v_1.mp4", "caption": ["A man (tall) walks.", " He sits! "]}])
    write(tmp_path / "train.json", [{"video": "v_2.webm", "caption": ["x"]}, {"video": "v_2.webm", "caption": ["y"]}])
    val = load_split("activitynet", tmp_path, "val_1")
    assert (val.videos[0].video_id, val.captions) == ("v_1", (("A man (tall) walks. He sits!",),))
    assert (val.videos[0].start, val.videos[0].end) == (None, None)
    assert load_split("activitynet", tmp_path, "train").captions == (("x", "y"),)
    write(tmp_path / "train.json", [{"video": "v_2", "caption": "x"}])
    with pytest.raises(AnnotationError, match=r"train\.json, entry 0: 'caption' must be a list of texts"):
        load_split("activitynet", tmp_path, "train")


def test_activitynet_qa_takes_answers_in_any_order_and_both_kinds_of_files(tmp_path: Path) -> None:
    questions = [{"question": f"is it number {i}", "video_name": f"n{i}", "question_id": f"q{i}"} for i in range(2)]
    write(tmp_path / "test_q.json", questions)
    write(
        tmp_path / "test_a.json", [{"answer": a, "type": 3, "question_id": q} for a, q in (("no", "q1"), ("yes", "q0"))]
    )
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "v_n1.webm").touch()
    asked = load_questions("activitynet_qa", tmp_path, "test").questions
    assert [(q.answers, q.video.path.name) for q in asked] == [(("yes",), "v_n0.mp4"), (("no",), "v_n1.webm")]
