"""Small annotation files in every layout that is read, and ways to damage them.

`damage` says what must become of each: "refuse", "same" (read as before), or "any": whatever is taken must be whole.
The rules of what is right stand here once more, in other words than in the readers.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tempme_vl.data import jsonl, videoqa
from tempme_vl.data.datasets import Source, load_questions, load_split
from tempme_vl.data.splits import RetrievalSplit
from tempme_vl.data.videoqa import QASplit

Node = tuple[Any, ...]  # the way to a value inside a JSON document: keys and indices
WORDS = (
    "a",
    "dog",
    "runs",
    "over",
    "the",
    "wide",
    "field,",
    "while",
    "two",
    "men",
    "watch;",
    "café",
    "犬",
    "it's",
    "5",
)


def texts(count: int, length: int = 6) -> list[str]:
    return [" ".join(WORDS[(3 * i + k) % len(WORDS)] for k in range(length)) + f" {i}" for i in range(count)]


def table(*rows: tuple[object, ...]) -> bytes:
    stream = io.StringIO()
    # Python 3.10 writes no NUL: another character stands for it
    named = [[str(field).replace("\0", "\ue000") for field in row] for row in rows]
    csv.writer(stream, lineterminator="\n").writerows(named)
    return stream.getvalue().replace("\ue000", "\0").encode()


def lines(*entries: dict[str, Any]) -> bytes:
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode()


def document(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


@dataclass(frozen=True)
class Case:
    """A reader and the files it needs. `kinds`: what the values are that it reads, the way's indices as "*"."""

    files: dict[str, bytes]
    read: Callable[[Path], Any]
    kinds: dict[Node, str] = field(default_factory=dict)
    id_column: int = 0  # of the csv
    caption_a_row: bool = False  # of the csv, and not a video or a question


SENTENCES = texts(6)
MSRVTT = document(
    {
        "info": {"year": "2016"},
        "videos": [{"video_id": f"video{i}", "id": i, "split": "test" if i > 2 else "train"} for i in range(5)],
        "sentences": [{"caption": texts(9)[k], "video_id": f"video{k % 5}", "sen_id": k} for k in range(9)],
    }
)
OF_MSRVTT = {
    (): "object",
    ("videos",): "list",
    ("videos", "*"): "object",
    ("videos", "*", "video_id"): "file id",
    ("sentences",): "list",
    ("sentences", "*"): "object",
    ("sentences", "*", "video_id"): "file id",
    ("sentences", "*", "caption"): "text",
    ("sentences", "*", "sen_id"): "id",
}
OF_CLIPS = {
    ("*",): "object",
    ("*", "file"): "path",
    ("*", "start"): "seconds or none",
    ("*", "end"): "seconds or none",
    ("*", "split"): "id or none",
    ("*", "id"): "id",
}
OF_QA = {
    (): "list",
    ("*",): "object",
    ("*", "question"): "text",
    ("*", "answer"): "text",
    ("*", "id"): "id",
    ("*", "video_id"): "file id",
}


def _qa(dataset: str) -> Callable[[Path], QASplit]:
    return lambda root: load_questions(dataset, root, "test")


