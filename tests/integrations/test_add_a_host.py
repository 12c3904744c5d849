"""Two hosts from outside of the package, as docs/add_a_host.md adds them: each a file and a line."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations import test_lmms_eval, tiny
from recipes.runs import assert_same_checkpoint, latest, losses, questions_of, start_recipe, write_lines
from safetensors.torch import load_file
from training.processes import exit_codes, start

import tempme_vl
from tempme_vl.data.motion import render_motion
from tempme_vl.data.rendered import write_video
from tempme_vl.integrations import HOSTS, Compressed, compress, load_compressed
from tempme_vl.integrations.tiny import tiny_host, tiny_names
from tempme_vl.integrations.videos import sample
from tempme_vl.recipes.options.videollm import VIDEOLLM
from tempme_vl.tasks.videollm import TRAINED_FILE, load_video_llm

PAGE = Path(__file__).parents[2] / "docs" / "add_a_host.md"
FRAMES = 4
OPTIONS: dict[str, dict[str, Any]] = {
    "Inside": {"r": 1, "merge_layers": (3, 4), "merge_frames": (2, 2), "cross_percent": 30, "intra_percent": 10},
    "Behind": {"merge_frames": (2, 2)},
}
ASK = "what is <video> ?"
each = pytest.mark.parametrize("name", OPTIONS)
tempme = test_lmms_eval.tempme  # the class that lmms-eval finds


def add(folder: Path) -> None:
    """The page's files, and its line for each."""
    blocks = re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE.read_text(), re.S)
    assert [name.capitalize() for name, _ in blocks] == list(OPTIONS)
    for file, text in blocks:
        (folder / f"{file}.py").write_text(text)
        name = file.capitalize()
        HOSTS.register(f"{name}ForConditionalGeneration", getattr(importlib.import_module(file), f"{name}Host"))


@pytest.fixture(autouse=True)
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "files").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "files")
    add(tmp_path / "files")
    yield
    for name in OPTIONS:
        HOSTS.unregister(f"{name}ForConditionalGeneration")
        del sys.modules[name.lower()]


def built(name: str) -> tuple[Any, Any]:
    model, processor = tiny_host(name, tiny.WORDS)
    return model.eval(), processor


def compressed_by(name: str, method: str = "tempme") -> Compressed:
    return compress(
        *built(name), method, FRAMES, clip_position_std=0.5, **(OPTIONS[name] if method == "tempme" else {})
    )


@torch.no_grad()
def logits(compressed: Compressed, video: Any) -> torch.Tensor:
    return compressed(**compressed.prepare(ASK, [video])).logits[:, -1]


@each
def test_it_is_found_and_without_merging_is_the_host_itself(name: str) -> None:
    assert f"{name}ForConditionalGeneration" in tempme_vl.HOSTS and name in tiny_names()
    model, processor = built(name)
    assert type(model).__name__ == f"{name}ForConditionalGeneration"
    video = tiny.video(0, FRAMES)
    with torch.no_grad():
        own = model(**processor(text=[ASK], videos=[video], return_tensors="pt")).logits[:, -1]
    compressed = compress(model, processor, "none", FRAMES)
    torch.testing.assert_close(logits(compressed, video), own, rtol=0, atol=1e-5)
    assert (logits(compressed, tiny.video(1, FRAMES)) - own).abs().max() > 1e-3


@each
def test_it_answers_counts_saves_and_loads(name: str, tmp_path: Path) -> None:
    compressed, video = compressed_by(name), tiny.video(0, FRAMES)
    costs, shown = compressed.host.costs(), compressed.describe()
    with torch.no_grad():
        (tokens,) = compressed.host.encode([sample(video, FRAMES)], [ASK])
    assert len(tokens.features) == costs.tokens < costs.native_tokens / 2 and costs.native_tokens == FRAMES * 17
    assert (costs.tower < costs.native_tower) == (name == "Inside")
    assert f"{name}ForConditionalGeneration, 4 frames" in shown and str(costs.tokens) in shown
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    inputs = compressed.prepare([ASK, "why <video> and <video>"], [video, video, tiny.video(1, FRAMES)])
    with torch.no_grad():
        ids = compressed.generate(**inputs, **options)
    assert compressed.answer(ASK, [video], **options) == compressed.tokenizer.batch_decode(
        ids[:1], skip_special_tokens=True
    )
    compressed.save_pretrained(tmp_path / "saved")
    again = load_compressed(tmp_path / "saved")
    assert type(again.model) is type(compressed.model) and again.host.config() == compressed.host.config()
    torch.testing.assert_close(logits(again, video), logits(compressed, video))
    loss = compressed(**compressed.prepare(ASK, [video], labels=["red dog"])).loss
    loss.backward()
    weights = dict(compressed.model.named_parameters()) | dict(compressed.merging.named_parameters())
    reached = {part for part, weight in weights.items() if weight.grad is not None and weight.grad.any()}
    assert any("video_tower" in part for part in reached) and any("language_model" in part for part in reached)
    assert (set(compressed.merging.state_dict()) <= reached) and bool(compressed.merging) == (name == "Inside")


