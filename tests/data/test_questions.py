import json
from pathlib import Path

import pytest

from tempme_vl.data import motion
from tempme_vl.data.datasets import Source, load_questions
from tempme_vl.data.splits import Video
from tempme_vl.data.videoqa import (
    QASplit,
    Question,
    answer_vocabulary,
    coverage,
    read_question_lines,
    read_questions,
    read_vocabulary,
)

CSV = "video,question,answer,qid,type\n7010,what is a man doing ,talk,5,10\n7010,who talks,man,6,10\n7,who,boy,9,0\n"


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def entry(**changes):
    return {"answer": "man", "category_id": 3, "id": 5, "question": "who talks", "video_id": 7010, **changes}


def split(*answers, name="toy/train"):
    return QASplit(
        name, tuple(Question(str(i), Video("v", Path("v")), "what", (answer,)) for i, answer in enumerate(answers))
    )


def test_msrvtt_csv_and_json_are_the_same_questions(tmp_path):
    from_csv = read_questions(write(tmp_path / "test.csv", CSV))
    rows = [("talk", 5, "what is a man doing", 7010), ("man", 6, "who talks", 7010), ("boy", 9, "who", 7)]
    entries = [entry(answer=a, id=i, question=q, video_id=v) for a, i, q, v in rows]
    from_json = read_questions(write(tmp_path / "test_qa.json", entries))
    assert from_csv.questions == from_json.questions
    assert from_csv.questions[0] == Question(
        "5", Video("7010", Path("7010")), "what is a man doing", answers=("talk",), options=()
    )
    assert from_csv.name == f"{tmp_path.name}/test.csv"


@pytest.mark.parametrize("name", ["test.csv", "test_qa.json"])
def test_msrvtt_questions_find_the_videos_of_the_retrieval_reader(tmp_path, name):
    (tmp_path / "MSRVTT_Videos").mkdir()
    (tmp_path / "MSRVTT_Videos" / "video7010.webm").touch()
    (tmp_path / "msrvtt_qa").mkdir()
    write(tmp_path / "msrvtt_qa" / name, CSV if name == "test.csv" else [entry(), entry(id=6, video_id="video7")])
    result = load_questions("msrvtt_qa", tmp_path, "test")
    assert result.name == "msrvtt_qa/test"
    videos = {q.video for q in result.questions}
    folder = tmp_path / "MSRVTT_Videos"
    assert videos == {Video("video7010", folder / "video7010.webm"), Video("video7", folder / "video7.mp4")}


def test_motion_has_the_layout_of_msrvtt(tmp_path, monkeypatch):
    def render_few(root):
        render(root, num_train=20, num_test=4, num_order_train=3, num_order_val=2, num_order_test=2)
        return root

    render = motion.render_motion
    monkeypatch.setattr(motion, "render_motion", render_few)
    splits = {name: load_questions("motion", tmp_path / "motion", name) for name in ("train", "val", "test")}
    # three questions about a moving thing, two about an order; one of twenty moving videos is for validation
    assert {name: len(s.questions) for name, s in splits.items()} == {"train": 63, "val": 7, "test": 16}
    assert all(q.video.path.is_file() for s in splits.values() for q in s.questions)
    videos = [{q.video for q in s.questions} for s in splits.values()]
    assert len(set.union(*videos)) == sum(map(len, videos)) == 31


def lines_of(path, *splits):
    """One question a line, in these splits; None for a line without one."""
    entries = [{"file": f"{i}.mp4", "question": f"q{i}", "answer": "a", "split": name} for i, name in enumerate(splits)]
    return write(path, "\n".join(json.dumps({k: v for k, v in e.items() if v is not None}) for e in entries))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("train", "train", "val", "test", "test"), (("train", [0, 1]), ("val", [2]), ("test", [3, 4]))),
        (("test", "train", "other", None), (("train", [1]), None, ("test", [0]))),
        (("val", "train", "train"), (("train", [1, 2]), ("val", [0]), ("train", [1, 2]))),
        ((None, None), (("all", [0, 1]), None, ("all", [0, 1]))),
    ],
)
def test_splits_of_a_jsonl_file(tmp_path, given, expected):
    path = lines_of(tmp_path / "mine.jsonl", *given)
    for found, wanted in zip(Source("jsonl", None, tmp_path / "videos", path).all_questions(), expected, strict=True):
        if wanted is None:
            assert found is None
        else:
            assert (found.name, [q.question for q in found.questions]) == (
                f"mine/{wanted[0]}",
                [f"q{i}" for i in wanted[1]],
            )
            assert {q.video.path.parent for q in found.questions} == {tmp_path / "videos"}