CASES: dict[str, Case] = {
    "msrvtt/test_1k": Case(
        {
            "MSRVTT_JSFUSION_test.csv": table(
                ("key", "vid_key", "video_id", "sentence"),
                *((f"ret{i}", f"msr{i}", f"video{i}", text) for i, text in enumerate(SENTENCES)),
            )
        },
        lambda root: load_split("msrvtt", root, "test_1k"),
        id_column=2,
    ),
    "msrvtt/train_9k": Case(
        {"MSRVTT_data.json": MSRVTT, "MSRVTT_train.9k.csv": table(("video_id",), ("video0",), ("video2",))},
        lambda root: load_split("msrvtt", root, "train_9k"),
        OF_MSRVTT,
    ),
    "msrvtt/test_full": Case(
        {"MSRVTT_data.json": MSRVTT},
        lambda root: load_split("msrvtt", root, "test_full"),
        {**OF_MSRVTT, ("videos", "*", "split"): "mark"},
    ),
    "didemo/csv": Case(
        {
            "didemo_test_label.tmass.csv": table(
                ("success", "video_path", "starts", "ends", "text", "formatted_data"),
                *((True, f"/all/{i}@N_{i}.mov", "[0]", "[31]", text, "x.pth") for i, text in enumerate(SENTENCES)),
                (True, "/all/9@N_9.mp4", "[0]", "[31]", "two lines,\n as the public file has some", "x.pth"),
            )
        },
        lambda root: load_split("didemo", root, "test"),
        id_column=1,
    ),
    "didemo/json": Case(
        {
            "test_data.json": document(
                [
                    {"video": f"{i // 2}@N_{i}.mov", "description": text, "times": [[0, 1]], "annotation_id": i}
                    for i, text in enumerate(SENTENCES)
                ]
            )
        },
        lambda root: load_split("didemo", root, "test"),
        {
            (): "list",
            ("*",): "object",
            ("*", "video"): "text",
            ("*", "description"): "text",
            ("*", "annotation_id"): "id",
        },
    ),
    "didemo/jsonl": Case(
        {"test.jsonl": lines(*({"clip_name": f"{i // 2}@N_{i // 2}", "caption": t} for i, t in enumerate(SENTENCES)))},
        lambda root: load_split("didemo", root, "test"),
        {("*",): "object", ("*", "clip_name"): "text", ("*", "caption"): "text"},
    ),
    "condensed_movies": Case(
        {
            "train_val_challf0.csv": table(
                ("year", "videoid", "split", "caption"),
                *((2011, f"-x{i}", "val", text) for i, text in enumerate(SENTENCES)),
            )
        },
        lambda root: load_split("condensed_movies", root, "val"),
        id_column=1,
        caption_a_row=True,
    ),
    "activitynet/list": Case(
        {
            "val.json": document(
                [{"video": f"v_{i}.mp4", "caption": [text, "It ends."]} for i, text in enumerate(SENTENCES)]
            )
        },
        lambda root: load_split("activitynet", root, "val_1"),
        {("*",): "object", ("*", "video"): "text", ("*", "caption"): "texts"},
    ),
    "activitynet": Case(
        {
            "val_1.json": document(
                {
                    f"v_{i}": {"duration": 20.5 + i, "timestamps": [[0, 9], [8.5, 20]], "sentences": [text, "It ends."]}
                    for i, text in enumerate(SENTENCES)
                }
            )
        },
        lambda root: load_split("activitynet", root, "val_1"),
        {(): "object", ("*",): "object", ("*", "duration"): "length", ("*", "sentences"): "texts"},
    ),
    "msvd": Case(
        {
            "captions_msvd.json": document({f"v_{i}_9": [text, "a man sings"] for i, text in enumerate(SENTENCES)}),
            "test_list.txt": b"v_0_9\nv_3_9\nv_4_9\n",
        },
        lambda root: load_split("msvd", root, "test"),
        {(): "object", ("*",): "texts"},
    ),
    "lsmdc": Case(
        {
            "LSMDC16_challenge_1000_publictect.csv": "".join(
                f"30{i}_FILM_00.23.23.000-00.23.28.886\t00.23.23.000\t00.23.28.886\t00.23.23.000\t00.23.28.886\t{text}\n"
                for i, text in enumerate(SENTENCES)
            ).encode()
        },
        lambda root: load_split("lsmdc", root, "test"),
    ),
    "jsonl": Case(
        {
            "mine.jsonl": lines(
                {"file": "a.mp4", "caption": SENTENCES[0], "split": "train", "start": 0, "end": 2.5},
                {"file": "sub/b.mp4", "captions": SENTENCES[1:3], "split": "train", "id": "b"},
                {"file": "c.mp4", "caption": SENTENCES[3], "split": "test", "start": 3},
            )
        },
        lambda root: jsonl.read_caption_lines(root / "mine.jsonl", root / "videos"),
        {**OF_CLIPS, ("*", "caption"): "text", ("*", "captions"): "texts"},
    ),
    "pairs": Case(
        {
            "a.json": document([{"path": f"a/{i}.mp4", "caption": text} for i, text in enumerate(SENTENCES)]),
            "b.json": document([{"image": "b/1.jpg", "caption": "a café"}, {"image": "b/2.PNG", "caption": "5 犬"}]),
        },
        lambda root: Source("pairs", None, root / "videos", root).captions(),
        {(): "list", ("*",): "object", ("*", "path"): "path", ("*", "image"): "path", ("*", "caption"): "text"},
    ),
    "jsonl questions": Case(
        {
            "mine.jsonl": lines(
                {"file": "a.mp4", "question": SENTENCES[0], "answer": "dog", "split": "train", "start": 0, "end": 2.5},
                {"file": "b.mp4", "question": "who", "answers": ["man", "boy"], "options": ["boy", "café"], "id": 7},
            )
        },
        lambda root: videoqa.read_question_lines(root / "mine.jsonl", root / "videos"),
        {
            **OF_CLIPS,
            ("*", "question"): "text",
            ("*", "answer"): "text",
            ("*", "answers"): "texts",
            ("*", "options"): "texts",
        },
    ),
    "msrvtt_qa/csv": Case(
        {
            "test.csv": table(
                ("video", "question", "answer", "qid", "type"),
                *((7010 + i, text, "man", 90 + i, 10) for i, text in enumerate(SENTENCES)),
            )
        },
        _qa("msrvtt_qa"),
    ),
    "msrvtt_qa/json": Case(
        {
            "test_qa.json": document(
                [
                    {"answer": "man", "category_id": None, "id": 90 + i, "question": text, "video_id": 7010 + i // 2}
                    for i, text in enumerate(SENTENCES)
                ]
            )
        },
        _qa("msrvtt_qa"),
        OF_QA,
    ),
    "msvd_qa": Case(
        {
            "test_qa.json": document(
                [
                    {"answer": "man", "id": 90 + i, "question": text, "video_id": 1 + i // 2}
                    for i, text in enumerate(SENTENCES)
                ]
            ),
            "youtube_mapping.txt": b"-4wsu_5_15 vid1\n-7KM_205_208 vid2\n-8y1_108_115 vid3\n",
        },
        _qa("msvd_qa"),
        OF_QA,
    ),
    "activitynet_qa": Case(
        {
            "test_q.json": document(
                [
                    {"video_name": f"1QI{i // 2}", "question": q, "question_id": f"v_{i}"}
                    for i, q in enumerate(SENTENCES)
                ]
            ),
            "test_a.json": document([{"answer": "no", "type": 3, "question_id": f"v_{i}"} for i in range(6)]),
        },
        _qa("activitynet_qa"),
        {
            (): "list",
            ("*",): "object",
            ("*", "question"): "text",
            ("*", "answer"): "text",
            ("*", "question_id"): "id",
            ("*", "video_name"): "file id",
        },
    ),
    "vocabulary/json": Case(
        {"words.json": document(["man", "ice cream", "café"])},
        lambda root: videoqa.read_vocabulary(root / "words.json"),
        {(): "list", ("*",): "text"},
    ),
    "vocabulary/txt": Case(
        {"words.txt": "man\nice cream\ncafé\n".encode()}, lambda root: videoqa.read_vocabulary(root / "words.txt")
    ),
}


# ---- what may be taken


def is_fine_text(value: object) -> bool:
    if not isinstance(value, str) or not value.strip():
        return False
    codes = set(map(ord, set(value) - set("\t\n\r")))
    return not any(code < 32 or code in (127, 0xFEFF) or 0xD800 <= code < 0xE000 for code in codes)


def is_fine_id(value: object, file: bool = False) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | str):
        return False
    if isinstance(value, int):
        return -(2**63) < value < 2**63
    clean = is_fine_text(value) and value == value.strip() and len(value.split("\n")) == 1
    return clean and not (file and (set("/\\\ufeff") & set(value) or value in (".", "..")))


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


FINE: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "list": lambda value: isinstance(value, list),
    "text": is_fine_text,
    "texts": lambda value: isinstance(value, list) and bool(value) and all(map(is_fine_text, value)),
    "id": is_fine_id,
    "id or none": lambda value: value is None or is_fine_id(value),
    "file id": lambda value: is_fine_id(value, file=True),
    "path": lambda value: is_fine_text(value) and value == value.strip() and ".." not in value.split("/"),
    "mark": lambda value: value in ("train", "validate", "test"),
    "length": lambda value: is_number(value) and 0 < value < 1e7,
    "seconds or none": lambda value: value is None or (is_number(value) and 0 <= value < 1e7),
}


