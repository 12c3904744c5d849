"""Compression methods on one video-language model: rows, what they are given, what is kept, tables; on tiny hosts."""

from __future__ import annotations

import json
import shlex
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations import tiny_post

from tempme_vl.data import motion
from tempme_vl.data.datasets import load_questions
from tempme_vl.data.motion import render_motion
from tempme_vl.data.splits import Video
from tempme_vl.data.videoqa import QASplit, Question
from tempme_vl.evaluation.options import VIDEOLLM_COMPARE
from tempme_vl.evaluation.rows import file_name
from tempme_vl.evaluation.videollm import session
from tempme_vl.evaluation.videollm.answers import Answer, Facts, Store, to_answers
from tempme_vl.evaluation.videollm.ask import Asked
from tempme_vl.evaluation.videollm.command import main
from tempme_vl.evaluation.videollm.rows import ALWAYS, Case, Row
from tempme_vl.evaluation.videollm.table import Run, beside_host, kinds_markdown, main_markdown, refusals_markdown
from tempme_vl.evaluation.videollm.times import Turns
from tempme_vl.evaluation.videoqa import normalize_answer
from tempme_vl.integrations import Compressed, compress, load_host
from tempme_vl.integrations.base import Where
from tempme_vl.integrations.tiny import tiny_host
from tempme_vl.tasks.inputs import HostInput
from tempme_vl.tasks.videollm import create_video_llm

