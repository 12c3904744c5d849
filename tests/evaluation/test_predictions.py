"""Which key of a public file of predictions is the model's answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tempme_vl.evaluation.predictions import load_predictions, read_predictions

EXPECTED = {"5": "man", "v_6": "a dog, big", "7": ""}
ROWS = list(EXPECTED.items())


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def each(**made: str) -> list[dict[str, Any]]:
    """A row for each prediction: the keys' values are "id", "prediction", or what is written there."""
    return [{key: {"id": i, "prediction": p}.get(value, value) for key, value in made.items()} for i, p in ROWS]


def lmms_eval(response: Any) -> list[dict[str, Any]]:
    return [
        {
            "doc_id": number,
            "doc": {"video_name": "v", "question_id": i, "question": "what", "answer": "truth"},
            "target": "truth",
            "resps": [[p]],
            "filtered_resps": response(p),
        }
        for number, (i, p) in enumerate(ROWS)
    ]


VIDEO_CHATGPT = each(id="id", question="what", answer="truth", pred="prediction")
CSV = 'video,question,answer,qid,prediction\nv,what,truth,5,man\nv,what,truth,v_6,"a dog, big"\nv,what,truth,7,\n'
PUBLIC: dict[str, tuple[str, str, str, str, tuple[str, ...]]] = {
    # layout: file, content, the key of predictions, of ids, the ground truth's
    "Video-ChatGPT, LLaVA-NeXT-Video": ("p.json", json.dumps(VIDEO_CHATGPT), "pred", "id", ("answer",)),
    "Video-LLaVA merged": ("merge.jsonl", lines(VIDEO_CHATGPT), "pred", "id", ("answer",)),
    "LLaMA-VID, lines in .json": ("p.json", lines(VIDEO_CHATGPT), "pred", "id", ("answer",)),
    "one line": ("p.json", lines(VIDEO_CHATGPT[:1]), "pred", "id", ("answer",)),
    "by key with truth": (
        "p.json",
        json.dumps({i: {"q": "what", "answer": "truth", "pred": p} for i, p in ROWS}),
        "pred",
        "the object's keys",
        ("answer",),
    ),
    "ALBEF, BLIP, UMT": (
        "vqa.json",
        json.dumps(each(question_id="id", answer="prediction")),
        "answer",
        "question_id",
        (),
    ),
    "InternVL, Qwen-VL": (
        "p.json",
        json.dumps(each(question="what", question_id="id", answer="prediction", annotation="truth")),
        "answer",
        "question_id",
        ("annotation",),
    ),
    "LLaVA": (
        "answers.jsonl",
        lines(each(question_id="id", prompt="what", text="prediction", answer_id="x", model_id="m")),
        "text",
        "question_id",
        (),
    ),
    "LLaVA video, gt_answer": (
        "a.jsonl",
        lines(each(questionId="id", prompt="what", answer="prediction", gt_answer="truth")),
        "answer",
        "questionId",
        ("gt_answer",),
    ),
    "lmms-eval, lists": (
        "samples.jsonl",
        lines(lmms_eval(lambda p: [p])),
        "filtered_resps",
        "question_id",
        ("answer", "target"),
    ),
    "lmms-eval, texts": (
        "samples.jsonl",
        lines(lmms_eval(lambda p: p)),
        "filtered_resps",
        "question_id",
        ("answer", "target"),
    ),
    "PLLaVA-like list inside": (
        "all.json",
        json.dumps({"accuracy": 1, "result_list": each(id="id", pred="prediction", gt="truth")}),
        "pred",
        "id",
        ("gt",),
    ),
    "response": (
        "p.jsonl",
        lines(each(qid="id", answer="truth", response="prediction")),
        "response",
        "qid",
        ("answer",),
    ),
    "output": ("p.json", json.dumps(each(id="id", target="truth", output="prediction")), "output", "id", ("target",)),
    "generated": ("p.json", json.dumps(each(id="id", generated="prediction")), "generated", "id", ()),
    "csv with truth": ("p.csv", CSV, "prediction", "qid", ("answer",)),
    "csv": ("p.csv", 'qid,answer\n5,man\nv_6,"a dog, big"\n7,\n', "answer", "qid", ()),
    "map": ("p.json", json.dumps(EXPECTED), "the object's values", "the object's keys", ()),
    "map with null": ("p.json", json.dumps({**EXPECTED, "7": None}), "the object's values", "the object's keys", ()),
}


