"""Saved folders of every kind, deterministic damage to their files, and what loading makes of it.

PYTHONPATH=.:tests python tests/tamper.py [KIND ...] [--bare]    counts it, with manifests or without
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from integrations import tiny
from tasks import qa_runs, umt_runs
from tasks.llm_models import tiny_llm_qa, write_llm
from towers import TINY, tempme_schedule, tiny_frontend

from tempme_vl import VisualFrontend, create_frontend
from tempme_vl.integrations import compress, load_compressed
from tempme_vl.tasks.qa import create_qa_model, load_qa_model
from tempme_vl.tasks.retrieval import create_retrieval_model, load_retrieval_model
from tempme_vl.tasks.videollm import create_video_llm, load_video_llm

HANGS = 20  # seconds
MANIFEST = "manifest.json"
OPTIONS: dict[str, Any] = {"r": 2, "merge_layers": (2, 4), "merge_frames": (2, 3)}
OPTIONS |= {"cross_percent": 40, "intra_percent": 20}


@dataclass(frozen=True)
class Kind:
    """How a folder is made, loaded, and saved again."""

    make: Callable[[Path], None]
    load: Callable[[Path], Any]
    save: Callable[[Any, Path], None] = lambda model, folder: model.save_pretrained(folder)


def _hf(folder: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=8)
    with tempfile.TemporaryDirectory() as source:
        transformers.CLIPVisionModel(config).save_pretrained(source)
        create_frontend(f"hf:{source}", "default", method="tome", num_frames=4, r=1).save_pretrained(folder)


def _timm(folder: Path) -> None:
    name = "timm:test_vit"
    create_frontend(name, method="tome", num_frames=4, r=1).save_pretrained(folder)


def _retrieval(folder: Path) -> None:
    create_retrieval_model(TINY, num_frames=6, clip_position_std=0.2, **OPTIONS).save_pretrained(folder)


def _llm(folder: Path, **options: Any) -> None:
    source = folder.parent / f"{folder.name}-source"
    write_llm(source)
    tiny_llm_qa(source, **options).save_pretrained(folder)


def _lora(folder: Path) -> None:
    source = folder.parent / f"{folder.name}-source"
    write_llm(source)
    torch.manual_seed(0)
    model = create_qa_model(TINY, head="llm", llm=str(source), method="none", num_frames=6, max_words=24, lora_rank=4)
    model.save_pretrained(folder)


def _compressed(name: str, folder: Path) -> None:
    if name == "VideoLlava":
        options: dict[str, Any] = {"r": 1, "merge_layers": (2,), "merge_frames": (2,)}
        options |= {"cross_percent": 40, "intra_percent": 20}
    else:
        options = {"merge_frames": (2,)}
    from integrations import tiny_post

    build = tiny.build if name == "VideoLlava" else tiny_post.build
    compress(*build(name), "tempme", tiny.FRAMES, clip_position_std=0.3, **options).save_pretrained(folder)


def _video_llm(folder: Path) -> None:
    source = folder.parent / f"{folder.name}-source"
    model, processor = tiny.build("VideoLlava")
    model.save_pretrained(source)
    processor.save_pretrained(source)
    torch.manual_seed(0)
    options: dict[str, Any] = {"r": 1, "merge_layers": (2,), "merge_frames": (2,)}
    options |= {"cross_percent": 40, "intra_percent": 20}
    compressed = compress(model, processor, "tempme", tiny.FRAMES, clip_position_std=0.3, **options)
    create_video_llm(compressed, 4, source=str(source)).save_pretrained(folder)


KINDS: dict[str, Kind] = {
    "frontend": Kind(
        lambda folder: tiny_frontend(tempme_schedule()).save_pretrained(folder), VisualFrontend.from_pretrained
    ),
    "frontend-umt": Kind(
        lambda folder: qa_runs.tiny_tower("tome", "joint").save_pretrained(folder), VisualFrontend.from_pretrained
    ),
    "frontend-hf": Kind(_hf, VisualFrontend.from_pretrained),
    "frontend-timm": Kind(_timm, VisualFrontend.from_pretrained),
    "retrieval": Kind(_retrieval, load_retrieval_model),
    "umt-retrieval": Kind(lambda folder: umt_runs.tiny().save_pretrained(folder), load_retrieval_model),
    "qa-classifier": Kind(lambda folder: qa_runs.tiny_qa("classifier").save_pretrained(folder), load_qa_model),
    "qa-decoder": Kind(
        lambda folder: qa_runs.tiny_qa("decoder", answers=qa_runs.ANSWERS, rule="likelihood").save_pretrained(folder),
        load_qa_model,
    ),
    "qa-llm": Kind(_llm, load_qa_model),
    "qa-lora": Kind(_lora, load_qa_model),
    "compressed": Kind(partial(_compressed, "VideoLlava"), load_compressed),
    "compressed-behind": Kind(partial(_compressed, "InternVL"), load_compressed),
    "video-llm": Kind(_video_llm, load_video_llm),
}


@dataclass(frozen=True)
class Mutation:
    """A change to one file of a folder."""

    name: str
    file: str
    apply: Callable[[Path], None]  # given the file


# ---- damage


def mutations(folder: Path, seed: int = 0, values: int = 12) -> Iterator[Mutation]:
    """Damage to every file of a folder, always the same.

    Args:
        values: places of a JSON file that are changed, and values that are put there, at most.
    """
    random_ = random.Random(seed)
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.suffix == ".md":
            continue
        name = path.relative_to(folder).as_posix()
        data = path.read_bytes()
        yield Mutation("deleted", name, lambda file: file.unlink())
        yield Mutation("a folder", name, _make_folder)
        for what, changed in _bytes(data, random_):
            yield Mutation(what, name, partial(_write, data=changed))
        if path.suffix == ".json":
            for what, text in _json(data.decode(), random_, values):
                yield Mutation(what, name, partial(_write, data=text.encode()))
        elif path.suffix == ".safetensors":
            for what, changed in _safetensors(data, random_):
                yield Mutation(what, name, partial(_write, data=changed))
        elif path.suffix == ".txt":
            for what, changed in _lines(data):
                yield Mutation(what, name, partial(_write, data=changed))
    yield Mutation("another index", "model.safetensors.index.json", partial(_write, data=b'{"weight_map": {}}'))
    yield Mutation("another adapter", "adapter/adapter_config.json", partial(_write, data=b"{}"))


def _make_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _write(file: Path, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


def _bytes(data: bytes, random_: random.Random) -> Iterator[tuple[str, bytes]]:
    yield "emptied", b""
    yield "cut in half", data[: len(data) // 2]
    yield "its last byte cut", data[:-1]
    yield "a byte more", data + b"\0"
    yield "zeros", bytes(len(data))
    yield "its end zeros", data[: len(data) // 2] + bytes(len(data) - len(data) // 2)
    for _ in range(4):
        place, bit = random_.randrange(len(data)), random_.randrange(8)
        yield f"bit {bit} of byte {place} flipped", data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


_VALUES = (
    *("-1", "0", "7", "1000000000", "9223372036854775808", "1e400", "NaN", "-Infinity", "0.5", "true", "null"),
    *('"12"', '""', '"x"', "[]", "{}", "[[]]", '"\\ud800"'),
)


def _json(text: str, random_: random.Random, values: int) -> Iterator[tuple[str, str]]:
    content = json.loads(text)
    yield "other spacing", json.dumps(content, indent=5)
    yield "deep nesting", "[" * 100_000
    for whole in ("[]", "null", '"x"', "{}", "3"):
        yield f"replaced by {whole}", whole
    places = list(_places(content))
    if isinstance(content, dict):
        key, value = next(iter(content.items()))
        yield "a key twice", json.dumps(content)[:-1] + f", {json.dumps(key)}: {json.dumps(value)}}}"
    # the first ones always, since they are what the model is; of long files some of the rest
    chosen = places if len(places) <= values else places[:3] + random_.sample(places[3:], values - 3)
    for place in chosen:
        for value in random_.sample(_VALUES, min(values, len(_VALUES))):
            marked = copy.deepcopy(content)
            _at(marked, place[:-1])[place[-1]] = "\0here"
            yield f"{_named(place)} = {value}", json.dumps(marked).replace('"\\u0000here"', value)
        removed = copy.deepcopy(content)
        del _at(removed, place[:-1])[place[-1]]
        yield f"{_named(place)} gone", json.dumps(removed)
    for place in [(), *(place for place in chosen if isinstance(_at(content, place), dict))]:
        more = copy.deepcopy(content)
        if isinstance(_at(more, place), dict):
            _at(more, place)["surprise"] = 1
            yield f"{_named(place)} with a further key", json.dumps(more)


def _named(place: tuple[Any, ...]) -> str:
    return ".".join(map(str, place)) or "all"


def _places(content: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*place, key)
        yield from _places(value, (*place, key))


def _at(content: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        content = content[key]
    return content


def _safetensors(data: bytes, random_: random.Random) -> Iterator[tuple[str, bytes]]:
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]

    def packed(header: Any, body: bytes = body) -> bytes:
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + body

    yield "header written again", packed(header)
    for what in (0, 1, length - 1, length + 1, len(data), 1 << 40, (1 << 64) - 1):
        yield f"header of {what} bytes", what.to_bytes(8, "little") + data[8:]
    yield "header is a list", packed([])
    names = [name for name in header if name != "__metadata__"]
    for name in random_.sample(names, min(3, len(names))):
        rest = {other: value for other, value in header.items() if other != name}

        def changed(entry: dict[str, Any], rest: dict[str, Any] = rest, name: str = name) -> dict[str, Any]:
            return {**rest, name: entry}

        entry = header[name]
        start, end = entry["data_offsets"]
        yield f"{name} as I32", packed(changed({**entry, "dtype": "I32"}))
        yield f"{name} as F16", packed(changed({**entry, "dtype": "F16"}))
        yield f"{name} as X9", packed(changed({**entry, "dtype": "X9"}))
        yield f"{name} flat", packed(changed({**entry, "shape": [-1]}))
        yield f"{name} longer", packed(changed({**entry, "shape": [1 << 40]}))
        yield f"{name} turned", packed(changed({**entry, "shape": [*entry["shape"], 1]}))
        yield f"{name} beyond the end", packed(changed({**entry, "data_offsets": [start, end + len(body)]}))
        yield f"{name} backwards", packed(changed({**entry, "data_offsets": [end, start]}))
        yield f"{name} elsewhere", packed(changed({**entry, "data_offsets": [0, end - start]}))
        yield f"{name} gone", packed(rest)
        yield f"{name} renamed", packed({**rest, f"{name}x": entry})
        yield f"{name} of NaN", packed(header, body[:start] + b"\xff" * (end - start) + body[end:])
    sizes = {name: tuple(header[name]["shape"]) for name in names}
    for first, second in [(a, b) for a in names for b in names if a < b and sizes[a] == sizes[b]][:2]:
        yield f"{first} and {second} swapped", packed({**header, first: header[second], second: header[first]})
    more = {"dtype": "F32", "shape": [1], "data_offsets": [len(body), len(body) + 4]}
    yield "a tensor more", packed({**header, "surprise": more}, body + bytes(4))


def _lines(data: bytes) -> Iterator[tuple[str, bytes]]:
    lines = data.split(b"\n")
    yield "a line less", b"\n".join(lines[:2] + lines[3:])
    yield "the last line less", b"\n".join(lines[:-2] + lines[-1:])
    yield "a line twice", b"\n".join(lines[:3] + lines[2:])
    yield "two lines swapped", b"\n".join([*lines[:5], lines[6], lines[5], *lines[7:]])
    yield "no UTF-8", b"\xff" + data[1:]
    yield "CRLF", data.replace(b"\n", b"\r\n")


# ---- what becomes of it


@dataclass(frozen=True)
class Verdict:
    """typed: a ValueError that names the file; unnamed: one that does not; untyped, hang; same, other: it loads."""

    kind: str
    mutation: Mutation
    said: str = ""


def content(kind: Kind, model: Any, name: str) -> dict[str, bytes]:
    """All that a model is: the files that it is saved as."""
    with tempfile.TemporaryDirectory() as folder:
        kind.save(model, Path(folder) / name)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.name != MANIFEST)
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def judge(kind: Kind, pristine: Path, damaged: Path, mutation: Mutation, wanted: dict[str, bytes]) -> Verdict:
    """Damages a copy and loads it."""
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(pristine, damaged)
    mutation.apply(damaged / mutation.file)
    signal.signal(signal.SIGALRM, _late)
    signal.setitimer(signal.ITIMER_REAL, HANGS)
    try:
        model = kind.load(damaged)
    except TimeoutError:
        return Verdict("hang", mutation)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        if not isinstance(error, ValueError) or isinstance(error, json.JSONDecodeError | UnicodeError):
            return Verdict("untyped", mutation, said)
        named = Path(mutation.file).name in str(error)
        return Verdict("typed" if named else "unnamed", mutation, said)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        found = content(kind, model, damaged.name)
    except ValueError as error:  # transformers takes settings that it refuses to write
        return Verdict("other", mutation, f"loads, and cannot be saved: {error}")
    differing = [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]
    return Verdict("other" if differing else "same", mutation, ", ".join(sorted(differing)))


def _late(*_: object) -> None:
    raise TimeoutError


def tamper(name: str, folder: Path, bare: bool = False, part: int = 1) -> list[Verdict]:
    """Tries the damage on one kind of folder.

    Args:
        bare: without a manifest, as older versions wrote folders.
        part: every so manieth mutation alone.
    """
    kind, pristine = KINDS[name], folder / name
    kind.make(pristine)
    if bare:
        (pristine / MANIFEST).unlink(missing_ok=True)
    wanted = content(kind, kind.load(pristine), name)
    chosen = [m for number, m in enumerate(mutations(pristine)) if number % part == 0]
    (folder / "damaged").mkdir()
    return [judge(kind, pristine, folder / "damaged" / name, mutation, wanted) for mutation in chosen]


def _main() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    bare, names = "--bare" in sys.argv, [name for name in sys.argv[1:] if not name.startswith("-")]
    total: Counter[str] = Counter()
    part = next((int(word.removeprefix("--part=")) for word in sys.argv if word.startswith("--part=")), 1)
    for name in names or KINDS:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            verdicts = tamper(name, Path(folder), bare, part)
        counts = Counter(verdict.kind for verdict in verdicts)
        total += counts
        print(f"{name:20}{len(verdicts):6} {dict(counts)} {time.perf_counter() - start:.0f} s", flush=True)
        for verdict in verdicts:
            if verdict.kind != "typed" and "-v" in sys.argv:
                m = verdict.mutation
                print(f"    {verdict.kind}: {m.file}: {m.name[:80]}: {verdict.said[:160]!r}", flush=True)
    print(f"{'all':20}{sum(total.values()):6} {dict(total)}")


if __name__ == "__main__":
    _main()