KEEPS_SIZE = "Qwen2_5_VL"  # the others bring frames to one size
INSIDE = "framefusion:budget=0.8"  # of the means over the layers, of which there are two


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six videos to ask about."""
    root = tmp_path_factory.mktemp("compare") / "motion"
    return render_motion(root, num_train=20, num_test=4, num_order_train=0, num_order_val=0, num_order_test=2)


@pytest.fixture(scope="module")
def hosts(data: Path) -> Path:
    """Folders of tiny hosts."""
    questions = load_questions("msrvtt_qa", data, "test").questions
    texts = [text for q in questions for text in (q.question, *q.answers)]
    for folder, name, seed in (("0", "VideoLlava", 0), ("1", "VideoLlava", 1), (KEEPS_SIZE, KEEPS_SIZE, 0)):
        if name == KEEPS_SIZE and not tiny_post.PLACED:
            continue
        model, processor = tiny_host(name, texts, seed)
        model.save_pretrained(data.parent / folder)
        processor.save_pretrained(data.parent / folder)
    return data.parent


def command(hosts: Path, output: Path, more: str, host: str = "0", dataset: str = "msrvtt_qa") -> Any:
    sources = " ".join(str(hosts / name) for name in host.split())
    given = f"--host {sources} --dataset {dataset} --data-root {hosts / 'motion'} --output {output} --workers 0"
    usual = "--num-frames 8 --image-size 32 --repeats 1 --new-tokens 2 --answer-tokens 3"
    return VIDEOLLM_COMPARE.parse(f"{given} {usual} {more}".split())


@dataclass(frozen=True)
class Compared:
    """A comparison that was made: its folder, what `prepare` was given by method and budget, and what was shown."""

    output: Path
    shapes: set[tuple[str, int, tuple[int, ...]]]
    options: Any


@pytest.fixture(scope="module")
def made(hosts: Path) -> Iterator[Compared]:
    """On a host that keeps the size of a frame, of the data set that says kinds of questions."""
    if not tiny_post.PLACED:
        pytest.skip("compress refuses this host with this transformers")
    more = f"--methods tempme@tower evs fastvid tome@tower dtd:threshold=2 {INSIDE} --retention 0.5 0.25 --in-flight 2"
    options = command(hosts, hosts / "made", f"{more} --questions 7 --lmms-tasks a b", KEEPS_SIZE, "motion")
    shapes: set[tuple[str, int, tuple[int, ...]]] = set()
    prepare = Compressed.prepare

    def watched(self: Compressed, text: Any, videos: Any, *args: Any, **named: Any) -> Any:
        shapes.update((self.host.method, self.host.num_frames, tuple(video.shape)) for video in videos)
        return prepare(self, text, videos, *args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(motion, "render_motion", lambda root: root)
        patch.setattr(Compressed, "prepare", watched)
        main(options)
        yield Compared(hosts / "made", shapes, options)


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# ---- a comparison


def test_all_rows_are_in_the_table_or_told_with_their_cause(made: Compared) -> None:
    report = json.loads((made.output / "comparison.json").read_text())
    names = [row["name"] for row in report["rows"]]
    both = [f"{name} {budget}" for name in (*ALWAYS[1:], "tempme@tower", "evs", "fastvid") for budget in (0.5, 0.25)]
    assert names == ["none", *both, INSIDE]
    assert set(report["refused"]) == {f"{name} {b}" for name in ("tome@tower", "dtd:threshold=2") for b in (0.5, 0.25)}
    assert "'tempme' merges along time; got 'tome'" in report["refused"]["tome@tower 0.5"]
    text = (made.output / "comparison.md").read_text()
    assert "- `tome@tower` at 0.5, 0.25: inside the tower of" in text
    assert "Peak memory is measured on a GPU only" in text and "threshold" in report["refused"]["dtd:threshold=2 0.5"]
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len([line for line in tables if line.startswith("| evs 0.25 |")]) == 2  # and accuracy by kind
    drawn = ET.parse(made.output / "comparison.svg").getroot()
    assert len(list(drawn.iter("{http://www.w3.org/2000/svg}circle"))) == (3 + 1) * len(names)  # and the legend
    assert report["setting"]["questions"] == 7 and report["setting"]["num_frames"] == 8
    assert {"versions", "date", "command"} <= report.keys()


def test_fewer_frames_and_smaller_ones_are_what_the_host_is_given(made: Compared) -> None:
    rows = {row["name"]: row["facts"] for row in json.loads((made.output / "comparison.json").read_text())["rows"]}
    given = {name: (facts["num_frames"], facts["image_size"]) for name, facts in rows.items()}
    plain = {given[name] for name in given if name.split()[0] in ("none", "frames", "resolution")}
    assert {shape for method, _, shape in made.shapes if method == "none"} == {(n, 3, s, s) for n, s in plain}
    assert (given["frames 0.5"], given["frames 0.25"]) == ((4, 32), (2, 32))
    assert given["resolution 0.25"] == (8, 20)  # which the host makes 16 x 16 of: 2 x 2 tokens of 4 x 4
    assert {shape for method, _, shape in made.shapes if method != "none"} == {(8, 3, 32, 32)}


def test_what_is_kept_of_each_answer_adds_up(made: Compared) -> None:
    report = json.loads((made.output / "comparison.json").read_text())
    kinds = set()
    for row in report["rows"]:
        lines = lines_of(made.output / "answers" / f"{file_name(row['name'])}.jsonl")
        assert len({line["question_id"] for line in lines}) == len(lines) == 7
        for line in lines:
            said = normalize_answer(line["prediction"] or "")
            assert line["right"] == (said in map(normalize_answer, line["answers"]))
            kinds.add(line["kind"])
        assert row["accuracy"]["mean"] == pytest.approx(100 * sum(line["right"] for line in lines) / 7)
        assert row["facts"]["tokens"] == pytest.approx(sum(line["tokens"] for line in lines) / 7)
        assert sum(count for _, count in row["by_kind"].values()) == 7
    assert kinds == set(report["rows"][0]["by_kind"]) and len(kinds) > 1


def test_counts_are_those_told_ahead_and_at_most_the_budget(made: Compared, hosts: Path) -> None:
    model, processor = load_host(str(hosts / KEEPS_SIZE))
    rows = {row["name"]: row for row in json.loads((made.output / "comparison.json").read_text())["rows"]}
    places: tuple[tuple[str, Where], ...] = (("random", "behind"), ("tempme@tower", "tower"), ("evs", "auto"))
    for name, where in places:
        told = compress(model, processor, name.split("@")[0], 8, where, budget=0.25).counts((32, 32))
        facts = rows[f"{name} 0.25"]["facts"]
        assert (facts["tokens"], facts["host_tokens"], facts["measured"]) == (told.ours, told.native, False)
    inside, whole = rows[INSIDE]["facts"], rows["none"]["facts"]
    assert inside["measured"] and inside["tokens"] == pytest.approx(0.8 * 64, abs=1)
    gone = whole["prompt_tokens"] - inside["prompt_tokens"]
    assert gone == pytest.approx(whole["tokens"] - inside["tokens"], abs=0.01)
    assert inside["prompt_tokens"] / whole["prompt_tokens"] > inside["prefill_gflops"] / whole["prefill_gflops"] > 0.5
    assert rows["fastvid 0.25"]["facts"]["measured"] and rows["none"]["facts"]["tokens"] == 64
    assert all(row["facts"]["tokens"] <= row["budget"] * 64 for row in rows.values() if row["budget"])
    assert rows["tempme@tower 0.25"]["facts"]["tower_gflops"] < rows["none"]["facts"]["tower_gflops"]
    assert rows["frames 0.5"]["facts"]["tower_gflops"] == pytest.approx(rows["none"]["facts"]["tower_gflops"] / 2)


def test_times_are_of_all_rows_and_the_hosts_own_is_the_measure(made: Compared) -> None:
    report = json.loads((made.output / "comparison.json").read_text())
    host = report["rows"][0]
    assert all(latency["ratio"] == 1 for latency in host["latency"].values()) and host["requests"]["2"][1] == 1
    for row in report["rows"]:
        latency = {name: value["seconds"] for name, value in row["latency"].items()}
        assert 0 < latency["encoder"] < latency["first_token"] < latency["total"]
        assert latency["total"] == pytest.approx(latency["first_token"] + latency["token"])  # of two tokens
        assert row["requests"]["2"][0] > 0 and row["memory"] is None


def test_a_second_start_runs_nothing(made: Compared, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (made.output / "comparison.json").read_text()

    def refuse(*_: object) -> None:
        raise AssertionError("a host is loaded")

    monkeypatch.setattr(session, "load", refuse)
    main(made.options)
    rows = [json.loads(text)["rows"] for text in (before, (made.output / "comparison.json").read_text())]
    assert rows[0] == rows[1]


def test_other_settings_want_another_folder(made: Compared, hosts: Path) -> None:
    with pytest.raises(ValueError, match=r"have --questions 7: give the same, or another --output"):
        main(command(hosts, made.output, "--questions 6", KEEPS_SIZE, "motion"))


def test_lmms_evals_commands_are_written_for_each_row(made: Compared, hosts: Path) -> None:
    lines = (made.output / "lmms_eval.sh").read_text().splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("lmms-eval")]
    given = [words[words.index("--model_args") + 1] for words in commands]
    host = f"pretrained={hosts / KEEPS_SIZE}"
    assert f"{host},method=tempme,num_frames=8,where=tower,budget=0.25" in given
    assert f"{host},method=none,num_frames=2" in given  # fewer frames
    assert all(words[words.index("--tasks") + 1] == "a,b" for words in commands)
    assert any(line.startswith("# tome@tower 0.5 cannot be run: inside") for line in lines)
    assert "# resolution 0.5 has no command: lmms-eval reads frames as large as they are" in lines
    assert len(commands) == 16


def test_several_hosts_are_averaged_and_a_page_keeps_its_text(hosts: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Words\n\nof others.\n")
    more = f"--methods evs --retention 0.5 --questions 4 --in-flight --page {page}"
    main(command(hosts, tmp_path / "out", more, "0 1"))
    report = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert "resolution 0.5" in report["refused"]
    for row in report["rows"]:
        files = [tmp_path / "out" / "answers" / f"{row['name'].replace(' ', '_')}-host{i}.jsonl" for i in range(2)]
        both = [lines_of(file) for file in files]
        assert [{line["host"] for line in lines} for lines in both] == [{0}, {1}]
        percents = [100 * sum(line["right"] for line in lines) / len(lines) for lines in both]
        assert row["accuracy"]["mean"] == pytest.approx(sum(percents) / 2) and row["requests"] == {}
    shown = page.read_text()
    assert shown.startswith("# Words\n\nof others.\n") and "means over 2 hosts" in shown
    assert (tmp_path / "page_videollm_msrvtt_qa.svg").is_file()


def test_what_a_recipe_exported_is_compressed_by_the_rows_alone(hosts: Path, tmp_path: Path) -> None:
    model, processor = load_host(str(hosts / "0"))
    torch.manual_seed(0)
    prompt = "<video> tell {question}"
    inside = compress(model, processor, "tempme", 8, budget=0.2)
    trained = create_video_llm(
        inside, 2, prompt=prompt, answer_tokens=2, source=str(hosts / "0"), input=HostInput("segment", 32)
    )
    for name, weight in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    trained.save_pretrained(tmp_path / "best")
    sources = f"--host {tmp_path / 'best'} --dataset msrvtt_qa --data-root {hosts / 'motion'} --questions 3"
    more = f"--methods evs --retention 0.5 --workers 0 --repeats 1 --new-tokens 2 --in-flight --output {tmp_path / 'o'}"
    main(VIDEOLLM_COMPARE.parse(f"{sources} {more}".split()))
    report = json.loads((tmp_path / "o" / "comparison.json").read_text())
    asked = {name: report["setting"][name] for name in ("prompt", "answer_tokens", "sampling", "image_size", "trained")}
    expected = {"prompt": prompt, "answer_tokens": 2, "sampling": "segment", "image_size": 32, "trained": True}
    assert asked == expected
    assert [row["facts"]["tokens"] for row in report["rows"][:2]] == [136, 68]
    # by the weights that were trained
    plain = compress(trained.model, processor, "none", 8)
    [line, *_] = lines_of(tmp_path / "o" / "answers" / "none.jsonl")
    asked_of = {q.question_id: q.question for q in load_questions("msrvtt_qa", hosts / "motion", "test").questions}
    assert line["prompt"] == prompt.format(question=asked_of[line["question_id"]])
    assert plain.counts().ours == line["tokens"]


def test_answers_are_right_as_the_recipes_score_them(tmp_path: Path) -> None:
    """After normalising; a question that nothing was written to, or whose video could not be read, counts as wrong."""
    video = Video("v", Path("v.mp4"))
    given = {"a": ("which color is it", ("red",)), "b": ("who", ("a dog", "cat")), "c": ("who", ("dog",))}
    split = QASplit("s", tuple(Question(i, video, text, right) for i, (text, right) in given.items()))
    asked = Asked({i: f"ask {i}" for i in given}, {"a": "Red.", "b": "the Dog"}, {"a": 3, "b": 5}, {"a": 9, "b": 9})
    found = to_answers(asked, split, lambda question: question.split()[0])
    assert [(answer.right, answer.tokens, answer.kind) for answer in found] == [
        (True, 3, "which"),
        (True, 5, "who"),
        (False, None, "who"),
    ]
    wrong = to_answers(Asked(asked.prompts, {"a": "blue", "b": "dogs"}, {}, {}), split, None)
    assert not any(answer.right for answer in wrong) and wrong[0].kind is None
    store, case = Store(tmp_path, 2), Case(Row("evs"), 0.5)
    store.write_answers(case, 1, found)
    assert store.answers(case, 1) == found and store.answers(case, 0) is None
    assert store.missing([case], 1) == [case]  # nothing is known of it
    store.write_facts(case, Facts(tokens=4.0))
    assert store.missing([case], 1) == [] and store.missing([case], 0) == [case]
    store.write_facts(case, Facts(refused="so"))
    assert store.missing([case], 0) == []


# ---- tables


def answers(right: list[bool], kind: str | None = None) -> list[Answer]:
    return [Answer(str(i), "p", "a", ("a",), flag, 10 + i, kind) for i, flag in enumerate(right)]


def run_of(name: str, *right: list[bool], seconds: float = 1.0, kind: str | None = None) -> Run:
    turns = Turns({part: [seconds, 2 * seconds] for part in ("encoder", "first_token", "token", "total")})
    case = Case(Row("none")) if name == "none" else Case(Row(name), 0.5)
    return Run(case, Facts(host_tokens=20), [answers(flags, kind) for flags in right], turns)


def test_differences_are_paired_by_question() -> None:
    hard = [i % 2 == 0 for i in range(200)]
    host = run_of("none", hard)
    better = beside_host(run_of("evs", [flag or i < 20 for i, flag in enumerate(hard)], seconds=0.5), host)
    assert better.accuracy.mean == 55 and better.difference is not None and better.difference.mean == 5
    low, high = better.difference.low, better.difference.high
    # of 10 questions among 200, 5 +- 1.96 * sqrt(0.05 * 0.95 / 200); apart it were +- 9.8
    assert low == pytest.approx(5 - 3.02, abs=0.6) and high == pytest.approx(5 + 3.02, abs=0.6)
    assert beside_host(host, host).difference is None
    assert better.latency["total"].ratio == 0.5 and better.facts.tokens == pytest.approx(10 + 99.5)
    same = beside_host(run_of("evs", hard), host)
    assert same.difference is not None and (same.difference.low, same.difference.high) == (0, 0)
    with pytest.raises(ValueError, match="the same questions"):
        beside_host(run_of("evs", hard[:-1]), host)


def test_kinds_and_refusals_are_told() -> None:
    rows = [beside_host(run_of("none", [True, False], kind="order"), run_of("none", [True, False], kind="order"))]
    assert kinds_markdown(rows).splitlines() == ["| accuracy, % | order (2) |", "| --- | --- |", "| none | 50.0 |"]
    assert len(main_markdown(rows).splitlines()) == 3
    refused = {Case(Row("evs"), 0.5): "a\n b", Case(Row("evs"), 0.1): "a\n b", Case(Row("sttm")): "c"}
    assert refusals_markdown(refused).splitlines()[2:] == ["- `evs` at 0.5, 0.1: a b", "- `sttm`: c"]
    assert refusals_markdown({}) == ""


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--retention 1.5", "--retention: expected shares"),
        ("--retention", "--retention: expected one share"),
        ("--new-tokens 1", "--new-tokens must be 2 or more"),
        ("--in-flight 0", "--in-flight must be 1 or more"),
        ("--questions 1000", "--questions: msrvtt_qa/test has"),
        ("--host a a", "--host: expected one or more, each once"),
    ],
)
def test_options_that_cannot_be_are_refused(more: str, message: str, hosts: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        main(command(hosts, tmp_path, more))
