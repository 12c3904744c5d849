"""Answers to all questions of a split: every video encoded once, every question answered or left out for a reason."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation.predict_runs import (
    FRAMES,
    NUM_QUESTIONS,
    NUM_VIDEOS,
    TRAINED,
    ZERO_SHOT,
    create,
    predicted,
    predicted_by_rank,
    read,
    render_few,
)
from torch import Tensor, nn
from training.processes import run

from tempme_vl.data.questions import AskedQuestions
from tempme_vl.data.reader import VideoReader, broken_videos
from tempme_vl.data.transforms import Preprocess, VideoTransform
from tempme_vl.data.videoqa import QASplit, answer_vocabulary
from tempme_vl.evaluation.predict import predict
from tempme_vl.tasks.qa.zero_shot import ZeroShotQA

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_few(tmp_path_factory.mktemp("predict") / "motion")


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """The same with a test video of a moving thing that is cut off."""
    root = render_few(tmp_path / "motion")
    file = root / "videos" / "video22.mp4"
    file.write_bytes(file.read_bytes()[:200])
    return root


@pytest.fixture
def reader(tmp_path: Path) -> VideoReader:
    transform = VideoTransform(Preprocess(image_size=32))
    return VideoReader(FRAMES, transform, "uniform", timeout=None, broken_log=tmp_path / "broken.jsonl")


def model_of(kind: str, train: QASplit) -> Any:
    made: Any = create(kind, train)
    return (ZeroShotQA(made, answer_vocabulary(train)) if kind in ZERO_SHOT else made).eval()


def ask(model: Any, split: QASplit, reader: VideoReader, batch_size: int = 3, encode: Any = None) -> dict[str, str]:
    return predict(model, encode or model, split, reader, CPU, batch_size, workers=0)


def with_options(split: QASplit) -> QASplit:
    """Two to four options a question: the right answer and others of the split."""
    others = sorted({answer for question in split.questions for answer in question.answers})
    questions = []
    for number, question in enumerate(split.questions):
        wrong = [answer for answer in others if answer not in question.answers][number % 5 :]
        options = [*wrong[: 1 + number % 3], question.answers[0]]
        questions.append(replace(question, options=tuple(options[::-1] if number % 2 else options)))
    return replace(split, questions=tuple(questions))


@torch.no_grad()
def one_at_a_time(model: Any, split: QASplit, reader: VideoReader) -> dict[str, str]:
    """By calls of the model alone, a video and a question each."""
    answers = {}
    for question in split.questions:
        video, *_ = reader(question.video)
        asked = {"video": video, "frame_mask": torch.ones(FRAMES)}
        asked |= model.tokenize(question.question, None, question.options)
        (row,) = model({name: value[None] for name, value in asked.items()})["prediction"].tolist()
        answers[question.question_id] = question.options[row[0]] if question.options else model.text(row)
    return answers


@pytest.mark.parametrize("kind", [*(kind for kind in TRAINED if kind != "choice"), *ZERO_SHOT])
def test_answers_are_those_to_each_question_alone(kind: str, data: Path, reader: VideoReader) -> None:
    split = read(data)
    assert (len(split.questions), len({q.video for q in split.questions})) == (NUM_QUESTIONS, NUM_VIDEOS)
    model = model_of(kind, read(data, "train"))
    answers = ask(model, split, reader)
    assert answers == one_at_a_time(model, split, reader)
    assert list(answers) == [question.question_id for question in split.questions]
    turned = replace(split, questions=split.questions[::-1])
    assert ask(model, turned, reader, batch_size=64) == answers
    assert len(set(answers.values())) > 1 or kind == "umt_retrieval"  # whose random weights may prefer one answer


@pytest.mark.parametrize("kind", [*TRAINED, *ZERO_SHOT])
def test_options_are_chosen_by_what_they_say(kind: str, data: Path, reader: VideoReader) -> None:
    split = with_options(read(data))
    assert {len(question.options) for question in split.questions} == {2, 3, 4}
    model = model_of(kind, with_options(read(data, "train")))
    answers = ask(model, split, reader)
    assert answers == one_at_a_time(model, split, reader)
    assert all(answers[question.question_id] in question.options for question in split.questions)
    shuffled = [replace(question, options=question.options[::-1]) for question in split.questions]
    assert ask(model, replace(split, questions=tuple(shuffled)), reader) == answers


@pytest.mark.parametrize("kind", ["decoder", *ZERO_SHOT])
def test_loader_workers_get_no_weights(
    kind: str, data: Path, reader: VideoReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that is spawned gets its data set by pickle."""
    model, held = model_of(kind, read(data, "train")), list[bytes]()

    class Seen(AskedQuestions):
        def __init__(self, split: QASplit, kept: Any, rows: Sequence[int], tokenize: Any):
            held.append(pickle.dumps(tokenize))
            super().__init__(split, kept, rows, pickle.loads(held[0]))

    whole = ask(model, read(data), reader)
    monkeypatch.setattr("tempme_vl.evaluation.predict.AskedQuestions", Seen)
    assert ask(model, read(data), reader) == whole
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    assert len(held[0]) < weights / 4


