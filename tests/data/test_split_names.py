"""Which lines and files train, validate and test: no name is guessed, and what is trained on is said."""

import json
import logging
from dataclasses import replace

import pytest

from tempme_vl.data.dataset import SplitNames
from tempme_vl.data.datasets import CAPTIONED, Source, load_questions, load_split
from tempme_vl.data.files import AnnotationError
from tempme_vl.data.jsonl import read_caption_lines
from tempme_vl.data.splits import Video, known_split, resolve_split, trained_on
from tempme_vl.data.videoqa import read_questions

SEEN = "{} of these {} videos were trained on: no scores on unseen videos"


@pytest.fixture
def file(tmp_path):
    """Writes a line for each split, None for a line without one; a video and a question a line."""

    def write(*splits):
        entries = [
            {"file": f"{i}.mp4", "caption": f"video {i}", "question": f"q{i}", "answer": "a", "split": split}
            for i, split in enumerate(splits)
        ]
        path = tmp_path / "mine.jsonl"
        path.write_text("".join(json.dumps({k: v for k, v in e.items() if v is not None}) + "\n" for e in entries))
        return path

    return write


def source(path):
    return Source("jsonl", None, path.parent / "videos", path)


def names_of(split):
    """The numbers of the lines in a retrieval or question split, None for no split."""
    if split is None:
        return None
    return [int(video.path.stem) for video in split.videos]


def both(path, names=None):
    """What the retrieval and the question reader make of a file, which is the same."""
    videos = source(path).all_captions(names or SplitNames(), seed=0)
    questions = source(path).all_questions()
    assert [names_of(split) for split in videos] == [names_of(split) for split in questions]
    assert [split and (split.name, split.note) for split in videos] == [s and (s.name, s.note) for s in questions]
    return videos


@pytest.mark.parametrize(
    "given",
    [
        ("training", "validation", "testing"),
        ("Train", "valid", "TEST"),
        ("train", "dev", "test"),
        ("TRAINING", "validate", "Testing"),
    ],
)
def test_usual_synonyms_are_understood_and_said(file, caplog, given):
    path = file(given[0], given[0], given[1], given[2])
    train, val, test = both(path)
    assert [names_of(split) for split in (train, val, test)] == [[0, 1], [2], [3]]
    assert [split.name for split in (train, val, test)] == [f"mine/{name}" for name in given]
    assert not train.note and not val.note and not test.note
    for wanted, name in zip(("train", "val", "test"), given, strict=True):
        said = f"the split {wanted!r} is called {name!r} here"
        assert (said in caplog.text) == (wanted != name)
    # and the other way round
    explicit = source(file("train", "train", "val", "test")).all_captions(SplitNames(*given), seed=0)
    assert [names_of(split) for split in explicit] == [[0, 1], [2], [3]]
    assert names_of(source(path).captions("test")) == names_of(source(path).captions()) == [3]
    assert names_of(read_questions(path, "val")) == names_of(read_caption_lines(path, "", "val")) == [2]


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (SplitNames("trian"), "'trian'"),
        (SplitNames(test="tset"), "'tset'"),
        (SplitNames(val="vall"), "'vall'"),
        (SplitNames("trian", "vall", "tset"), "'trian', 'vall', 'tset'"),
        (SplitNames("test_1k"), "'test_1k'"),
    ],
)
@pytest.mark.parametrize("there", [("train", "train", "val", "test"), (None, None)])
def test_a_name_that_is_not_there_is_an_error_that_lists_those_that_are(file, names, missing, there):
    path = file(*there)
    found = "test, train, val" if there[0] else "none, no line has a split"
    with pytest.raises(AnnotationError, match=rf"mine\.jsonl: no lines with split {missing}; splits found: {found}"):
        source(path).all_captions(names, seed=0)
    for name in (names.train, names.val, names.test):
        if name not in (None, "train", "test"):
            for read in (
                source(path).captions,
                lambda name: read_questions(path, name),
                lambda n: read_caption_lines(path, "", n),
            ):
                with pytest.raises(AnnotationError, match=f"no lines with split {name!r}; splits found: "):
                    read(name)


def test_a_file_with_splits_but_none_to_train_on_is_an_error(file):
    for splits in (("val", "test"), (None, "val", None)):
        path = file(*splits)
        with pytest.raises(AnnotationError, match=r"no lines with split 'train'; splits found: (test, )?val"):
            source(path).all_captions(SplitNames(), 0)
        with pytest.raises(AnnotationError, match=r"no lines with split 'train'; splits found: (test, )?val"):
            source(path).all_questions()
    with pytest.raises(AnnotationError, match="no lines with split 'test'; splits found: train, val"):
        source(file("train", "val")).captions()


def test_several_names_for_one_split_are_not_chosen_from(file):
    path = file("train", "dev", "valid", "test")
    with pytest.raises(AnnotationError, match=r"mine\.jsonl: the split 'val' could be any of dev, valid; name one"):
        source(path).all_captions(SplitNames(), 0)
    train, val, _ = source(path).all_captions(SplitNames(val="dev"), 0)
    assert (names_of(train), names_of(val)) == ([0], [1])