@each
def test_lmms_eval_runs_it(name: str, tempme: Any, tmp_path: Path) -> None:
    write_video(tmp_path / "0.mp4", tiny.video(0, 12))
    model, processor = built(name)
    model.save_pretrained(tmp_path / "host")
    processor.save_pretrained(tmp_path / "host")
    made = [compress(model, processor, "tempme", FRAMES, **OPTIONS[name]), compressed_by(name)]
    made[1].save_pretrained(tmp_path / "compressed")
    options = {key: "/".join(map(str, v)) if isinstance(v, tuple) else v for key, v in OPTIONS[name].items()}
    answers = []
    for folder, given in (("host", {"num_frames": FRAMES, **options}), ("compressed", {})):
        lm = tempme(str(tmp_path / folder), 1, "cpu", prompt="{text} {video} ?", **given)
        assert type(lm.compressed.host).__name__ == f"{name}Host"
        lm.task_dict["t"] = {"test": [{"videos": [str(tmp_path / "0.mp4")]}]}
        (answer,) = lm.generate_until([test_lmms_eval.request("what is", {"max_new_tokens": 3}, 0)])
        answers.append(answer)
    expected = [one.answer(ASK, tmp_path / "0.mp4", max_new_tokens=3, do_sample=False) for one in made]
    assert [[answer] for answer in answers] == expected and all(answers)


def train(folder: Path, arguments: list[str]) -> None:
    """The recipe with the page's hosts."""
    sys.path.insert(0, str(folder))
    add(folder)
    start_recipe(VIDEOLLM, arguments)


@pytest.mark.parametrize(
    ("name", "compared"),
    [("Inside", False), *(pytest.param(name, True, marks=pytest.mark.slow) for name in OPTIONS)],
)
def test_the_recipe_trains_resumes_and_exports_it(name: str, compared: bool, tmp_path: Path) -> None:
    """Compared with a run that nothing stopped, too."""
    root = render_motion(
        tmp_path / "motion", num_train=24, num_test=4, num_order_train=0, num_order_val=0, num_order_test=0
    )
    lines = [line for split in ("train", "test") for line in questions_of(root, split)]
    options = {
        "host": f"tiny:{name}",
        "dataset": "jsonl",
        "annotations": write_lines(tmp_path / "questions.jsonl", lines),
        "video_root": root / "videos",
        "num_frames": FRAMES,
        "image_size": 32,
        "batch_size": 4,
        "epochs": 2,
        "lr_new": 1e-3,
        "decode_timeout": None,
        **OPTIONS[name],
    }

    def run(output: Path, *more: str) -> str:
        parts = ["--train-frontend", "--output", str(output), *more]
        for key, value in options.items():
            words = [str(part) for part in (value if isinstance(value, tuple) else (value,))]
            parts += [f"--{key.replace('_', '-')}", *words]
        log = tmp_path / "log"
        assert exit_codes(start(train, tmp_path / "files", parts, log=log)) == [0], log.read_text()
        return log.read_text()

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    shown = run(parts, "--max-steps", "4")
    assert f"{name}ForConditionalGeneration, 4 frames" in shown and "stopped after 4 of 10 steps" in shown
    run(parts, "--resume", "auto")
    assert latest(parts) == "step-00000010" and [step for step, _ in losses(parts)] == list(range(1, 11))
    if compared:
        run(whole)
        assert_same_checkpoint(whole, parts)
        assert losses(whole) == losses(parts)
    report = json.loads((parts / "report.json").read_text())
    assert report["host"] == f"tiny:{name}" and report["output_tokens"] < report["host_tokens"] == FRAMES * 17
    best = load_video_llm(parts / "best")
    assert type(best.compressed.host.model).__name__ == f"{name}ForConditionalGeneration"
    host = load_file(parts / "host" / "model.safetensors")
    trained = load_file(parts / "best" / TRAINED_FILE)
    for part in ("multi_modal_projector", "video_tower"):
        names = [key for key in trained if part in key and trained[key].ndim > 1]
        assert names and not any(torch.equal(trained[key], host[key]) for key in names[:1])