def check_whole(case: Case, files: dict[str, bytes], result: Any) -> None:
    """What was read of damaged files has nothing wrong in it, and no row is lost."""
    if not isinstance(result, RetrievalSplit | QASplit):
        assert result and all(map(is_fine_text, result)) and len(set(result)) == len(result)
        return
    if isinstance(result, RetrievalSplit):
        videos, said = list(result.videos), [text for captions in result.captions for text in captions]
        ids = [video.video_id for video in videos]
        assert all(result.captions)
    else:
        videos, said = [q.video for q in result.questions], [q.question for q in result.questions]
        said += [text for q in result.questions for text in (*q.answers, *q.options)]
        ids = [q.question_id for q in result.questions]
    assert len(set(ids)) == len(ids) > 0
    assert all(is_fine_id(i) for i in ids) and all(map(is_fine_text, said))
    for video in videos:
        assert is_fine_id(video.video_id) and ".." not in video.path.parts
        for seconds in (video.start, video.end):
            assert seconds is None or (math.isfinite(seconds) and 0 <= seconds < 1e7)
        assert video.end is None or video.end > (video.start or 0)
    for name, content in files.items():
        if name.endswith(".csv") and "LSMDC" not in name:
            text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
            rows = sum(bool(line) for line in text.split("\n")) - 1
            read = said if case.caption_a_row else ids
            assert len(read) + sum(text.count("\n") for text in said) == rows, f"{rows} rows of {name}"