def test_splits_of_a_data_set(tmp_path):
    for i, name in enumerate(("train", "val", "test")):
        write(tmp_path / f"{name}_qa.json", [entry(video_id=i)])
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "vid1.avi").touch()
    splits = Source("msvd_qa", tmp_path, tmp_path / "videos").all_questions()
    assert splits == tuple(
        load_questions("msvd_qa", tmp_path, name, tmp_path / "videos") for name in ("train", "val", "test")
    )
    assert [split.name for split in splits] == ["msvd_qa/train", "msvd_qa/val", "msvd_qa/test"]
    assert splits[1].questions[0].video == Video("vid1", tmp_path / "videos" / "vid1.avi")


def test_what_a_data_set_needs_is_named(tmp_path):
    for root, path in ((None, None), (tmp_path, None), (None, tmp_path / "a.jsonl")):
        with pytest.raises(ValueError, match="--dataset jsonl needs --annotations FILE and --video-root FOLDER"):
            Source("jsonl", root, None if path else tmp_path, path).all_questions()
    with pytest.raises(ValueError, match="--dataset msrvtt_qa needs --data-root, the folder of its annotation files"):
        Source("msrvtt_qa", None, tmp_path, tmp_path / "a.jsonl").all_questions()
    with pytest.raises(ValueError, match=r"none\.jsonl: no such file"):
        Source("jsonl", None, tmp_path, tmp_path / "none.jsonl").all_questions()
    for line, message in (("[1]", "expected a JSON object"), ("5", "expected a JSON object"), ("{", "Expecting")):
        broken = write(tmp_path / "a.jsonl", f'{{"split": "train"}}\n{line}')
        with pytest.raises(ValueError, match=rf"a\.jsonl, line 2: {message}"):
            Source("jsonl", None, tmp_path, broken).all_questions()


def test_line_separators_of_unicode_are_letters(tmp_path):
    line = json.dumps({"file": "a.mp4", "question": "what\u2028is it", "answer": "a\x85b"}, ensure_ascii=False)
    for found in Source("jsonl", None, tmp_path, write(tmp_path / "a.jsonl", line + "\r\n")).all_questions()[::2]:
        assert [(q.question, q.answers) for q in found.questions] == [("what\u2028is it", ("a\x85b",))]


def test_msvd_names_videos_by_the_mapping_where_there_is_one(tmp_path):
    write(tmp_path / "val_qa.json", [entry(video_id=3), entry(id=6, video_id=4)])
    assert [q.video.video_id for q in load_questions("msvd_qa", tmp_path, "val").questions] == ["vid3", "vid4"]
    mapping = write(tmp_path / "youtube_mapping.txt", "-8y1Q_108_115 vid3\nabc_1_2 vid4\n")
    questions = load_questions("msvd_qa", tmp_path, "val", tmp_path).questions
    assert [q.video for q in questions] == [Video(i, tmp_path / f"{i}.mp4") for i in ("-8y1Q_108_115", "abc_1_2")]
    write(mapping, "abc vid4\n")
    with pytest.raises(ValueError, match=r"val_qa\.json: 1 videos are not in .*youtube_mapping\.txt: 3"):
        load_questions("msvd_qa", tmp_path, "val")
    write(mapping, "abc vid4 more\n")
    with pytest.raises(ValueError, match="expected lines like 'name vid7'; got abc vid4 more"):
        load_questions("msvd_qa", tmp_path, "val")


def write_activitynet(folder, ids, answer_ids):
    questions = [{"video_name": "1QI", "question": "is it", "question_id": i} for i in ids]
    write(folder / "test_a.json", [{"answer": "no", "type": 3, "question_id": i} for i in answer_ids])
    return write(folder / "test_q.json", questions)


