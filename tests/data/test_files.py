"""The readers of text, JSON, JSON lines and csv: what is refused, and that the message has the file and the place."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tempme_vl.data.datasets import load_split
from tempme_vl.data.files import (
    AnnotationError,
    as_file_id,
    as_id,
    as_seconds,
    as_text,
    as_texts,
    csv_rows,
    errors_at,
    json_lines,
    load_json,
    read_lines,
    read_text,
    shown,
)
from tempme_vl.data.videoqa import read_questions


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_byte_order_marks_and_line_ends_are_no_part_of_the_text(tmp_path, encoding, end):
    path = write(tmp_path / "a.txt", end.join(["café\u2028犬", "", "b"]).encode(encoding))
    assert read_text(path) == "café\u2028犬\n\nb"
    assert list(read_lines(path)) == [(f"{path}, line 1", "café\u2028犬"), (f"{path}, line 3", "b")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\nb\ncafé".encode("latin-1"), "expected UTF-8 text; line 3: "),
        ("a\nb".encode("utf-16"), "expected UTF-8 text; line 1: "),
        ("a\nb".encode("utf-16-le"), r"expected UTF-8 text; line 1 holds the character '\\x00'"),
        ("a\n\x1bb", r"expected UTF-8 text; line 2 holds the character '\\x1b'"),
        ("a\n\ufeffb", r"expected UTF-8 text; line 2 holds the character '\\ufeff'"),
    ],
)
def test_what_is_no_utf8_text_is_refused_with_its_line(tmp_path, content, message):
    path = write(tmp_path / "a.txt", content)
    with pytest.raises(AnnotationError, match=rf"a\.txt: {message}"):
        read_text(path)


def irregular(path: Path, kind: str) -> str:
    """Makes it, and gives the words for it."""
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path is short
        try:
            socket.socket(socket.AF_UNIX).bind(path.name)
        finally:
            os.chdir(here)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "lost link":
        path.symlink_to(path.parent / "nowhere")
    elif kind == "circle":
        path.symlink_to(path)
    return {
        "folder": "expected a regular file; this is a folder",
        "pipe": "expected a regular file; this is a named pipe",
        "socket": "expected a regular file; this is a socket",
        "device": "expected a regular file; this is a device",
        "lost link": "a link to a file that does not exist",
        "circle": "Too many levels of symbolic links",
    }[kind]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "device", "lost link", "circle"])
@pytest.mark.parametrize("name", ["MSRVTT_JSFUSION_test.csv", "captions_msvd.json", "val_1.json", "a.jsonl"])
def test_what_is_no_regular_file_says_so_in_every_reader(tmp_path, kind, name):
    message = re.escape(name) + ".*: " + irregular(tmp_path / name, kind)
    (tmp_path / "test_list.txt").touch()
    with pytest.raises(AnnotationError, match=message):
        if name == "a.jsonl":
            read_questions(tmp_path / name)
        else:
            dataset, split = {"M": ("msrvtt", "test_1k"), "c": ("msvd", "test"), "v": ("activitynet", "val_1")}[name[0]]
            load_split(dataset, tmp_path, split)


def test_a_path_that_no_file_can_have_is_an_error_of_ours(tmp_path):
    for name in ("a" * 5000, "a\0b"):
        with pytest.raises(AnnotationError, match=r"File name too long|null"):
            read_text(tmp_path / name)


def test_a_file_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    path = write(tmp_path / "a.json", "{}")
    monkeypatch.setattr(Path, "read_bytes", refuse)  # whoever runs the tests may be allowed to read everything
    with pytest.raises(AnnotationError, match=r"a\.json: Permission denied"):
        load_json(path)


# ---- JSON


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1, "b": 2, "a": 1}', "1 keys occur more than once in one object: a"),
        ('[{"x": {"a": 1, "a": 2}}]', "1 keys occur more than once in one object: a"),
        ('{"a": NaN}', "NaN is no number of JSON"),
        ('{"a": -Infinity}', "-Infinity is no number of JSON"),
        ('{"a": ' + "[" * 100_000, "nested too deeply"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a": 1' + "0" * 5000 + "}", "4300"),
        ('{"a": 1}\n{"a": 2}', "Extra data"),
        ("", "Expecting value"),
        ('{"a": "b\nc"}', "Invalid control character"),
    ],
)
def test_json_that_is_not_whole_or_not_clear_is_refused(tmp_path, content, message):
    with pytest.raises(AnnotationError, match=rf"a\.json: .*{message}"):
        load_json(write(tmp_path / "a.json", content))


def test_json_lines_name_the_line(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"a": 1}\r\n\r\n{"a": "\u2028"}\r\n')
    assert list(json_lines(path)) == [(f"{path}, line 1", {"a": 1}), (f"{path}, line 3", {"a": "\u2028"})]
    for line, message in (
        ('{"a": 1, "a": 2}', "1 keys occur more than once in one object: a"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": ' + "[" * 100_000, "nested too deeply"),
        ('[{"a": 1}]', "expected a JSON object"),
        ('{"a": 1}{"a": 2}', "Extra data"),
    ):
        with pytest.raises(AnnotationError, match=rf"a\.jsonl, line 2: .*{message}"):
            list(json_lines(write(path, '{"a": 1}\n' + line)))


# ---- csv


HEADER = "key,video_id,sentence"


def rows(path: Path, *lines: str, **options) -> list[dict[str, str]]:
    return [row for _, row in csv_rows(write(path, "\n".join((HEADER, *lines)) + "\n"), **options)]


def test_rows_have_their_place_and_texts_their_commas_quotes_and_lines(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(HEADER + '\n1,v1,"a dog, a ""cat"""\n\n2,v2,it is 6" wide\n3,v3,"two\nlines"\n4,v4,b\n')
    found = list(csv_rows(path, ("sentence", "video_id")))
    assert [place.rpartition(" ")[2] for place, _ in found] == ["2", "4", "5", "7"]
    assert [row["sentence"] for _, row in found] == ['a dog, a "cat"', 'it is 6" wide', "two\nlines", "b"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["1,v1,a", "2,v2,a cat, a dog"], r"line 3: expected 3 columns, as the first line has; got 4 \(a text with a"),
        (["1,v1,a", "2,v2"], "line 3: expected 3 columns, as the first line has; got 2$"),
        (["1,v1,a", HEADER, "2,v2,b"], "line 3: the names of the columns again"),
        # a quote that is never closed, one before a letter, and two that take the rows between them
        (["1,v1,a", '2,v2,"b', "3,v3,c", "4,v4,d"], "after line 2: unexpected end of data; is there a stray quote"),
        (["1,v1,a", '2,v2,"b', '3,v3,"c"'], "after line 2: .* expected after .*; is there a stray quote"),
        (
            ["1,v1,a", '2,v2,"b', "3,v3,c", '4,v4,d"', "5,v5,e"],
            "line 3: the text of 'sentence' goes on .* a stray quote",
        ),
        (["1,v1,a", '2,"v2,b', '3,v3",c', "4,v4,d"], "line 3: the text of 'video_id' goes on .* a stray quote"),
    ],
)
def test_csv_rows_are_never_cut_or_swallowed(tmp_path, lines, message):
    with pytest.raises(AnnotationError, match=rf"a\.csv, {message}"):
        rows(tmp_path / "a.csv", *lines)


