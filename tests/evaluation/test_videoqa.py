"""The harness: accuracy of predictions, the files they come in, and eval/videoqa.py without torch.

With a model it is tested in test_eval_videoqa.py.
"""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tempme_vl.data.splits import Video
from tempme_vl.data.videoqa import QASplit, Question
from tempme_vl.evaluation.videoqa import (
    QUESTION_TYPES,
    accuracy,
    accuracy_by,
    format_accuracy,
    normalize_answer,
    question_type,
)

COMMAND = Path(__file__).parents[2] / "eval" / "videoqa.py"
WORDS = ("what", "who", "how", "when", "where", "is")


def make_rows(count: int) -> list[tuple[str, str, str, str]]:
    """Video, question, answer, id; the answers unevenly distributed."""
    rng = random.Random(count)
    return [
        (
            str(rng.randrange(1 + count // 4)),
            f"{rng.choice(WORDS)} is it {i}",
            rng.choice(("man", "man", "dog", "two")),
            str(1000 + i),
        )
        for i in range(count)
    ]


def make_split(rows: list[tuple[str, str, str, str]]) -> QASplit:
    return QASplit("toy/test", tuple(Question(i, Video(v, Path(v)), q, (a,)) for v, q, a, i in rows))


def count_independently(predictions: dict[str, str], rows: list[tuple[str, str, str, str]]) -> dict[str, list[int]]:
    """Right answers and questions by first word, in a way of its own."""
    counts: dict[str, list[int]] = {}
    for _, question, answer, question_id in rows:
        word = question.split(" ")[0]
        for key in ("all", word if word != "is" else "other"):
            right_and_total = counts.setdefault(key, [0, 0])
            right_and_total[0] += int(question_id in predictions and predictions[question_id] == answer)
            right_and_total[1] += 1
    return counts


def kinds_of_predictions(rows: list[tuple[str, str, str, str]]) -> dict[str, dict[str, str]]:
    ids, answers = [row[3] for row in rows], [row[2] for row in rows]
    shuffled = random.Random(0).sample(answers, len(answers))
    return {
        "most frequent": dict.fromkeys(ids, "man"),
        "correct": dict(zip(ids, answers, strict=True)),
        "missing": {},
        "shuffled": dict(zip(ids, shuffled, strict=True)),
        "half of them": dict(list(zip(ids, shuffled, strict=True))[::2]),
    }


ROWS = make_rows(500)


@pytest.mark.parametrize("name", kinds_of_predictions(ROWS))
def test_accuracy_is_what_an_independent_count_gives(name: str) -> None:
    predictions = kinds_of_predictions(ROWS)[name]
    counts = count_independently(predictions, ROWS)
    report = accuracy(predictions, make_split(ROWS))
    assert (report["correct"], report["total"]) == tuple(counts["all"])
    assert report["accuracy"] == 100 * counts["all"][0] / 500
    assert report["missing"] == 500 - len(predictions)
    assert report["total_by_type"] == {kind: counts[kind][1] for kind in QUESTION_TYPES}
    assert report["by_type"] == {kind: 100 * counts[kind][0] / counts[kind][1] for kind in QUESTION_TYPES}
    assert accuracy(dict(reversed(predictions.items())), make_split(ROWS[::-1])) == report


@pytest.mark.parametrize("name", kinds_of_predictions(ROWS))
def test_accuracy_by_any_function_of_the_question(name: str) -> None:
    predictions, split = kinds_of_predictions(ROWS)[name], make_split(ROWS)
    counts = count_independently(predictions, ROWS)
    by_word = accuracy_by(predictions, split, lambda question: question.split(" ")[0])
    assert list(by_word) == sorted(WORDS)
    for word, (percent, total) in by_word.items():
        right, expected = counts[word if word != "is" else "other"]
        assert (percent, total) == (100 * right / expected, expected)
    assert accuracy_by(predictions, split, lambda _: "all") == {"all": (accuracy(predictions, split)["accuracy"], 500)}
    # exact: as `accuracy` without normalisation
    louder = {question_id: answer.upper() for question_id, answer in predictions.items()}
    assert accuracy_by(louder, split, lambda _: "all") == {"all": (0.0, 500)}


def test_accuracy_by_counts_each_of_several_answers() -> None:
    video = Video("v", Path("v"))
    questions = (Question("1", video, "what", ("dog", "cat")), Question("2", video, "what", ("dog",)))
    found = accuracy_by({"1": "cat", "2": "cat"}, QASplit("toy", questions), str.upper)
    assert found == {"WHAT": (50.0, 2)}


def test_bounds() -> None:
    kinds = kinds_of_predictions(ROWS)
    assert accuracy(kinds["correct"], make_split(ROWS))["accuracy"] == 100
    assert accuracy(kinds["missing"], make_split(ROWS))["accuracy"] == 0


def test_a_missing_prediction_counts_like_a_wrong_one() -> None:
    predictions = kinds_of_predictions(ROWS)["correct"]
    wrong = {**predictions, "1003": "elephant"}
    missing = {question_id: answer for question_id, answer in predictions.items() if question_id != "1003"}
    reports = [accuracy(given, make_split(ROWS)) for given in (wrong, missing)]
    assert [report.pop("missing") for report in reports] == [0, 1]
    assert reports[0] == reports[1] and reports[0]["correct"] == 499


def test_an_empty_prediction_is_a_wrong_one() -> None:
    predictions = kinds_of_predictions(ROWS)["correct"]
    wrong = accuracy({**predictions, "1003": "elephant", "1004": "elephant"}, make_split(ROWS))
    empty = accuracy({**predictions, "1003": "", "1004": " \n"}, make_split(ROWS))
    assert (wrong.pop("empty"), empty.pop("empty")) == (0, 2) and empty == wrong and empty["missing"] == 0


def test_no_prediction_beats_the_ceiling() -> None:
    split = make_split(ROWS)
    vocabulary = ("man", "two")
    report = accuracy({q.question_id: q.answers[0] for q in split.questions if q.answers[0] in vocabulary}, split)
    with_ceiling = accuracy({}, split, vocabulary)
    assert with_ceiling["ceiling"] == report["accuracy"] < 100
    assert (with_ceiling["vocabulary_size"], report["vocabulary_size"], report["ceiling"]) == (2, None, None)
    with pytest.raises(ValueError, match="vocabulary is empty"):
        accuracy({}, split, ())


def test_each_of_several_answers_is_right_and_the_match_is_exact_unless_asked() -> None:
    split = QASplit("toy", (Question("q", Video("v", Path("v")), "what", ("Dog", "cat")),))
    for prediction, exact, normalized in (
        ("Dog", 1, 1),
        ("cat", 1, 1),
        ("dog", 0, 1),
        ("cat ", 0, 1),
        ("A dog.", 0, 1),
        ("dogs", 0, 0),
    ):
        assert accuracy({"q": prediction}, split)["correct"] == exact
        report = accuracy({"q": prediction}, split, normalize=True)
        assert (report["correct"], report["match"]) == (normalized, "normalized")


def test_normalized_answers() -> None:
    for answer, expected in (("The  Red, Car!", "red car"), ("a", "a"), ("an apple", "apple"), ("ant", "ant")):
        assert normalize_answer(answer) == expected == normalize_answer(expected)


def test_types_without_questions_have_no_accuracy() -> None:
    report = accuracy({}, make_split([("v", "who talks", "man", "1")]))
    assert report["by_type"] == {"what": None, "who": 0, "how": None, "when": None, "where": None, "other": None}
    assert report["total_by_type"] == {"what": 0, "who": 1, "how": 0, "when": 0, "where": 0, "other": 0}


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("what is a man doing", "what"),
        ("What's this?", "what"),
        ("  Who", "who"),
        ("'how many", "how"),
        ("whatever it is", "other"),
        ("is it what", "other"),
        ("2 what", "other"),
    ],
)
def test_question_types(question: str, kind: str) -> None:
    assert question_type(question) == kind