def test_activitynet_joins_questions_and_answers(tmp_path):
    path = write_activitynet(tmp_path, ["v_1QI_1", "v_1QI_2"], ["v_1QI_1", "v_1QI_2"])
    result = load_questions("activitynet_qa", tmp_path, "test")
    assert [(q.question_id, q.video.video_id, q.answers) for q in result.questions] == [
        ("v_1QI_1", "v_1QI", ("no",)),
        ("v_1QI_2", "v_1QI", ("no",)),
    ]
    assert [q.question_id for q in read_questions(path).questions] == ["v_1QI_1", "v_1QI_2"]
    write(tmp_path / "test_a.json", [{"answer": text, "question_id": i} for i, text in (("b", "yes"), ("a", "no"))])
    write(path, [{"video_name": "1QI", "question": "is it", "question_id": i} for i in ("a", "b")])
    assert [(q.question_id, q.answers) for q in read_questions(path).questions] == [("a", ("no",)), ("b", ("yes",))]
    write_activitynet(tmp_path, ["a", "b"], ["b", "c"])
    with pytest.raises(ValueError, match=r"test_q\.json, entry 0: question_id 'a' has no answer in .*test_a\.json"):
        read_questions(path)
    write_activitynet(tmp_path, ["a", "b"], ["b", "b"])
    with pytest.raises(ValueError, match=r"test_a\.json: 1 values of 'question_id' occur more than once: b"):
        read_questions(path)
    write_activitynet(tmp_path, ["a", "b"], ["a"])
    with pytest.raises(ValueError, match=r"test_q\.json has 2 questions, .*test_a\.json 1 answers"):
        read_questions(path)
    with pytest.raises(ValueError, match=r"expected NAME_q\.json and NAME_a\.json beside it"):
        read_questions(path.rename(tmp_path / "questions.json"))


