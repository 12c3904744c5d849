"""The trainer: resuming, stopping on SIGTERM and on what is not finite, configuration."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training.models import train_config
from training.processes import exit_codes, run, start
from training.runs import break_gradient, break_loss, die_while_saving, finish, go_wrong, refused, terminate

from tempme_vl.schema import ConfigError
from tempme_vl.training.engine import RunLog, deepspeed_config

CPU = torch.device("cpu")


def latest(output: Path) -> str:
    return (output / "checkpoints" / "latest").read_text()


def contents(folder: Path) -> dict[str, bytes]:
    """What all files hold, but that of the lock, which says who had it last."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", ["zero0", pytest.param("zero2", marks=pytest.mark.slow), "partitioned"])
def test_resumed_run_ends_with_the_same_weights(tmp_path: Path, stage: str, world: int) -> None:
    whole = run(finish, tmp_path / "whole", stage, world=world)
    (first, _), *_ = run(finish, tmp_path / "parts", stage, 5, world=world)
    assert (first, latest(tmp_path / "parts")) == (5, "step-00000005")
    changes = {"resume": "auto"}
    parts = run(_finish_resumed, tmp_path / "parts", stage, changes, world=world)
    for (step, weights), (other_step, others) in zip(whole, parts, strict=True):
        assert step == other_step == 9
        assert weights.keys() == others.keys()
        assert all(torch.equal(weights[name], others[name]) for name in weights)


def _finish_resumed(output: Path, stage: str, changes: dict) -> tuple[int, dict]:
    return finish(output, stage, **changes)


@pytest.mark.parametrize("place", ["_random_states", "_replace"])
def test_kill_while_saving_leaves_the_last_checkpoint(tmp_path: Path, place: str) -> None:
    killed = start(die_while_saving, tmp_path / "run", place, log=tmp_path / "log")
    assert exit_codes(killed) == [-9]
    assert latest(tmp_path / "run") == "step-00000003"
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    unfinished = "step-00000006.partial" if place == "_random_states" else "step-00000006"
    assert names == {"latest", "step-00000003", unfinished}
    ((_, whole),) = run(finish, tmp_path / "whole")
    ((_, resumed),) = run(_finish_resumed, tmp_path / "run", "zero0", {"resume": "auto"})
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not list((tmp_path / "run" / "checkpoints").glob("*.partial"))


@pytest.mark.parametrize(("workers", "world"), [(0, 1), (2, 1), (0, 2)])
def test_sigterm_to_a_rank_and_its_workers_saves_on_all_ranks(tmp_path: Path, workers: int, world: int) -> None:
    codes = exit_codes(start(terminate, tmp_path / "run", workers, log=tmp_path / "log", world=world))
    assert codes == [143] * world
    assert "SIGTERM: saved step 4; continue with --resume auto" in (tmp_path / "log").read_text()
    assert latest(tmp_path / "run") == "step-00000004"
    whole = run(finish, tmp_path / "whole", world=world)
    resumed = run(_finish_resumed, tmp_path / "run", "zero0", {"resume": "auto"}, world=world)
    for (_, weights), (_, others) in zip(whole, resumed, strict=True):
        assert all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.parametrize(
    ("stage", "how", "chunks", "world"),
    [
        ("zero0", break_loss, 1, 1),
        ("zero0", break_loss, 2, 1),
        pytest.param("zero1", break_loss, 1, 2, marks=pytest.mark.slow),
        ("zero0", break_gradient, 1, 1),
        pytest.param("zero0", break_gradient, 2, 2, marks=pytest.mark.slow),
        ("zero1", break_gradient, 1, 2),
        ("zero3", break_gradient, 1, 1),
    ],
)
def test_what_is_not_finite_stops_the_run(tmp_path: Path, stage: str, how, chunks: int, world: int) -> None:
    errors = run(go_wrong, tmp_path / "run", stage, how, chunks, world - 1, world=world)
    names = [name for _, batch in errors for name in batch]
    assert len(names) == 4
    for message, _ in errors:
        assert message.startswith("loss is" if how is break_loss else "gradient norm is")
        assert "at step 4 (epoch 1)" in message
        assert ", ".join(names) in message
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoints.glob("step-*")] == ["step-00000003"]
    assert latest(tmp_path / "run") == "step-00000003"
    resumed = run(_finish_resumed, tmp_path / "run", stage, {"resume": "auto", "chunks": chunks}, world=world)
    for step, weights in resumed:
        assert step == 9
        assert all(weight.isfinite().all() for weight in weights.values())