def test_long_texts_may_have_commas_on_every_line(tmp_path):
    text = "yes,\na man, a dog, a cat"
    assert rows(tmp_path / "a.csv", f'1,v1,"{text}"', line_breaks=True)[0]["sentence"] == text
    with pytest.raises(AnnotationError, match="a stray quote"):
        rows(tmp_path / "a.csv", f'1,v1,"{text}"')


def test_a_header_without_what_is_needed_shows_what_it_has(tmp_path):
    with pytest.raises(AnnotationError, match=r"a\.csv: expected the columns answer; found \['key', 'video_id', 's"):
        rows(tmp_path / "a.csv", columns=("answer",))
    path = write(tmp_path / "b.csv", "key;video_id;sentence\n1;v1;a\n")
    with pytest.raises(AnnotationError, match=r"found \['key;video_id;sentence'\]"):
        list(csv_rows(path, ("video_id",)))


# ---- values


@pytest.mark.parametrize("value", [None, 5, "", " \n", "a\0b", "\ufeffa", "\ud800", "a\x1b[0m", ["a"]])
def test_no_texts(value):
    with pytest.raises(ValueError, match="'caption' must be a text that is not empty; got "):
        as_text("caption", value)
    with pytest.raises(ValueError, match="'captions' must be a list of texts that are not empty; got "):
        as_texts("captions", ["fine", value])


def test_texts_stay_as_they_are():
    for text in (" a dog\n", "a\tb", "naïve\u2028 \u200d\x85", "👨‍👩‍👧"):
        assert as_text("caption", text) == text
        assert as_texts("captions", [text, "b"]) == (text, "b")
    for value in ("abc", (), [], {"a": 1}, None):
        with pytest.raises(ValueError, match="'captions' must be a list of texts"):
            as_texts("captions", value)


@pytest.mark.parametrize("value", [None, True, "1", -1, -0.5, float("nan"), float("inf"), 10**400, 1e7, [1]])
def test_no_times(value):
    with pytest.raises(ValueError, match=r"'start' must be a number of seconds, 0 or more and below 1e\+07; got "):
        as_seconds("start", value)


def test_times_are_seconds():
    assert [as_seconds("end", value) for value in (0, 2.5, 9_999_999)] == [0.0, 2.5, 9_999_999.0]


@pytest.mark.parametrize(
    "value", [None, False, 2.0, "", " ", " a", "a ", "a\nb", "\ufeffa", "\ud800", 2**63, 10**400, []]
)
def test_no_ids(value):
    for read in (as_id, as_file_id):
        with pytest.raises(ValueError, match="expected an id"):
            read(value)


def test_ids_of_files_lead_nowhere_else():
    assert [as_id(value) for value in ("a/b.mp4", 7, "-1", "Türkçe 1", "a..b")] == [
        "a/b.mp4",
        "7",
        "-1",
        "Türkçe 1",
        "a..b",
    ]
    assert as_file_id("3086_A_00.23.28.886") == "3086_A_00.23.28.886"
    for value in ("..", ".", "../a", "/etc/passwd", "a\\b", "a\u200bb", "a\xa0b"):
        with pytest.raises(ValueError, match="expected the name of a video file, without folders"):
            as_file_id(value)


def test_values_in_messages_are_short():
    for value in ("a" * 9999, [["a" * 999] * 99] * 99, 10**4000, {str(i): i for i in range(999)}, "\ud800" * 99):
        assert len(shown(value)) < 200 and shown(value).encode()


def test_an_error_gets_its_place_once():
    with pytest.raises(AnnotationError, match=r"^a, line 2: wrong$"), errors_at("outer"), errors_at("a, line 2"):
        raise ValueError("wrong")
    assert issubclass(AnnotationError, ValueError)


def test_reading_a_pipe_does_not_wait(tmp_path):
    """In a process of its own, since waiting for a pipe cannot be interrupted."""
    os.mkfifo(tmp_path / "words.json")
    code = f"from tempme_vl.data.videoqa import read_vocabulary; read_vocabulary({str(tmp_path / 'words.json')!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 1 and "words.json: expected a regular file; this is a named pipe" in run.stderr