# ---- damage


class Raw(str):
    """JSON as it is to be written."""


def dump(value: Any) -> str:
    if isinstance(value, Raw):
        return value
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {dump(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dump, value)) + "]"
    return json.dumps(value)


VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 5, 2.5, 10**400, math.nan, math.inf, -math.inf, 1e308, 2**63, Raw("1e999"), Raw("-1e-999")),
    *("", "  ", "x", " padded ", "\ud800", "a\0b", "\ufeffx", "a\x1b[0m", "../up", "a/b", "..", "\\\\host\\x", "10"),
    *([], {}, ["x"], [[]], [None], ["x", " "], ["x", 5], {"a": 1}),
    *(Raw("[" * 100_000 + "]" * 100_000), Raw("[" * 100_000), Raw("1" * 5000), Raw("nul"), Raw("'x'")),
)


def nodes(value: Any, way: Node = ()) -> Iterator[Node]:
    yield way
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from nodes(value[key], (*way, key))


def at(value: Any, way: Node) -> Any:
    for key in way:
        value = value[key]
    return value


def replaced(value: Any, way: Node, new: Any) -> Any:
    if not way:
        return new
    copy = value.copy()
    copy[way[0]] = replaced(value[way[0]], way[1:], new)
    return copy


def kind_of(case: Case, way: Node) -> str | None:
    for pattern, kind in case.kinds.items():
        if len(pattern) == len(way) and all(p in ("*", key) for p, key in zip(pattern, way, strict=True)):
            return kind
    return None


def damage_json(case: Case, name: str, content: bytes, rng: random.Random) -> tuple[bytes, str]:
    by_line = name.endswith(".jsonl")
    value = [json.loads(line) for line in content.splitlines()] if by_line else json.loads(content)
    way = rng.choice([way for way in nodes(value) if way or not by_line])
    old, expected = at(value, way), "any"
    how = rng.randrange(4)
    if how == 0 and isinstance(old, dict) and old:
        key = rng.choice(list(old))
        pairs = [*old.items(), (key, rng.choice((old[key], None, "other")))]
        rng.shuffle(pairs)
        new: Any = Raw("{" + ", ".join(f"{json.dumps(k)}: {dump(v)}" for k, v in pairs) + "}")
        expected = "refuse"
    elif how == 1 and isinstance(old, dict | list) and old:
        new = old.copy()
        new.pop(rng.choice(list(old) if isinstance(old, dict) else range(len(old))))
    elif how == 2 and isinstance(old, list) and old and not (by_line and not way):
        new = [*old, old[rng.randrange(len(old))]]
    else:
        new = rng.choice(VALUES)
        no_json = isinstance(new, Raw) and new not in ("1e999", "-1e-999")
        constant = isinstance(new, float) and not math.isfinite(new)
        kind = kind_of(case, way)
        fine = kind is None or (FINE[kind](json.loads(new) if isinstance(new, Raw) and not no_json else new))
        if no_json or constant or not fine:
            expected = "refuse"
    value = replaced(value, way, new)
    text = "".join(dump(line) + "\n" for line in value) if by_line and isinstance(value, list) else dump(value)
    return text.encode("utf-8", "surrogatepass"), expected