def test_a_folder_with_checkpoints_is_continued_only_by_the_same_run(tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(finish, output, "zero0", 4)
    before = contents(output)
    message = run(_refused, output, {"resume": "never"})[0]
    assert "step-00000004" in message and "--resume auto" in message and "another --output" in message
    for changes, difference in (
        ({"batch_size": 6}, "batch_size 4, now 6"),
        ({"seed": 1}, "seed 0, now 1"),
        ({"epochs": 4}, "epochs 3, now 4"),
        ({"stage": "zero1"}, "zero_stage 0, now 1"),
    ):
        (message,) = run(_refused, output, changes)
        assert difference in message
        assert "same options" in message and "another --output" in message
    for message in run(_refused, output, {"chunks": 2, "seed": 1}, world=2):
        assert "seed 0, now 1" in message and "chunks" not in message
    for message in run(_refused, output, {}, world=3):
        assert "batch of 4 does not divide over 3 ranks" in message and "the number of ranks" in message
    assert contents(output) == before
    assert "'never' or 'auto'" in run(_refused, output, {"resume": "always"})[0]


def _refused(output: Path, changes: dict) -> str:
    return refused(output, **changes)


def test_chunks_must_divide_the_batch(tmp_path: Path) -> None:
    assert "a batch of 4 a rank does not divide into 3 chunks" in run(_refused, tmp_path, {"chunks": 3})[0]


def test_an_incomplete_checkpoint_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step-00000004"
    folder.mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest").write_text(folder.name)
    (message,) = run(_refused, tmp_path, {})
    assert "run.json" in message and str(folder) in message


def test_a_checkpoint_that_is_damaged_or_older_is_named(tmp_path: Path) -> None:
    run(finish, tmp_path / "run", "zero0", 4)
    folder = tmp_path / "run" / "checkpoints" / "step-00000004"
    (file,) = folder.glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    (message,) = run(_refused, tmp_path / "run", {})
    assert f"{folder} is not as it was saved" in message and file.name in message
    (folder / "manifest.json").unlink()
    for content, said in ((whole[:-1], f"{file} cannot be read"), (None, "expected weight/w in a file")):
        file.unlink() if content is None else file.write_bytes(content)
        (message,) = run(_refused, tmp_path / "run", {})
        assert said in message and f"an older checkpoint into {folder.parent / 'latest'}" in message
    state = json.loads((folder / "run.json").read_text())
    del state["ranks"], state["sha256"]
    (folder / "run.json").write_text(json.dumps(state))
    (message,) = run(_refused, tmp_path / "run", {})
    assert f"{folder} is of an older version" in message


def test_log_drops_what_comes_after_the_resumed_step(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, tensorboard=False)
    for step in range(1, 6):
        log.write(step, {"loss": step / 2})
    resumed = RunLog(tmp_path, 3, tensorboard=False)
    resumed.write(4, {"loss": 7.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 7.0)]


@pytest.mark.parametrize("line", ['{"step": 2, "lo', "[]", '{"loss": 1.0}', '{"step": "2"}', "\udcff", "[" * 100_000])
def test_a_damaged_line_of_the_log_is_named(tmp_path: Path, line: str) -> None:
    text = f'{{"step": 1, "loss": 2.0}}\n{line}\n{{"step": 3, "loss": 2.0}}\n'
    (tmp_path / "metrics.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: expected the JSON object of a step"):
        RunLog(tmp_path, 2, tensorboard=False)


@pytest.mark.parametrize("text", ['{"zero_optimization": NaN}', "{", "[]", '{"a": 1, "a": 2}'])
def test_a_damaged_deepspeed_file_is_named(tmp_path: Path, text: str) -> None:
    config = train_config(tmp_path)
    file = tmp_path / "own.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"own\.json: "):
        deepspeed_config(replace(config, deepspeed_config=file), 2, CPU)


def test_log_survives_a_kill_in_the_middle_of_a_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    RunLog(tmp_path, 2, tensorboard=False).write(3, {"loss": 1.0})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 3]


def test_deepspeed_configuration_is_filled(tmp_path: Path) -> None:
    for stage in ("zero0", "zero1", "zero2", "zero3", "zero3_offload"):
        config = train_config(tmp_path, stage, chunks=2)
        filled = deepspeed_config(config, 4, CPU)
        assert (filled["train_micro_batch_size_per_gpu"], filled["gradient_accumulation_steps"]) == (4, 2)
        assert filled["gradient_clipping"] == config.clip_grad
        assert filled["bf16"] == {"enabled": False}
        assert "auto" not in json.dumps(filled)
        assert filled["zero_optimization"]["stage"] == int(stage[4])
    assert deepspeed_config(train_config(tmp_path, precision="bf16"), 4, CPU)["bf16"] == {"enabled": True}
    assert deepspeed_config(train_config(tmp_path), 4, torch.device("cuda"))["bf16"] == {"enabled": True}


def test_deepspeed_configuration_errors(tmp_path: Path) -> None:
    config = train_config(tmp_path)
    with pytest.raises(ValueError, match=r"no DeepSpeed configuration at .*nowhere.json; see recipes/ds/"):
        deepspeed_config(replace(config, deepspeed_config=tmp_path / "nowhere.json"), 4, CPU)
    with pytest.raises(ValueError, match=r"precision is .*got 'fp16'"):
        deepspeed_config(replace(config, precision="fp16"), 4, CPU)
    own = tmp_path / "own.json"
    for key, value in (("train_micro_batch_size_per_gpu", 3), ("gradient_clipping", 5.0), ("bf16", {"enabled": True})):
        own.write_text(json.dumps({"zero_optimization": {"stage": 1}, key: value}))
        with pytest.raises(ValueError, match=f'own.json sets {key}; leave it "auto"'):
            deepspeed_config(replace(config, deepspeed_config=own), 4, CPU)
    for settings, said in (
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "NVMe"),
    ):
        own.write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=f"own.json .*{said}"):
            deepspeed_config(replace(config, deepspeed_config=own), 4, CPU)