@pytest.mark.parametrize("layout", PUBLIC)
def test_public_layouts_are_read_right_and_the_keys_are_named(layout: str, tmp_path: Path) -> None:
    name, content, key, id_key, truth = PUBLIC[layout]
    (tmp_path / name).write_text(content)
    read = load_predictions(tmp_path / name)
    assert read.answers == (dict(ROWS[:1]) if layout == "one line" else EXPECTED)
    assert (read.prediction_key, read.id_key, read.unread) == (key, id_key, truth)
    assert not read.like_questions
    assert all(part in read.in_words() for part in (key, id_key, *truth))


def test_ids_are_texts_or_numbers(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('[{"question_id": 5, "id": "5", "pred": "man"}, {"question_id": 6, "pred": "a"}]')
    assert read_predictions(tmp_path / "p.json") == {"5": "man", "6": "a"}


def test_keys_that_could_be_either_are_asked_for(tmp_path: Path) -> None:
    rows = [{"id": 1, "uid": 11, "pred_answer": "a", "response": "b", "answer": "c", "other": "d"}]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="entry 0: the prediction could be in each of pred_answer, response: "):
        read_predictions(tmp_path / "p.json")
    for key in ("pred_answer", "response", "answer", "other"):
        assert read_predictions(tmp_path / "p.json", key) == {"1": rows[0][key]}
    assert read_predictions(tmp_path / "p.json", "other", "uid") == {"11": "d"}
    with pytest.raises(ValueError, match="there is no 'pred', which --prediction-key names"):
        read_predictions(tmp_path / "p.json", "pred")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.json", '{"5": "man", "5": "man"}', "keys occur more than once in one object: 5"),
        ("p.json", '[{"id": 5, "answer": "man"}, {"id": "5", "answer": "boy"}]', "answered more than once: 5"),
        ("p.csv", "qid,answer\n5,man\n5,man\n", "1 question ids are answered more than once: 5"),
        ("p.json", '[{"id": 5, "answer": 7}]', r"p\.json, entry 0: the answer to 5 must be a text .*; got 7"),
        ("p.json", '{"5": ["man", "boy"]}', r"p\.json.*the answer to 5 must be a text"),
        ("p.json", '[{"id": 5, "pred": {"a": 1}}]', "the answer to 5 must be a text"),
        ("p.csv", "5,man\n6,boy\n", r"p\.csv, line 2: expected one of question_id, id, qid"),
        ("p.csv", "qid,answer\n5\n", r"p\.csv, line 2: expected 2 columns"),
        ("p.json", '[{"id": 5, "qid": 6, "answer": "man"}]', "the id could be in each of id, qid"),
        ("p.json", '[{"id": 5, "pred": "a", "output": "b"}]', "the prediction could be in each of pred, output"),
        ("p.json", '[{"id": 5, "answer": "a", "text": "b", "prompt": "c"}]', "could be in each of answer, text"),
        ("p.json", '[{"id": 5, "text": "what is it"}]', "entry 0: expected one of"),
        ("p.jsonl", '{"id": 5, "pred": "a"}\n{"id": 6, "answer": "b"}\n', "line 2: expected pred and id, as in the"),
        ("p.json", '[{"id": 5, "pred": "a"}, {"qid": 6, "pred": "b"}]', "entry 1: expected pred and id, as in the"),
        ("p.json", '[{"answer": "man"}]', "one of question_id, id, qid"),
        ("p.json", '[{"pred": "A", "gt": "B"}]', "entry 0: expected one of question_id"),
        ("p.json", '{"acc_dict": {}, "res_list": [{"pred": "A", "gt": "B"}]}', "entry 0: expected one of"),
        (
            "p.json",
            '{"v_1_0": [{"pred": "yes", "score": 4}], "v_1_1": [{"pred": "no"}]}',
            "object or list of predictions",
        ),
        ("p.json", '["man"]', r"p\.json, entry 0: expected one of"),
        ("p.json", '[{"id": 5.5, "answer": "man"}]', r"p\.json, entry 0: expected an id"),
        ("p.json", '"man"', "expected a JSON object or list"),
        ("p.json", "[]", r"p\.json: no predictions"),
        ("p.json", "{}", r"p\.json: no predictions"),
        ("p.jsonl", '{"id": 5, "pred": "a"}\n{"id": 6, "pred"\n', r"p\.jsonl, line 2: "),
        ("p.json", '{"id": 5, "pred": "a"}\n{"id": 6, "pred": "b"}\n{"id": 7, "pr\n', r"p\.json, line 3: "),
        ("p.json", "", r"p\.json: Expecting"),
        ("p.csv", "", "names of columns"),
        ("p.tsv", "index\tprediction\n1\ta\n", r"p\.tsv: expected predictions as JSON, JSON lines or csv"),
        ("p.xlsx", "", r"p\.xlsx: expected predictions as JSON, JSON lines or csv"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_predictions(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