def damage_csv(case: Case, name: str, content: bytes, rng: random.Random) -> tuple[bytes, str]:
    rows = list(csv.reader(io.StringIO(content.decode(), newline="")))
    number = rng.randrange(1, len(rows))
    row, width = rows[number], len(rows[0])
    how = rng.randrange(7)
    if how == 0:
        row.append("more")
    elif how == 1:
        row.pop(rng.randrange(width))
        if not row:
            return table(*rows), "any"  # an empty line
    elif how == 2:
        rows.insert(rng.randrange(1, len(rows) + 1), row.copy())
    elif how == 3:
        rows.insert(rng.randrange(1, len(rows) + 1), rows[0].copy())
    elif how == 4:
        row[case.id_column] = rng.choice(("", " ", "..", "a\\b", "a\ufeff", "a\0", " video5", "a\x1b"))
    elif how == 5:
        rows[0][rng.randrange(width)] = rng.choice(rows[0]) if width > 1 else "other"
        return table(*rows), "any" if len(set(rows[0])) == width > 1 else "refuse"
    else:  # a field that begins with a quote, and perhaps a later one of the same column that ends with one
        text = table(*rows).decode().split("\n")
        fields = text[number].split(",")
        column = rng.randrange(len(fields))
        if fields[column].startswith(('"', " ")) or '"' in text[number]:
            return content, "same"
        fields[column] = '"' + fields[column]
        text[number] = ",".join(fields)
        for later in range(number + 1, len(text)):
            fields = text[later].split(",")
            if rng.random() < 0.5 and len(fields) == width and '"' not in text[later]:
                fields[column] += '"'
                text[later] = ",".join(fields)
                break
        return "\n".join(text).encode(), "refuse"
    return table(*rows), "refuse"


def damage_bytes(case: Case, name: str, content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Without an eye for what is inside."""
    data, place = bytearray(content), rng.randrange(len(content))
    how = rng.randrange(12)
    if how == 0:
        data[place] ^= 1 << rng.randrange(8)
    elif how == 1:
        del data[place:]  # a download that was cut off
    elif how == 2:
        del data[place : place + rng.randrange(1, 20)]
    elif how == 3:
        data[place:place] = data[place : place + rng.randrange(1, 40)]
    elif how == 4:
        data[place:place] = rng.choice((b'"', b"'", b",", b"\n", b"\r", b"\t", b"\\", b"{", b"[", b"}", b" "))
    elif how == 5:
        data[place:place] = rng.choice((b"\0", b"\xff", b"\x1a", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\x1b"))
        return bytes(data), "any" if place == 0 else "refuse"
    elif how == 6:
        return b"\xef\xbb\xbf" + content, "same"
    elif how == 7:
        return content.replace(b"\n", b"\r\n"), "same"
    elif how == 8:
        return content.decode().encode(rng.choice(("utf-16", "utf-16-le", "utf-32", "utf-16-be"))), "refuse"
    elif how == 9:
        latin = content.decode().replace("犬", "é")
        return latin.encode("latin-1"), "refuse" if "é" in latin else "same"
    elif how == 10:
        return rng.choice((b"", b"\n", b" ", b"\0" * 64, b"\x80\x04K\x01.", b"PK\x03\x04", rng.randbytes(64))), "refuse"
    else:
        for _ in range(rng.randrange(1, 9)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data), "any"


def damage(case: Case, seed: int) -> tuple[dict[str, bytes], str, str]:
    """The files with one of them damaged, its name, and what must become of it."""
    rng = random.Random(seed)
    name = rng.choice(list(case.files))
    content = case.files[name]
    ways = [damage_bytes]
    if name.endswith((".json", ".jsonl")):
        ways += [damage_json, damage_json]
    if name.endswith(".csv") and "LSMDC" not in name:
        ways += [damage_csv, damage_csv]
    damaged, expected = rng.choice(ways)(case, name, content, rng)
    return {**case.files, name: damaged}, name, expected


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).write_bytes(content)


def tried(case: Case, root: Path, seed: int, typed: type[Exception], whole: Any) -> str:
    """What becomes of one damaged file: "refused" or "read" where that is right, else what is wrong.

    `root` holds the case's files, of which `whole` is read.
    """
    files, name, expected = damage(case, seed)
    write(root, {name: files[name]})
    try:
        result = case.read(root)
    except typed as error:
        if not any(os.fspath(root / other) in str(error) for other in files):
            return f"unnamed: {name}: {error}"
        return f"wrongly refused: {error}" if expected == "same" else "refused"
    except Exception as error:
        return f"untyped: {name}: {type(error).__name__}: {error}"
    finally:
        if len(files) > 1:
            write(root, {name: case.files[name]})
    if expected == "refuse":
        return f"silently accepted: {name}"
    if expected == "same" and result != whole:
        return f"silently accepted: {name}: not as before"
    try:
        check_whole(case, files, result)
    except AssertionError as error:
        return f"silently accepted: {name}: {error}"
    return "read"
