"""The retrieval recipe: UMT and its re-ranking, defaults, options that miss each other, splits of one's own videos."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes.runs import CASES, assert_same_checkpoint, latest

from tempme_vl.data.dataset import SplitNames
from tempme_vl.data.datasets import CAPTIONED
from tempme_vl.data.splits import RetrievalSplit, Video
from tempme_vl.recipes.options.retrieval import PEFT, RETRIEVAL, Options
from tempme_vl.recipes.retrieval import build_model
from tempme_vl.registries import DATASETS
from tempme_vl.tasks.umt_retrieval import UMTRetrievalModel
from tempme_vl.tuning import Lora

parse = RETRIEVAL.parse
TIMES = ("train_seconds", "train_steps", "date")


@pytest.mark.slow
def test_umt_on_two_ranks_trains_is_killed_resumes_and_re_ranks(data: Path, tmp_path: Path) -> None:
    """Dropout and hard negatives are drawn anew in each step; a resumed run draws what an unbroken one does."""
    whole, parts, log = tmp_path / "whole", tmp_path / "parts", tmp_path / "log"
    case = CASES["umt"]
    assert case.run(log, case.arguments(data, whole), world=2) == [0, 0], log.read_text()
    resumed = case.arguments(data, parts, resume="auto")
    assert -signal.SIGKILL in case.run(log, resumed, 8, world=2)
    assert latest(parts) == "step-00000006"
    assert case.run(log, resumed, world=2) == [0, 0], log.read_text()
    assert_same_checkpoint(whole, parts)
    report = json.loads((parts / "report.json").read_text())
    assert report == {**json.loads((whole / "report.json").read_text()), **{k: report[k] for k in TIMES}}
    assert report["reranked"]["rerank_top_k"] == 3 and 24 <= report["reranked"]["rerank_pairs"] <= 48
    assert UMTRetrievalModel.from_pretrained(parts / "best").frontend.schedule.method == "tempme"


def test_defaults_follow_the_data_set_and_the_model() -> None:
    motion = parse([])
    assert (motion.dataset, motion.model, motion.pretrained) == ("motion", "open_clip:tiny", "none")
    assert motion.data_root == Path("runs/motion-data") and motion.output == Path("runs/motion-tempme")
    msrvtt = parse(["--data-root", "x", "--lr", "1e-5", "--method", "tome"])
    assert (msrvtt.dataset, msrvtt.lr, msrvtt.lr_new, msrvtt.tuning) == ("msrvtt", 1e-5, 1e-4, "clip4clip")
    assert (msrvtt.output, msrvtt.train_split, msrvtt.test_split) == (Path("runs/msrvtt-tome"), "train_9k", "test_1k")
    small = parse(["--data_root", "x", "--model", "open_clip:tiny"])
    assert (small.dataset, small.pretrained, small.tuning, small.holdout) == ("msrvtt", "none", "full", 500)
    umt = parse(["--data-root", "x", "--model", "umt:b16", "--pretrained", "b16_25m.pth"])
    assert (umt.lr, umt.epochs, umt.batch_size, umt.weight_decay, umt.beta2) == (2e-5, 10, 256, 0.02, 0.999)
    assert (umt.mode, umt.augment, umt.sampling, umt.tuning) == ("per_frame", "crop_flip", "segment", "full")
    for dataset in [name for name in CAPTIONED if not DATASETS[name].rendered]:
        options = parse(["--dataset", dataset, "--data-root", "x", "--annotations", "a", "--video-root", "v"])
        assert (options.dataset, options.output) == (dataset, Path(f"runs/{dataset}-tempme"))
        assert (options.batch_size, options.output) == (128, options.output)


def test_ways_of_tuning_and_their_older_name() -> None:
    assert [parse(["--data-root", "x", "--freeze", way]).tuning for way in ("none", "clip4clip")] == [
        "full",
        "clip4clip",
    ]
    assert parse(["--freeze", "clip4clip"]) == parse(["--tuning", "clip4clip"])
    with pytest.raises(ValueError, match="--freeze is the older name of --tuning"):
        parse(["--freeze", "none", "--tuning", "lora"])
    options = parse(["--tuning", "lora", "--tuning-options", "rank=4", "alpha=2.5", 'targets=["qkv"]'])
    assert options.tuned() == Lora(4, 2.5, targets=("qkv",))
    with pytest.raises(ValueError, match="expected NAME=VALUE; got 'rank'"):
        parse(["--tuning-options", "rank"])
    with pytest.raises(ValueError, match="tuning 'full': unknown keys 'rank'"):
        parse(["--tuning-options", "rank=4"])
    paper = PEFT.parse(["--data-root", "x"])
    assert (paper.tuned(), paper.lr_new, paper.optimizer, paper.epochs) == (Lora(), 6e-4, "adamw_tempme", 5)
    assert (paper.schedule, paper.decay, paper.beta2, paper.warmup) == ("cosine_from_zero", "all", 0.999, 0.1)
    assert paper.output == Path("runs/msrvtt-tempme-lora")


BERTADAM = {"optimizer": "bertadam", "deepspeed_config": Path("zero0"), "precision": "fp32"}
# what the papers train with, as far as they say
PAPERS: list[tuple[str, dict[str, Any]]] = [
    (
        "clip4clip",
        {"lr": 1e-7, "lr_new": 1e-4, "schedule": "cosine_whole", "decay": "no_bias", "epochs": 5, **BERTADAM},
    ),
    ("lora", {"lr_new": 6e-4, "optimizer": "adamw_tempme", "schedule": "cosine_from_zero", "decay": "all"}),
    ("plevu", {"lr_new": 1e-3, "optimizer": "adamw", "weight_decay": 0.01}),
    ("dgl", {"lr_new": 5e-3, "optimizer": "adamw", "beta2": 0.98, "weight_decay": 0.2}),
    ("dgl --tuning-options tokens=4 prompts=transformer", {"lr_new": 2e-3}),
    ("mv_adapter", {"lr": 1e-7, "lr_new": 5e-6, "weight_decay": 0.2, "epochs": 5, **BERTADAM}),
    ("full --head xpool", {"lr": 1e-6, "lr_new": 1e-5, "weight_decay": 0.2, "batch_size": 32, "tuning": "full"}),
]


@pytest.mark.parametrize(("given", "paper"), PAPERS, ids=str)
def test_a_tuning_that_is_named_trains_as_its_paper_says(given: str, paper: dict[str, Any], capsys: Any) -> None:
    arguments = ["--data-root", "x", "--tuning", *given.split()]
    options = parse(arguments)
    assert {name: getattr(options, name) for name in paper} == paper
    assert parse([*arguments, "--lr-new", "1e-9"]).lr_new == 1e-9
    # what no paper says is as without
    plain = parse(["--data-root", "x", "--tuning", "full"])
    record = {**options.tuned().published(), **paper, "tuning": "", "tuning_options": "", "head": ""}
    assert {name for name, value in vars(plain).items() if value != getattr(options, name)} <= record.keys()
    with pytest.raises(SystemExit):
        parse([*arguments, "--help"])
    assert f"(default: {paper['lr_new']})" in capsys.readouterr().out


def test_defaults_that_no_paper_changes() -> None:
    """Without a tuning, of models with settings of their own, and where nothing is published."""
    untouched = parse(["--data-root", "x"])
    assert (untouched.tuning, untouched.optimizer, str(untouched.deepspeed_config)) == ("clip4clip", "adamw", "zero1")
    for model in ("open_clip:tiny", "umt:b16"):
        own = parse(["--data-root", "x", "--model", model, "--tuning", "full"])
        assert parse(["--data-root", "x", "--model", model, "--tuning", "lora"]) == replace(own, tuning="lora")
    for name in ("prompt", "adapter", "vop", "dora"):
        assert parse(["--data-root", "x", "--tuning", name]) == replace(untouched, tuning=name)
    peft = PEFT.parse(["--data-root", "x"])
    assert PEFT.parse(["--data-root", "x", "--tuning", "prompt"]) == replace(peft, tuning="prompt")
    assert PEFT.parse(["--data-root", "x", "--head", "xpool"]) == replace(peft, head="xpool")
    assert PEFT.parse(["--data-root", "x", "--tuning", "dgl"]).lr_new == 5e-3


def test_a_second_stage_keeps_the_words_of_the_first(tmp_path: Path) -> None:
    """On other captions: an id would stand for another word."""
    videos = tuple(Video(f"v{number}", Path(f"v{number}.mp4")) for number in range(2))
    first = RetrievalSplit("first", videos, (("a red ball moves left",), ("a green cube",)), num_frames=4)
    second = RetrievalSplit("second", videos, (("someone plays the guitar",), ("a dog",)), num_frames=4)
    arguments = ["--model", "umt:tiny", "--method", "none"]
    model = build_model(parse(arguments), first)
    model.save_pretrained(tmp_path)
    again = build_model(parse([*arguments, "--pretrained", str(tmp_path)]), second)
    assert again.vocabulary == model.vocabulary != build_model(parse(arguments), second).vocabulary
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())


def test_missing_options_are_named() -> None:
    with pytest.raises(ValueError, match="--chunks caches gradients of a contrastive loss alone"):
        parse(["--model", "umt:tiny", "--chunks", "2"])
    with pytest.raises(ValueError, match="--dataset jsonl needs --annotations FILE and --video-root FOLDER"):
        parse(["--dataset", "jsonl", "--video-root", "v"])
    with pytest.raises(ValueError, match="--dataset msvd needs --data-root"):
        parse(["--dataset", "msvd"])
    with pytest.raises(ValueError, match=r"unknown data set 'nothing'; expected one of .*msrvtt"):
        parse(["--dataset", "nothing"])


def read(options: Options) -> Any:
    names = SplitNames(options.train_split, options.val_split, options.test_split, options.holdout)
    return options.source().all_captions(names, options.seed)


def test_jsonl_splits(tmp_path: Path) -> None:
    file = tmp_path / "videos.jsonl"
    given = ["--dataset", "jsonl", "--annotations", str(file), "--video-root", str(tmp_path)]

    def write(*splits: dict[str, str]) -> None:
        entries = [{"file": f"{i}.mp4", "caption": f"video {i}", **split} for i, split in enumerate(splits)]
        file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))

    write({}, {}, {})
    train_split, val, test = read(parse(given))
    assert (len(train_split.videos), val, test.name) == (3, None, "videos/all")
    train_split, val, test = read(parse([*given, "--holdout", "1"]))
    assert val is not None
    assert (len(train_split.videos), len(val.videos)) == (2, 1)
    write(*({"split": name} for name in ("train", "train", "val", "test", "test", "test")))
    train_split, val, test = read(parse(given))
    assert val is not None
    assert (len(train_split.videos), len(val.videos), len(test.videos)) == (2, 1, 3)
