"""From a video file and a question to an answer, for every kind of model that answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation.predict_runs import FRAMES, TRAINED, ZERO_SHOT, create, read, render_few
from open_clip import image_transform
from PIL import Image
from towers import tempme_schedule, tiny_frontend

from tempme_vl import VideoQA, VideoRetrieval, read_video
from tempme_vl.data.splits import Video
from tempme_vl.data.video import VideoError
from tempme_vl.data.videoqa import answer_vocabulary
from tempme_vl.tasks.qa import VideoQAModel
from tempme_vl.tasks.qa.zero_shot import ZeroShotQA

QUESTION = "which way does the object move"
OPTIONS = ("left", "right", "up")
WITH_ANSWERS = ("classifier", "decoder", *ZERO_SHOT)
KINDS = pytest.mark.parametrize("kind", [*TRAINED, *ZERO_SHOT])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_few(tmp_path_factory.mktemp("pipeline") / "motion")


@pytest.fixture(scope="module")
def folders(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved model of each kind, with random weights."""
    made = {}
    for kind in (*TRAINED, *ZERO_SHOT):
        made[kind] = tmp_path_factory.mktemp("models") / kind
        create(kind, read(data, "train")).save_pretrained(made[kind])
    return made


def answers_of(kind: str, data: Path) -> tuple[str, ...]:
    return answer_vocabulary(read(data, "train")) if kind in ZERO_SHOT else ()


def load(kind: str, folders: dict[str, Path], data: Path) -> VideoQA:
    return VideoQA.from_pretrained(folders[kind], answers_of(kind, data), timeout=None)


@KINDS
def test_a_question_about_a_file_is_answered(kind: str, folders: dict[str, Path], data: Path) -> None:
    qa, video = load(kind, folders, data), data / "videos" / "video21.mp4"
    assert isinstance(qa.model, ZeroShotQA if kind in ZERO_SHOT else VideoQAModel) and not qa.model.training
    assert qa.answers == (answer_vocabulary(read(data, "train")) if kind in WITH_ANSWERS else ())
    chosen = qa.answer(video, QUESTION, OPTIONS)
    assert chosen in OPTIONS and chosen == qa.answer(str(video), QUESTION, list(OPTIONS[::-1]))
    if kind == "choice":
        return
    answer = qa.answer(video, QUESTION)
    assert isinstance(answer, str) and (not qa.answers or answer in qa.answers)
    # by the model itself, on frames read with the rule that it was trained with
    frames, valid, _ = qa.reader(Video("v", video))
    assert valid and frames.shape == (FRAMES, 3, 32, 32) and qa.reader.sampling == qa.model.input.sampling
    asked = {"video": frames, "frame_mask": torch.ones(FRAMES), **qa.model.tokenize(QUESTION)}
    with torch.no_grad():
        (row,) = qa.model({name: value[None] for name, value in asked.items()})["prediction"].tolist()
    assert qa.model.text(row) == answer


@pytest.mark.parametrize("kind", ["classifier", "retrieval"])
def test_a_part_of_a_file_is_a_video_of_its_own(kind: str, folders: dict[str, Path], data: Path) -> None:
    qa, video = load(kind, folders, data), data / "videos" / "video29.mp4"  # one thing, then another
    seen: list[torch.Tensor] = []
    qa.model.frontend.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for part in ({}, {"end": 1.0}, {"start": 1.0}):
        assert qa.answer(video, "which color appears first", **part) in qa.answers
    whole, first, second = seen
    assert whole.shape == first.shape == second.shape == (1, FRAMES, 3, 32, 32)
    assert not torch.equal(whole, first) and not torch.equal(first, second)
    assert (first - first[:, :1]).abs().max() < (whole - whole[:, :1]).abs().max() / 4, "one picture"


