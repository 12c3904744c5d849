"""Questions as torch datasets: to train on, and to ask about videos that are encoded already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from video_files import different, write_video

from tempme_vl.data.questions import AskedQuestions, TrainQuestions, most_options
from tempme_vl.data.reader import VideoReader, broken_videos
from tempme_vl.data.splits import Video
from tempme_vl.data.transforms import Preprocess, VideoTransform
from tempme_vl.data.videoqa import QASplit, Question
from tempme_vl.training.sampler import StepSampler

LETTERS = 16


def as_ids(text: str) -> Tensor:
    return torch.tensor(list(text.encode().ljust(LETTERS)))


def as_text(ids: Tensor) -> str:
    return bytes(ids.tolist()).decode().rstrip()


def tokenize(question: str, answer: str | None, options: Sequence[str]) -> dict[str, Tensor]:
    """As heads do; `as_text` reads it back."""
    asked = {"question_ids": as_ids(question)}
    if answer is not None:
        asked["answer_ids"] = as_ids(answer)
    if options:
        asked["option_ids"] = torch.stack([as_ids(option) for option in options])
        asked["option_class"] = torch.arange(len(options))
    return asked


@pytest.fixture
def videos(tmp_path: Path) -> list[Video]:
    """Two videos, and one that is no video."""
    paths = [write_video(tmp_path / f"{name}.mp4", num_frames=n) for name, n in (("a", 20), ("b", 30))]
    (tmp_path / "c.mp4").write_bytes(b"no video")
    return [Video(path.stem, path) for path in (*paths, tmp_path / "c.mp4")]


@pytest.fixture
def split(videos: list[Video]) -> QASplit:
    a, b, c = videos
    return QASplit(
        "toy/train",
        (
            Question("7", a, "what runs", ("dog",)),
            Question("3", b, "who", ("man", "boy", "a person")),
            Question("5", a, "how many", ("two",)),
            Question("9", c, "what is broken", ("this",)),
            Question("4", b, "where", ("here",)),
        ),
    )


@pytest.fixture
def choices(videos: list[Video]) -> QASplit:
    """Two, four and three options; of three right answers to the second question two are options."""
    a, b, _ = videos
    return QASplit(
        "toy/choices",
        (
            Question("1", a, "what", ("dog",), ("cat", "dog")),
            Question("2", b, "who", ("boy", "man", "child"), ("girl", "man", "woman", "boy")),
            Question("3", a, "where", ("here",), ("here", "there", "nowhere")),
        ),
    )


@pytest.fixture
def reader(tmp_path: Path) -> VideoReader:
    transform = VideoTransform(Preprocess(image_size=16), "randaugment")
    return VideoReader(4, transform, timeout=None, broken_log=tmp_path / "broken.jsonl", cache="memory")


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(value, right[key]) if isinstance(value, Tensor) else value == right[key]
        for key, value in left.items()
    )


# ---- to train on


def test_every_question_is_a_sample_with_its_video(split: QASplit, reader: VideoReader) -> None:
    plain = replace(reader, transform=VideoTransform(Preprocess(image_size=16)))
    questions = TrainQuestions(split, plain, tokenize)
    items = [questions[0, index] for index in range(len(questions))]
    assert [item["name"] for item in items] == ["7 (a)", "3 (b)", "5 (a)", "9 (c)", "4 (b)"]
    assert [as_text(item["question_ids"]) for item in items] == [q.question for q in split.questions]
    for item, question in zip(items, split.questions, strict=True):
        assert as_text(item["answer_ids"]) in question.answers
        assert (item["video"].shape, item["frame_mask"].tolist()) == ((4, 3, 16, 16), [1] * 4)
        assert torch.equal(item["times"], plain(question.video).times) and item["times"].diff().gt(0).all()
        assert "option_valid" not in item
    assert torch.equal(items[0]["video"], items[2]["video"]) and not torch.equal(items[0]["video"], items[1]["video"])


def test_a_broken_video_is_a_sample_that_is_not_valid(split: QASplit, reader: VideoReader) -> None:
    questions = TrainQuestions(split, reader, tokenize)
    items = [questions[0, index] for index in range(len(questions))]
    assert [item["valid"] for item in items] == [1, 1, 1, 0, 1]
    assert not items[3]["video"].any() and as_text(items[3]["answer_ids"]) == "this"
    assert reader.broken_log is not None and list(broken_videos(reader.broken_log)) == ["c"]
    (batch,) = DataLoader(questions, batch_size=5, sampler=[(0, index) for index in range(5)])
    assert batch["valid"].tolist() == [1, 1, 1, 0, 1]


def test_a_sample_depends_on_seed_epoch_and_index_alone(split: QASplit, reader: VideoReader) -> None:
    first, second = TrainQuestions(split, reader, tokenize, 3), TrainQuestions(split, replace(reader), tokenize, 3)
    _ = [second[1, index] for index in range(3)]  # what was read before, and what is cached, does not matter
    for epoch in range(6):
        assert same(first[epoch, 1], second[epoch, 1])
        assert same(first[epoch, 1], first[epoch, 1])
    other_seed = TrainQuestions(split, reader, tokenize, 4)
    assert different([first[epoch, 1]["video"] for epoch in range(4)]) == 4
    assert different([part[0, 1]["video"] for part in (first, other_seed)]) == 2
    assert different([first[0, index]["video"] for index in (0, 2)]) == 2, "two questions about one video"
    by_seed = [[as_text(part[epoch, 1]["answer_ids"]) for epoch in range(20)] for part in (first, other_seed)]
    assert by_seed[0] != by_seed[1]


def test_neighbouring_seeds_share_no_epoch(tmp_path: Path) -> None:
    """Nor does anything else that sums up alike: every seed, epoch and question has draws of its own."""
    long = Video("long", write_video(tmp_path / "long.mp4", num_frames=120))
    split = QASplit("toy/train", tuple(Question(str(i), long, "what", ("a", "b")) for i in range(2)))
    reader = VideoReader(6, VideoTransform(Preprocess(image_size=16)), "segment", timeout=None, on_broken="raise")
    parts = [TrainQuestions(split, reader, tokenize, seed) for seed in range(2)]
    videos = [part[epoch, index]["video"] for part in parts for epoch in range(2) for index in range(2)]
    assert different(videos) == 8


def test_each_right_answer_is_drawn_equally_often(split: QASplit, choices: QASplit, reader: VideoReader) -> None:
    for asked, expected in ((split, {"man", "boy", "a person"}), (choices, {"boy", "man"})):
        questions = TrainQuestions(asked, reader, tokenize)
        drawn = Counter(as_text(questions[epoch, 1]["answer_ids"]) for epoch in range(120))
        assert set(drawn) == expected, "an answer that is no option cannot be chosen"
        assert min(drawn.values()) > 0.6 * 120 / len(expected)


def test_loader_processes_give_the_same_batches(choices: QASplit, reader: VideoReader) -> None:
    def batches(workers: int) -> list[dict[str, Any]]:
        sampler = StepSampler(3, 3, 2, seed=0)
        return list(DataLoader(TrainQuestions(choices, reader, tokenize), batch_sampler=sampler, num_workers=workers))

    alone, parallel = batches(0), batches(2)
    assert len(alone) == 2 and alone[0]["option_ids"].shape == (3, 4, LETTERS)
    assert all(same(left, right) for left, right in zip(alone, parallel, strict=True))


# ---- options


def rows_of(dataset: str, asked: QASplit, reader: VideoReader) -> list[dict[str, Any]]:
    if dataset == "training":
        questions = TrainQuestions(asked, reader, tokenize)
        return [questions[0, index] for index in range(len(questions))]
    about = AskedQuestions(asked, {"tokens": torch.zeros(3, 2)}, [0] * len(asked.questions), tokenize)
    return [about[index] for index in range(len(about))]


@pytest.mark.parametrize("dataset", ["training", "asking"])
def test_options_are_filled_up_to_the_longest_list(dataset: str, choices: QASplit, reader: VideoReader) -> None:
    """By real words, which attention needs, and marked, so that nobody chooses them."""
    assert most_options(choices) == 4
    for item, question in zip(rows_of(dataset, choices, reader), choices.questions, strict=True):
        texts, count = [as_text(row) for row in item["option_ids"]], len(question.options)
        assert texts == [*question.options, *[question.options[-1]] * (4 - count)]
        assert item["option_class"].tolist() == [*range(count), *[count - 1] * (4 - count)]
        assert item["option_valid"].tolist() == [1] * count + [0] * (4 - count)
        assert item["option_valid"].dtype == torch.int64
        assert as_text(item["question_ids"]) == question.question


@pytest.mark.parametrize("dataset", ["training", "asking"])
def test_questions_with_and_without_options_do_not_mix(dataset: str, choices: QASplit, reader: VideoReader) -> None:
    plain = replace(choices.questions[1], options=())
    mixed = replace(choices, questions=(choices.questions[0], plain, choices.questions[2]))
    with pytest.raises(ValueError, match="toy/choices: 1 questions have no options, others do: 2"):
        rows_of(dataset, mixed, reader)


def test_without_options_there_are_none(split: QASplit, reader: VideoReader) -> None:
    assert most_options(split) == 0
    assert all("option_valid" not in item for item in rows_of("asking", split, reader))


# ---- to ask


def test_questions_are_asked_in_order_about_what_was_kept_of_their_videos(split: QASplit) -> None:
    kept = {"tokens": torch.randn(3, 5, 2), "size": torch.rand(3, 5, 1)}
    rows = [2, 0, 2, 1, 0]
    asked = AskedQuestions(split, kept, rows, tokenize)
    assert len(asked) == 5
    for index, (row, question) in enumerate(zip(rows, split.questions, strict=True)):
        item = asked[index]
        assert item.keys() == {"tokens", "size", "question_ids"}, "no answer is shown"
        assert all(torch.equal(item[name], kept[name][row]) for name in kept)
        assert as_text(item["question_ids"]) == question.question
