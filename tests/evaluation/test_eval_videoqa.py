"""eval/videoqa.py --checkpoint on a tiny random model of each kind and a few rendered videos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evaluation.predict_runs import FRAMES, NUM_QUESTIONS, create, predicted, read, render_few, score
from training.processes import exit_codes, start

from tempme_vl.data import motion
from tempme_vl.data.videoqa import answer_vocabulary
from tempme_vl.evaluation import videoqa_command as command
from tempme_vl.evaluation.options import VideoQAOptions
from tempme_vl.evaluation.videoqa import accuracy, format_accuracy, read_predictions


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a test video that is cut off."""
    root = render_few(tmp_path_factory.mktemp("videoqa") / "motion")
    file = root / "videos" / "video22.mp4"
    file.write_bytes(file.read_bytes()[:200])
    return root


def model_folder(kind: str, data: Path, folder: Path) -> Path:
    create(kind, read(data, "train")).save_pretrained(folder)
    return folder


def options_of(**options: Any) -> list[str]:
    return [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def report_of(log: Path, file: Path, world: int = 1, **options: Any) -> dict[str, Any]:
    """What the command writes with --json; what it prints is in `log`."""
    arguments = options_of(json=file, workers=0, **options)
    assert exit_codes(start(score, arguments, log=log, world=world)) == [0] * world, log.read_text()
    return json.loads(file.read_text())


@pytest.mark.parametrize("kind", ["classifier", "decoder", "writer", "retrieval", "umt_retrieval"])
def test_a_model_of_each_kind_is_scored(kind: str, data: Path, tmp_path: Path) -> None:
    folder, log = model_folder(kind, data, tmp_path / "model"), tmp_path / "log"
    split, known = read(data), answer_vocabulary(read(data, "train"))
    options = {"checkpoint": folder, "dataset": "msrvtt_qa", "data_root": data, "decode_timeout": "None"}
    answers: tuple[str, ...] = ()
    if "retrieval" in kind:  # tries a list of answers, which the command is given
        answers = known[:5]
        (tmp_path / "answers.json").write_text(json.dumps(known))
        options |= {"vocabulary": tmp_path / "answers.json", "vocabulary_size": 5}
    report = report_of(
        log, tmp_path / "out" / "report.json", save_predictions=tmp_path / "saved" / "predictions.json", **options
    )
    saved = read_predictions(tmp_path / "saved" / "predictions.json")
    assert saved == predicted(folder, data, answers, 64, tmp_path / "broken.jsonl")
    assert len(saved) == NUM_QUESTIONS - 3
    listed = {"writer": None, "classifier": known, "decoder": known}.get(kind, answers)
    expected = accuracy(saved, split, listed)
    assert {key: report[key] for key in expected} == expected
    assert (report["split"], report["missing"], report["num_frames"]) == ("msrvtt_qa/test", 3, FRAMES)
    assert report["sampling"] == {"retrieval": "fps1", "umt_retrieval": "segment"}.get(kind, "uniform")
    assert (report["checkpoint"], report["ranks"]) == (str(folder), 1)
    assert list(report["broken_videos"]) == ["video22"]
    shown = log.read_text()
    assert format_accuracy(report) in shown and "could not read video22: " in shown


def test_two_ranks_report_what_one_does(data: Path, tmp_path: Path) -> None:
    folder = model_folder("decoder", data, tmp_path / "model")
    options = {"checkpoint": folder, "dataset": "msrvtt_qa", "data_root": data, "decode_timeout": "None"}
    one = report_of(tmp_path / "1", tmp_path / "1.json", save_predictions=tmp_path / "p1.json", **options)
    two = report_of(
        tmp_path / "2", tmp_path / "2.json", 2, save_predictions=tmp_path / "p2.json", batch_size=3, **options
    )
    assert (one.pop("ranks"), two.pop("ranks")) == (1, 2)
    assert one.pop("date") <= two.pop("date") and one == two
    assert (tmp_path / "p1.json").read_bytes() == (tmp_path / "p2.json").read_bytes()
    assert (tmp_path / "2").read_text().count("without a prediction") == 1, "one rank prints"


def test_a_choice_among_options_of_ones_own(data: Path, tmp_path: Path) -> None:
    """Questions of a file, a part of whose lines is asked; answers are compared as one likes; frames are kept."""
    folder, file = model_folder("choice", data, tmp_path / "model"), tmp_path / "mine.jsonl"
    about = {"file": "video21.mp4", "question": "which way does it move", "options": ["Left!", "up"]}
    lines = [{**about, "answers": ["Left!", "up"], "id": f"q{i}", "split": "val" if i % 2 else "x"} for i in range(5)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"checkpoint": folder, "annotations": file, "video_root": data / "videos", "split": "val"}
    report = report_of(tmp_path / "log", tmp_path / "r.json", frame_cache=tmp_path / "frames", **options)
    assert (report["split"], report["total"], report["correct"]) == ("mine/val", 2, 2)
    assert report["broken_videos"] == {} and report["vocabulary_size"] is None
    assert len(list((tmp_path / "frames").glob("*.npy"))) == 1


def test_motion_is_rendered_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(motion, "render_motion", render_few)
    monkeypatch.chdir(tmp_path)
    split = command.split_of(VideoQAOptions(checkpoint=tmp_path, dataset="motion"))
    assert (split.name, len(split.questions)) == ("motion/test", NUM_QUESTIONS)
    assert (tmp_path / "runs" / "motion-data" / "motion.json").is_file()
    val = command.split_of(VideoQAOptions(checkpoint=tmp_path, dataset="motion", split="val"))
    assert val.name == "motion/val"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("checkpoint", "--checkpoint needs either --dataset or --annotations, a .jsonl file"),
        ("checkpoint dataset annotations", "--checkpoint needs either --dataset or --annotations, a .jsonl file"),
        ("checkpoint dataset", "--dataset msrvtt_qa needs --data-root, the folder of its annotation files"),
        ("checkpoint annotations", r"expected a .jsonl file and --video-root; got a.jsonl \(else use --dataset"),
        ("checkpoint other video_root", r"expected a .jsonl file and --video-root; got a.json \(else use --dataset"),
        ("predictions", "--predictions needs --annotations, the questions with their answers"),
        ("predictions checkpoint", "expected either --predictions, a file, or --checkpoint, the folder of a model"),
        ("annotations", "expected either --predictions, a file, or --checkpoint, the folder of a model"),
    ],
)
def test_options_that_miss_each_other(given: str, message: str) -> None:
    places = {name: Path("a") for name in ("checkpoint", "predictions", "video_root")}
    values = {**places, "annotations": Path("a.jsonl"), "other": Path("a.json"), "dataset": "msrvtt_qa"}
    options = {name.replace("other", "annotations"): values[name] for name in given.split()}
    with pytest.raises(ValueError, match=message):
        command.main(VideoQAOptions(**options))