@KINDS
def test_a_file_that_cannot_be_read_is_an_error(
    kind: str, folders: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    qa = load(kind, folders, data)
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    for name in ("broken.mp4", "none.mp4"):
        with pytest.raises(VideoError, match=name):
            qa.answer(tmp_path / name, QUESTION, OPTIONS)


def test_what_a_model_cannot_answer_is_an_error(folders: dict[str, Path], data: Path) -> None:
    video = data / "videos" / "video21.mp4"
    with pytest.raises(ValueError, match="this head chooses among options, but the question has none"):
        VideoQA.from_pretrained(folders["choice"]).answer(video, QUESTION)
    with pytest.raises(ValueError, match=r"none of the options \['a', 'b'\] is among the"):
        VideoQA.from_pretrained(folders["classifier"], timeout=None).answer(video, QUESTION, ("a", "b"))
    for kind in ZERO_SHOT:
        qa = VideoQA.from_pretrained(folders[kind], timeout=None)
        assert qa.answers == () and qa.answer(video, QUESTION, OPTIONS) in OPTIONS
        with pytest.raises(ValueError, match="expected options, or a model with a list of answers"):
            qa.answer(video, QUESTION)


def test_folders_that_do_not_fit(folders: dict[str, Path], tmp_path: Path) -> None:
    for kind in TRAINED:
        with pytest.raises(ValueError, match=rf"the model in .*{kind} has its own answers; only a retrieval model"):
            VideoQA.from_pretrained(folders[kind], ("left", "right"))
    with pytest.raises(
        ValueError, match=r"expected a folder with config.json, or a model .*empty': there is no such folder"
    ):
        VideoQA.from_pretrained(tmp_path / "empty")
    tiny_frontend(tempme_schedule()).save_pretrained(tmp_path / "frontend")
    with pytest.raises(ValueError, match=r"expected a question answering model in .*frontend; got one of kind"):
        VideoQA.from_pretrained(tmp_path / "frontend")


@pytest.mark.parametrize("kind", ZERO_SHOT)
def test_texts_are_compared_with_videos(kind: str, folders: dict[str, Path], data: Path) -> None:
    retrieval = VideoRetrieval.from_pretrained(folders[kind], timeout=None)
    texts = ["a red circle moves left", "a square", "a blue triangle moves up then " * 20]
    files = [data / "videos" / f"video{number}.mp4" for number in (20, 21, 29)]
    text, video = retrieval.encode_text(texts, batch_size=2), retrieval.encode_video([*map(str, files)], batch_size=2)
    assert text.shape == video.shape == (3, retrieval.model.frontend.shape.embed_dim)
    torch.testing.assert_close(text.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(retrieval.similarity(texts, files), text @ video.T, rtol=0, atol=1e-6)
    # one by one, in another order, and a part of a file
    torch.testing.assert_close(retrieval.encode_text(texts[1:2]), text[1:2], rtol=0, atol=1e-5)
    torch.testing.assert_close(retrieval.encode_video(files[::-1], 1), video.flip(0), rtol=0, atol=1e-5)
    whole, part = retrieval.encode_video([Video("a", files[2]), Video("a", files[2], end=1.0)])
    assert not torch.allclose(whole, part, atol=1e-4)
    assert retrieval.similarity([], files).shape == (0, 3)
    batch = {"video": retrieval.reader(Video("a", files[0])).video[None], "frame_mask": torch.ones(1, FRAMES)}
    with torch.no_grad():
        torch.testing.assert_close(retrieval.model(batch)["video"], video[:1], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"expected a list of texts; got the text 'a red.*give \[text\]"):
        retrieval.encode_text(texts[0])
    with pytest.raises(ValueError, match=r"expected a list of videos; .*give \[video\]"):
        retrieval.encode_video(files[0])
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        retrieval.encode_text(texts, batch_size=0)
    with pytest.raises(VideoError, match=r"nowhere\.mp4"):
        retrieval.encode_video([files[0], "nowhere.mp4"])


def test_other_models_have_no_embeddings(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="expected a retrieval model in"):
        VideoRetrieval.from_pretrained(folders["classifier"])


@pytest.mark.parametrize("given", ["file", "frames", "few frames"])
def test_a_front_end_takes_a_file_or_its_frames(given: str, data: Path) -> None:
    frontend, path = tiny_frontend(tempme_schedule()), data / "videos" / "video21.mp4"
    read = read_video(path, {"file": 6, "frames": 11, "few frames": 3}[given], sampling="uniform", timeout=None)
    assert read.pixels.dtype == np.uint8 and len(read.times) == len(read.pixels)
    chosen = {"file": slice(None), "frames": [0, 2, 4, 6, 8, 10], "few frames": [0, 0, 0, 1, 1, 2]}[given]
    video = frontend.preprocess(path, "uniform") if given == "file" else frontend.preprocess(read.pixels)
    side = frontend.shape.image_size
    expected = image_transform(side, is_train=False)
    frames = torch.stack([expected(Image.fromarray(frame)) for frame in read.pixels[chosen]])
    assert video.shape == (6, 3, side, side) and torch.equal(video, frames)
    assert frontend(torch.stack([video, video])).pooled.isfinite().all()


def test_what_a_front_end_cannot_preprocess_is_named() -> None:
    frontend = tiny_frontend(tempme_schedule())
    for wrong in (np.zeros((0, 8, 8, 3), np.uint8), np.zeros((6, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"expected frames \(F, H, W, 3\) uint8"):
            frontend.preprocess(wrong)
    frontend.config = None
    with pytest.raises(ValueError, match="give VisualFrontend the tower's `config`"):
        frontend.preprocess(np.zeros((6, 8, 8, 3), np.uint8))


def test_what_is_made_of_models_shows_itself_in_a_line(folders: dict[str, Path], data: Path) -> None:
    shown = repr(load("classifier", folders, data))
    assert "VideoQAModel" in shown and "tokens" in shown and "\n" not in shown and len(shown) < 200
    output = tiny_frontend(tempme_schedule())(torch.zeros(1, 6, 3, 32, 32))
    shown = repr(output)
    assert "tokens=(1, " in shown and "float32 on cpu" in shown and "source" not in shown and len(shown) < 250


# ---- many questions


@KINDS
def test_many_questions_are_answered_as_each_alone_with_scores(kind: str, folders: dict[str, Path], data: Path) -> None:
    """Three videos, of which one is asked about three times; some with options, others without."""
    qa = load(kind, folders, data)
    files = [data / "videos" / f"video{number}.mp4" for number in (20, 21, 20, 29, 20)]
    texts = ["which way does the object move", "which color appears first", "what shape", "which way", "what"]
    options = [OPTIONS, ("red", "blue"), OPTIONS[:2], OPTIONS[1:], ("up", "left", "right", "down")]
    if kind != "choice":
        options[1:3] = [(), ()]
    encoded: list[int] = []
    qa.model.frontend.register_forward_pre_hook(lambda _, given: encoded.append(len(given[0])))
    found = qa.best_answers(files, texts, options, top_k=3, batch_size=2)
    assert encoded == [2, 1], "each video once"
    for file, text, given, best in zip(files, texts, options, found, strict=True):
        assert best[0].text == qa.answer(file, text, given)
        (alone,) = qa.best_answers([file], [text], [given], top_k=100)
        assert [answer.text for answer in alone[:3]] == [answer.text for answer in best]
        assert [answer.score for answer in alone[:3]] == pytest.approx([answer.score for answer in best], abs=1e-4)
        scores = [answer.score for answer in alone]
        assert scores == sorted(scores, reverse=True) and all(0 < score <= 1 for score in scores)
        if given or not qa.model.writes:
            assert sum(scores) == pytest.approx(1, abs=1e-4)
        known = given or qa.answers
        if known:  # of these, those the model knows
            assert {answer.text for answer in alone} <= set(known)
            assert len(alone) == len({*known} & {*(qa.answers if kind == "classifier" else known)})


def test_questions_that_are_not_asked_in_lists_or_pairs(folders: dict[str, Path], data: Path) -> None:
    qa, video = VideoQA.from_pretrained(folders["decoder"], timeout=None), data / "videos" / "video21.mp4"
    assert qa.best_answers([], []) == []
    for given, message in (
        ((video, [QUESTION]), r"a list of videos and a list of questions: give \[video\], \[question\]"),
        (([video], QUESTION), "a list of questions"),
        (([video], [QUESTION, QUESTION]), "got 1 videos, 2 questions and 2 times options"),
        (([video], [QUESTION], []), "got 1 videos, 1 questions and 0 times options"),
        (([video], [QUESTION], None, 0), "top_k must be at least 1; got 0"),
        (([video], [QUESTION], None, 1, 0), "batch_size must be at least 1; got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            qa.best_answers(*given)
    with pytest.raises(ValueError, match="this head chooses among options, but the question has none"):
        VideoQA.from_pretrained(folders["choice"]).best_answers(["no such file"], [QUESTION])