class Written(nn.Module):
    """Keeps a video's mean, counts what it is shown, and says what it is told for each question."""

    kept = ("mean",)

    def __init__(self, said: Mapping[str, str]):
        super().__init__()
        self.numbers = {question: number for number, question in enumerate(said)}
        self.texts = list(said.values())
        self.videos: list[Tensor] = []
        self.asked: list[int] = []

    def tokenizer(self) -> Callable[..., dict[str, Tensor]]:
        def tokenize(question: str, answer: str | None = None, options: Sequence[str] = ()) -> dict[str, Tensor]:
            assert answer is None
            return {"question_ids": torch.tensor([self.numbers[question]])}

        return tokenize

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert "valid" not in batch
        if "video" in batch:
            self.videos += list(batch["video"])
            return {"mean": batch["video"].mean(dim=(1, 2, 3, 4))}
        assert batch.keys() == {"mean", "question_ids"}
        self.asked += batch["question_ids"].flatten().tolist()
        return {"prediction": batch["question_ids"]}

    def text(self, prediction: list[int]) -> str:
        return self.texts[prediction[0]]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_every_video_is_read_and_encoded_once(data: Path, reader: VideoReader, batch_size: int) -> None:
    split = read(data)
    model = Written({question.question: "so" for question in split.questions})
    reads: Counter[str] = Counter()

    class Counting(VideoReader):
        def __call__(self, video: Any, rng: Any = None) -> tuple[Tensor, bool]:
            reads[video.video_id] += 1
            return super().__call__(video, rng)

    counting = Counting(FRAMES, reader.transform, reader.sampling, timeout=None, broken_log=reader.broken_log)
    answers = ask(model, split, counting, batch_size)
    assert reads == Counter({question.video.video_id for question in split.questions})
    assert len(model.videos) == NUM_VIDEOS
    assert Counter(model.asked) == Counter(model.numbers[question.question] for question in split.questions)
    assert answers == {question.question_id: "so" for question in split.questions}


def test_parts_of_a_file_are_videos_of_their_own(data: Path, reader: VideoReader) -> None:
    split = read(data)
    first, *others = split.questions
    part = replace(first, question_id="part", video=replace(first.video, start=0.5, end=1.0))
    model = Written({question.question: "so" for question in split.questions})
    ask(model, replace(split, questions=(first, part, *others)), reader)
    assert len(model.videos) == NUM_VIDEOS + 1


def test_what_a_model_does_not_say_is_missing(data: Path, reader: VideoReader) -> None:
    split = read(data)
    said = {question.question: "so" for question in split.questions}
    silent = [split.questions[0].question, split.questions[1].question]
    said |= {silent[0]: "", silent[1]: " \n"}
    answers = ask(Written(said), split, reader)
    expected = [q.question_id for q in split.questions if q.question not in silent]
    assert list(answers) == expected and 0 < len(expected) < NUM_QUESTIONS


def test_questions_about_unreadable_videos_have_no_answer(data: Path, broken: Path, reader: VideoReader) -> None:
    model = model_of("classifier", read(data, "train"))
    whole, answers = ask(model, read(data), reader), ask(model, read(broken), reader)
    about = [question.question_id for question in read(broken).questions if question.video.video_id == "video22"]
    assert len(about) == 3 and reader.broken_log is not None
    assert answers == {question_id: answer for question_id, answer in whole.items() if question_id not in about}
    assert list(broken_videos(reader.broken_log)) == ["video22"]


def test_the_engine_may_be_another_callable_than_the_model(data: Path, reader: VideoReader) -> None:
    """As in training, where DeepSpeed's engine must be called and the model knows the words."""
    model, calls = model_of("decoder", read(data, "train")), list[int]()

    def engine(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        calls.append(len(batch))
        return model(batch)

    assert ask(model, read(data), reader, encode=engine) == ask(model, read(data), reader)
    assert len(calls) == -(-NUM_VIDEOS // 3) + -(-NUM_QUESTIONS // 3)


@pytest.mark.parametrize("kind", ["writer", "umt_retrieval"])
def test_two_ranks_answer_as_one_does(kind: str, broken: Path, tmp_path: Path) -> None:
    """Neither the 7 videos nor batches of 3 divide among two ranks."""
    train = read(broken, "train")
    create(kind, train).save_pretrained(tmp_path / "model")
    answers = answer_vocabulary(train) if kind in ZERO_SHOT else ()
    arguments = (tmp_path / "model", broken, answers)
    alone = predicted(*arguments, 64, tmp_path / "one.jsonl")
    assert len(alone) == NUM_QUESTIONS - 3
    for rank in run(predicted_by_rank, *arguments, 3, tmp_path / "two.jsonl", world=2):
        assert rank == alone and list(rank) == list(alone)
    assert broken_videos(tmp_path / "two.jsonl").keys() == {"video22"}