def test_ambiguous_pairs_are_counted_once() -> None:
    rows = [("v", "who", "man", "1"), ("v", "who", "boy", "2"), ("v", "who", "boy", "3")]
    rows += [("w", "who", "man", "4"), ("v", "what", "man", "5"), ("v", "what", "man", "6")]
    assert accuracy({}, make_split(rows))["ambiguous"] == 1


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ({"1000": "man", "7": "man"}, r"1 of 2 predictions have ids that toy/test \(500 questions\) does not have: 7"),
        ({"1000": None, "1001": "man"}, "1 predictions are no text: those of 1000"),
    ],
)
def test_predictions_that_cannot_be_scored(predictions: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accuracy(predictions, make_split(ROWS))


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """eval/videoqa.py as a user runs it; at its end it writes which of the forbidden modules were loaded."""
    script = f"""
import atexit, runpy, sys
atexit.register(lambda: print("LOADED", [m for m in ("torch", "av", "decord", "transformers") if m in sys.modules]))
sys.argv[0] = {str(COMMAND)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    return subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    with (tmp_path / "test.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("video", "question", "answer", "qid"), *ROWS])
    paths = {"annotations": tmp_path / "test.csv", "predictions": tmp_path / "p.json", "vocabulary": tmp_path / "v.txt"}
    paths["predictions"].write_text(json.dumps(kinds_of_predictions(ROWS)["half of them"]))
    paths["vocabulary"].write_text("man\ndog\ntwo\n")
    return paths


def test_the_command_writes_the_report_and_loads_no_torch(files: dict[str, Path], tmp_path: Path) -> None:
    arguments = [part for name, path in files.items() for part in (f"--{name}", path)]
    report_file = tmp_path / "out" / "report.json"
    done = run(*arguments, "--vocabulary-size", 2, "--json", report_file)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("LOADED []\n")
    report = json.loads(report_file.read_text())
    split = make_split(ROWS)
    expected = accuracy(kinds_of_predictions(ROWS)["half of them"], split, ("man", "dog"))
    assert {key: report[key] for key in expected} == {**expected, "split": f"{tmp_path.name}/test.csv"}
    assert done.stdout.startswith(format_accuracy(report))


def test_the_command_ends_with_one_line_on_bad_input(files: dict[str, Path]) -> None:
    files["predictions"].write_text('{"1000": "man", "elsewhere": "man"}')
    done = run("--predictions", files["predictions"], "--annotations", files["annotations"])
    assert done.returncode == 2
    assert done.stderr.startswith("error: 1 of 2 predictions have ids that") and "elsewhere" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_command_scores_the_prediction_and_not_the_truth_beside_it(files: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"id": i, "question": q, "answer": a, "pred": "I do not know"} for _, q, a, i in ROWS]
    files["predictions"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("--predictions", files["predictions"], "--annotations", files["annotations"])
    done = run(*arguments, "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["correct"], report["missing"], report["prediction_key"], report["id_key"]) == (0, 0, "pred", "id")
    assert "predictions read from pred, ids from id; ground truth, not read: answer" in done.stdout
    # asked for, the truth is scored
    done = run(*arguments, "--prediction-key", "answer", "--json", tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["accuracy"] == 100, done.stderr
    # the annotations themselves could be either
    done = run("--predictions", files["annotations"], "--annotations", files["annotations"])
    assert done.returncode == 2 and "is this a file of annotations?" in done.stderr


def test_the_table_holds_every_number(files: dict[str, Path]) -> None:
    report = accuracy(kinds_of_predictions(ROWS)["shuffled"], make_split(ROWS), ("man",))
    text = format_accuracy(report)
    for kind in QUESTION_TYPES:
        assert f"{report['total_by_type'][kind]:>10}{report['by_type'][kind]:>12.2f}" in text
    assert f"{report['accuracy']:.2f}" in text and f"{report['ceiling']:.2f} %" in text and "toy/test" in text