def test_jsonl_answers_options_times_and_splits(tmp_path):
    lines = [
        {"file": "a.mp4", "question": " what ", "answer": "dog", "split": "train", "fps": 30},
        "",
        {"file": "a.mp4", "question": "who", "answers": ["man", "boy"], "options": ["girl", "boy"], "id": 7},
        {"file": "b.mp4", "question": "how", "answer": "so", "start": 1, "end": 2.5, "split": "test"},
    ]
    path = write(tmp_path / "mine.jsonl", "\n".join(line if line == "" else json.dumps(line) for line in lines))
    everything = read_question_lines(path, tmp_path / "videos")
    assert everything.name == "mine/all"
    assert everything.questions == (
        Question("1", Video("a.mp4", tmp_path / "videos/a.mp4"), "what", ("dog",)),
        Question("7", Video("a.mp4", tmp_path / "videos/a.mp4"), "who", ("man", "boy"), ("girl", "boy")),
        Question("4", Video("b.mp4@1.0-2.5", tmp_path / "videos/b.mp4", 1.0, 2.5), "how", ("so",)),
    )
    test = read_questions(path, "test")
    assert test.name == "mine/test" and [q.question_id for q in test.questions] == ["4"]
    with pytest.raises(ValueError, match="no lines with split 'val'; splits found: None, test, train"):
        read_question_lines(path, tmp_path, "val")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file": "a.mp4"', "Expecting"),
        ("[1]", "expected a JSON object"),
        ({"question": "q", "answer": "a"}, "'file' must be a text"),
        ({"file": "a", "question": "", "answer": "a"}, "'question' must be a text"),
        ({"file": "a", "question": "q"}, "either 'answer' or 'answers'"),
        ({"file": "a", "question": "q", "answer": "a", "answers": ["b"]}, "either 'answer' or 'answers'"),
        ({"file": "a", "question": "q", "answer": 2}, "'answer' must be a text"),
        ({"file": "a", "question": "q", "answers": []}, "'answers' must be a list"),
        ({"file": "a", "question": "q", "answer": "a", "options": "ab"}, "'options' must be a list"),
        ({"file": "a", "question": "q", "answer": "a", "start": "1"}, "'start' must be a number of seconds"),
        ({"file": "a", "question": "q", "answer": "a", "start": 3, "end": 3}, "end must be greater than start"),
        ({"file": "a", "question": "q", "answer": "a", "id": True}, "expected an id"),
    ],
)
def test_jsonl_errors_name_file_and_line(tmp_path, line, message):
    good = json.dumps({"file": "good.mp4", "question": "q", "answer": "a"})
    path = write(tmp_path / "mine.jsonl", good + "\n" + (line if isinstance(line, str) else json.dumps(line)))
    with pytest.raises(ValueError, match=rf"mine\.jsonl, line 2: .*{message}"):
        read_question_lines(path, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", [entry(), entry(id=6, answer=" ")], r"a\.json, entry 1: 'answer' must be a text that is not empty"),
        ("a.json", [entry(question="")], r"entry 0: 'question' must be a text"),
        ("a.json", [entry(id=None)], r"entry 0: expected an id"),
        ("a.json", [entry(), entry()], "1 question ids occur more than once: 5"),
        (
            "a.json",
            [{"id": 5, "question": "who"}],
            "entry 0: expected video_id, question, answer, id; got id, question",
        ),
        ("a.json", {"a": 1}, r"a\.json: expected a list of JSON objects"),
        ("a.json", "[", r"a\.json: Expecting"),
        ("a.json", '[{"id": 1, "id": 2}]', r"a\.json: 1 keys occur more than once in one object: id"),
        ("a.json", [], "no questions"),
        ("a.csv", CSV + "7,who,,10,0\n", r"a\.csv, line 5: 'answer' must be a text that is not empty"),
        ("a.csv", CSV + "7,who,man,9,0\n", "1 question ids occur more than once: 9"),
        ("a.csv", CSV + "7,who,man\n", r"a\.csv, line 5: expected 5 columns"),
        ("a.csv", CSV + "7,who, why,man,9,0\n", r"a\.csv, line 5: expected 5 columns"),
        ("a.csv", "video,question\n7,who\n", r"a\.csv, line 2: expected video, question, answer, qid; got video"),
        ("a.csv", CSV.partition("\n")[0] + "\n", "no questions"),
        ("a.csv", "", r"a\.csv: expected distinct names of columns in the first line"),
        ("a.csv", CSV + '7,"' + "who " * 40_000, r"a\.csv, after line 4: field larger"),
    ],
)
def test_errors_name_file_and_place(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_questions(write(tmp_path / name, content))


def test_missing_files_and_unknown_names_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"none\.csv: no such file"):
        read_questions(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes(b"video,question,answer,qid\n1,who,caf\xe9,2\n")
    with pytest.raises(ValueError, match=r"latin\.csv: expected UTF-8"):
        read_questions(tmp_path / "latin.csv")
    with pytest.raises(ValueError, match=r"test_qa\.json.*; or .*test\.csv.*found there: latin\.csv"):
        load_questions("msrvtt_qa", tmp_path, "test")
    with pytest.raises(ValueError, match="'msrvtt' has no questions; expected one of motion, msrvtt_qa, msvd_qa"):
        load_questions("msrvtt", tmp_path, "test")
    with pytest.raises(ValueError, match="msvd_qa has no split 'test_1k'; known: train, val, test"):
        load_questions("msvd_qa", tmp_path, "test_1k")
    with pytest.raises(ValueError, match=r"holds one split; only lines of a \.jsonl"):
        read_questions(write(tmp_path / "test.csv", CSV), "test")


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    path = tmp_path / "test.csv"
    path.write_text(CSV, encoding="utf-8-sig")
    assert len(read_questions(path).questions) == 3


@pytest.mark.parametrize("options", [("man",), ("man", "man", "boy"), ("girl", "boy")])
def test_options_are_distinct_and_hold_a_right_answer(options):
    with pytest.raises(ValueError, match=r"toy: 1 questions need two distinct options or more, .*: q1"):
        QASplit("toy", (Question("q1", Video("v", Path("v")), "who", ("man",), options),))


def test_splits_made_by_hand_are_checked():
    video = Video("v", Path("v"))
    for question, message in (
        (Question("q1", video, " ", ("man",)), "1 questions are empty: q1"),
        (Question("q1", video, "who", ()), "no answer or an empty one: q1"),
        (Question("q1", video, "who", ("man", "")), "no answer or an empty one: q1"),
    ):
        with pytest.raises(ValueError, match=f"toy: .*{message}"):
            QASplit("toy", (question,))


def test_vocabulary_is_by_frequency_then_alphabet_whatever_the_order():
    answers = ["b", "c", "a", "c", "a", "d", "d", "d"]
    assert answer_vocabulary(split(*answers)) == ("d", "a", "c", "b")
    assert answer_vocabulary(split(*reversed(answers)), 2) == ("d", "a")
    assert answer_vocabulary(split(*answers), 99) == ("d", "a", "c", "b")
    with pytest.raises(ValueError, match="got size=0"):
        answer_vocabulary(split("a"), 0)


def test_coverage_counts_questions_with_a_known_answer():
    assert coverage(("a", "b"), split("a", "a", "c", "b")) == 75
    assert coverage((), split("a")) == 0
    several = QASplit("toy", (Question("q", Video("v", Path("v")), "who", ("x", "a")),))
    assert coverage(["a"], several) == 100


def test_vocabulary_files(tmp_path):
    for name, content in (("a.json", ["man", "ice cream"]), ("a.txt", "man\nice cream\n")):
        assert read_vocabulary(write(tmp_path / name, content)) == ("man", "ice cream")
    for name, content, message in (
        ("a.json", {"man": 0}, "expected a list of answers"),
        ("a.json", [], "expected a list of answers that is not empty"),
        ("a.json", ["man", 3], "1 answers are empty or no text: 3"),
        ("a.txt", "man\n\nboy\n", "1 answers are empty"),
        ("a.txt", "man\nboy\nman", "1 answers occur more than once: man"),
    ):
        with pytest.raises(ValueError, match=rf"a\.\w+: {message}"):
            read_vocabulary(write(tmp_path / name, content))