def test_sizes_of_a_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_text("man\ndog\n")
    vocabulary = {"vocabulary": tmp_path / "v.txt"}
    assert command.vocabulary_of(VideoQAOptions()) is None
    assert command.vocabulary_of(VideoQAOptions(**vocabulary)) == ("man", "dog")
    assert command.vocabulary_of(VideoQAOptions(**vocabulary, vocabulary_size=1)) == ("man",)
    for size in (0, 3):
        with pytest.raises(ValueError, match=rf"v\.txt has 2 answers; got --vocabulary-size {size}"):
            command.vocabulary_of(VideoQAOptions(**vocabulary, vocabulary_size=size))
    with pytest.raises(ValueError, match="--vocabulary-size needs --vocabulary"):
        command.vocabulary_of(VideoQAOptions(vocabulary_size=3))


def test_models_and_answers_that_do_not_fit(data: Path, tmp_path: Path) -> None:
    """The command ends with a word on why, before any video is read."""
    folder, log = model_folder("classifier", data, tmp_path / "model"), tmp_path / "log"
    (tmp_path / "v.txt").write_text("left\nright\n")
    options = {"dataset": "msrvtt_qa", "data_root": data}
    given = options_of(checkpoint=folder, vocabulary=tmp_path / "v.txt", **options)
    assert exit_codes(start(score, given, log=log)) == [1]
    assert "has its own answers; only a retrieval model needs them given" in log.read_text()
    assert exit_codes(start(score, options_of(checkpoint=tmp_path / "none", **options), log=log)) == [1]
    assert "there is no such folder, and no model can have this name" in log.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "--batch-size must be 1 or more; got 0"),
        ({"workers": -1}, "--workers must be 0 or more; got -1"),
        ({"decode_timeout": -1.0}, "--decode-timeout must be above 0; got -1.0"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        command.main(VideoQAOptions(checkpoint=tmp_path / "none", dataset="motion", **options))
