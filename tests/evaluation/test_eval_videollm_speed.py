"""The command's rows are what they say: the host is the host itself, counts come true, and the table has them all."""

from __future__ import annotations

import inspect
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tempme_vl.evaluation.moments import Times
from tempme_vl.evaluation.stages import Depth, stage_rows
from tempme_vl.integrations import compress

COMMAND = Path(__file__).parents[2] / "eval" / "videollm_speed.py"
SCRIPT = runpy.run_path(str(COMMAND))
MERGING = {"r": 1, "merge_layers": (2, 3, 4)}
TAKES_FEATURES = (
    "mm_encoder_outputs" in inspect.signature(transformers.VideoLlavaForConditionalGeneration.forward).parameters
)
NAMES = ["host", "tempme", "tome", "post-encoder"]


@pytest.fixture(scope="module")
def built() -> tuple[Any, Any, dict[str, Any]]:
    """A tiny model that answers by what it sees, its processor, and the ways by name."""
    if not TAKES_FEATURES:
        pytest.skip("this transformers takes no features in generate, which the command refuses")
    torch.manual_seed(0)
    options = SCRIPT["Options"](model="tiny", **MERGING)
    model, processor = SCRIPT["build"](options)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return model, processor, {way.name: way for way in SCRIPT["all_ways"](model, processor, options)}


def videos(count: int) -> list[np.ndarray]:
    return [np.random.default_rng(n).integers(0, 256, (8, 40, 48, 3), dtype=np.uint8) for n in range(count)]


def run(monkeypatch: pytest.MonkeyPatch, file: Path, more: str) -> list[dict[str, Any]]:
    command = f"{COMMAND} --model tiny --r 1 --merge-layers 2 3 4 --new-tokens 3 --repeats 2 {more} --json {file}"
    monkeypatch.setattr(sys, "argv", command.split())
    runpy.run_path(str(COMMAND), run_name="__main__")
    return json.loads(file.read_text())["rows"]


def test_the_host_writes_what_it_writes_by_itself(built: tuple[Any, Any, dict[str, Any]]) -> None:
    model, processor, ways = built
    inputs = processor(text=[SCRIPT["PROMPT"]] * 2, videos=videos(2), return_tensors="pt", padding=True)
    own = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)[:, -6:]
    times, ids = SCRIPT["answer"](model, ways["host"], videos(2), 6)
    assert torch.equal(ids, own) and not torch.equal(own[0], own[1])
    whole = times.preprocessing + times.tower + times.prefill + 5 * times.token
    assert whole == pytest.approx(times.total)


@pytest.mark.parametrize("name", NAMES)
def test_the_language_model_reads_as_many_tokens_as_told(
    name: str, built: tuple[Any, Any, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, ways = built
    lengths: list[int] = []
    forward = model.model.language_model.forward
    monkeypatch.setattr(
        model.model.language_model,
        "forward",
        lambda **inputs: (lengths.append(inputs["inputs_embeds"].shape[1]), forward(**inputs))[1],
    )
    _, ids = SCRIPT["answer"](model, ways[name], videos(1), 3)
    assert ids.shape == (1, 3) and lengths == [ways[name].tokens + len(SCRIPT["PROMPT"].split()), 1, 1]


def test_merging_behind_the_tower_starts_from_the_hosts_own_features(built: tuple[Any, Any, dict[str, Any]]) -> None:
    model, processor, ways = built
    plain = compress(model, processor, "none", 8, "behind")
    with torch.no_grad():
        host, ours = (
            prepare(videos(2)) for prepare in (ways["host"].prepare, lambda videos: SCRIPT["our_inputs"](plain, videos))
        )
    assert torch.equal(host["input_ids"], ours["input_ids"])
    features = [inputs["mm_encoder_outputs"]["video"].pooler_output for inputs in (host, ours)]
    assert torch.equal(features[0].flatten(0, 1), features[1].flatten(0, 1))
    assert plain.counts() == (ways["host"].tokens, ways["host"].tokens)


def test_timing_leaves_no_hooks(built: tuple[Any, Any, dict[str, Any]]) -> None:
    model, _, ways = built

    def hooks() -> list[int]:
        SCRIPT["answer"](model, ways["host"], videos(1), 2)
        return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]

    assert hooks() == hooks()  # transformers puts some of its own in the first pass


@pytest.mark.parametrize(("choices", "chosen"), [(range(9), 4), (range(3), 2), (range(5, 9), 5)])
def test_nearest(choices: range, chosen: int) -> None:
    assert SCRIPT["nearest"](lambda choice: 100 - 10 * choice, choices, 58) == chosen


@pytest.mark.skipif(TAKES_FEATURES, reason="this transformers can")
def test_a_transformers_that_takes_no_features_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "rows.json", "")
    assert "install transformers 5.18 or newer" in capsys.readouterr().err


@pytest.mark.skipif(not TAKES_FEATURES, reason="this transformers takes no features in generate")
@pytest.mark.parametrize("layers", [2, 4])
def test_the_command_prints_a_table(
    layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(monkeypatch, tmp_path / "out" / "rows.json", f"--llm-layers {layers} --batch 2")
    assert [row["row"] for row in rows] == NAMES
    host, tempme, tome, behind = rows
    assert host["tokens"] == 8 * 17 and max(row["tokens"] for row in (tempme, tome, behind)) < host["tokens"] / 2
    # the host runs the last block, too, whose output nobody reads
    assert host["tower_gflops"] > behind["tower_gflops"] > max(tempme["tower_gflops"], tome["tower_gflops"])
    assert all(row["prefill_gflops"] < host["prefill_gflops"] for row in rows[1:])
    for row in rows:
        assert len(row["runs"]) == 2 and all(value > 0 for value in row["ratios"].values())
        assert row["seconds"].keys() == host["seconds"].keys() and ("at_depth" in row["seconds"]) == (layers < 4)
    assert set(host["ratios"].values()) == {1.0}
    shown = capsys.readouterr().out
    table = [line for line in shown.splitlines() if line.startswith("|")]
    assert len(table) == 6 and len({line.count("|") for line in table}) == 1 and "this machine" in shown
    assert [line.split("|")[2].strip() for line in table[2:]] == [str(row["tokens"]) for row in rows]
    assert ("extrapolated to 4 layers" in shown) == (layers < 4)


def test_at_full_depth_everything_but_the_last_module_is_repeated(built: tuple[Any, Any, dict[str, Any]]) -> None:
    _, _, ways = built
    times = {name: [Times(0.5, 2.0, 5.0, 3.0, 13.5)] for name in ways}
    rows = stage_rows(list(ways.values()), times, Depth(2, 4, 1.0), 3)
    assert rows[0]["seconds"]["at_depth"] == 0.5 + 2.0 + (1 + 4 * 2) + 2 * (1 + 2 * 2)


def test_one_new_token_has_no_decoding_to_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, tmp_path / "rows.json", "--new-tokens 1")
    assert ended.value.code == 2 and "2 or more, got 1" in capsys.readouterr().err