def test_scores_on_training_videos_are_noted_and_said(file, caplog):
    train, val, test = both(file(None, None, None))
    assert (names_of(train), val, names_of(test)) == ([0, 1, 2], None, [0, 1, 2])
    assert (train.note, test.note) == ("", SEEN.format(3, 3))
    assert f"mine/all: {SEEN.format(3, 3)}" in caplog.text and caplog.records[-1].levelno == logging.WARNING
    # some are held out: they are not trained on, and the test still is, but for them
    train, val, test = source(file(None, None, None)).all_captions(SplitNames(holdout=1), 0)
    assert (len(train.videos), len(val.videos), val.note, test.note) == (2, 1, "", SEEN.format(2, 3))
    # a validation split, and nothing to test on
    train, val, test = both(file("val", "train", "train"))
    assert (names_of(train), names_of(val), names_of(test)) == ([1, 2], [0], [1, 2])
    assert (val.note, test.note) == ("", SEEN.format(2, 2))
    # evaluation alone cannot know
    alone = source(file(None, None)).captions()
    assert names_of(alone) == [0, 1] and "which has no splits: perhaps they were trained on" in alone.note
    assert source(file("train", "test")).captions().note == ""


def test_a_video_of_two_splits_is_noted(file):
    path = file("train", "train", "val", "test", "test")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[0].replace('"train"', '"test"'), lines[2].replace('"val"', '"train"')]))
    path.write_text(path.read_text().replace('"question": "q0"', '"question": "another", "id": "new"', 1))
    train, val, test = source(path).all_captions(SplitNames(), 0)
    assert (train.note, val.note, test.note) == ("", SEEN.format(1, 1), SEEN.format(1, 3))
    assert [split.note for split in source(path).all_questions()] == [train.note, val.note, test.note]


def test_parts_of_one_video_are_different_videos(tmp_path):
    whole = Video("a", tmp_path / "a.mp4")
    part, other = (replace(whole, start=start, end=start + 2.0) for start in (0.0, 2.0))
    assert trained_on([whole, part], [other]) == ""
    assert trained_on([whole, part], [other, part]) == SEEN.format(1, 2)


def test_the_full_test_of_msrvtt_overlaps_the_large_training_split(tmp_path):
    videos = [{"video_id": f"v{i}", "split": "test" if i > 1 else "train"} for i in range(4)]
    sentences = [{"video_id": f"v{i}", "caption": f"a {i}"} for i in range(4)]
    (tmp_path / "MSRVTT_data.json").write_text(json.dumps({"videos": videos, "sentences": sentences}))
    (tmp_path / "MSRVTT_train.9k.csv").write_text("video_id\nv0\nv1\nv2\n")
    (tmp_path / "MSRVTT_JSFUSION_test.csv").write_text("video_id,sentence\nv3,a 3\n")
    data = Source("msrvtt", tmp_path)
    assert data.all_captions(SplitNames("train_9k", test="test_full"), 0)[2].note == SEEN.format(1, 2)
    assert data.all_captions(SplitNames("train_9k", test="test_1k"), 0)[2].note == ""


def test_lines_without_a_split_are_left_out_and_said(file, caplog):
    assert names_of(read_caption_lines(file("train", None, "test", None), "", "train")) == [0]
    assert "mine.jsonl: 2 of 4 lines have no split and are left out" in caplog.text


@pytest.mark.parametrize("value", [["train"], "", " train", True, {}])
@pytest.mark.parametrize("split", [None, "train"])
def test_a_split_that_is_no_text_is_refused(file, value, split):
    with pytest.raises(AnnotationError, match=r"mine\.jsonl, line 2: expected an id"):
        read_caption_lines(file("train", value), "", split)


def test_every_data_set_knows_the_synonyms_and_lists_what_it_has(tmp_path, caplog):
    for dataset in ("msvd", "didemo", "lsmdc"):
        for wanted, name in (("validation", "val"), ("dev", "val"), ("testing", "test"), ("Training", "train")):
            with pytest.raises(ValueError, match="there is no such folder"):
                load_split(dataset, tmp_path / "none", wanted)
            assert f"{dataset}: the split {wanted!r} is called {name!r} here" in caplog.text
    with pytest.raises(ValueError, match=r"expected val_qa\.json"):
        load_questions("msvd_qa", tmp_path, "validation")
    for dataset in set(CAPTIONED) - {"jsonl", "pairs"}:
        with pytest.raises(ValueError, match=f"{dataset} has no split 'trian'; known: train"):
            load_split(dataset, tmp_path, "trian")
    with pytest.raises(ValueError, match="msvd_qa has no split 'tset'; known: train, val, test"):
        load_questions("msvd_qa", tmp_path, "tset")


def test_resolving():
    assert resolve_split("x", "dev", ["dev", "val"]) == "dev", "the name itself comes first"
    assert resolve_split("x", "1k", ["train"]) is resolve_split("x", "train", []) is None
    assert resolve_split("x", "Mine", ["mine", "other"]) == "mine"
    assert known_split("x", "testing", ("train", "test_1k", "test")) == "test"
    with pytest.raises(ValueError, match="msrvtt has no split 'test'; known: train_9k, test_1k"):
        known_split("msrvtt", "test", ("train_9k", "test_1k"))
