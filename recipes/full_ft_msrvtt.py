"""Full fine-tuning of a CLIP dual encoder with TempMe for text-video retrieval.

A first try, on any machine (renders its own small data set; 3 minutes on 2 CPU cores):
    deepspeed recipes/full_ft_msrvtt.py

MSRVTT-1kA, ViT-B/16, on 8 A100 (not yet measured; the paper reports R-Sum 210.2 for this setting on 4 GPUs):
    deepspeed --num_gpus 8 recipes/full_ft_msrvtt.py --data-root /data/msrvtt \
        --model open_clip:ViT-B-16-quickgelu --pretrained openai --deepspeed-config recipes/ds/zero2.json

The same on two nodes (hostfile: one line "worker-1 slots=8" a node; the data under the same path on both):
    deepspeed --hostfile hosts --num_nodes 2 --num_gpus 8 recipes/full_ft_msrvtt.py --data-root /data/msrvtt ...

Your own clips (one JSON object a line: file, caption or captions, optional start, end, split):
    deepspeed recipes/full_ft_msrvtt.py --dataset jsonl --annotations clips.jsonl --video-root clips/
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from tempme_vl.data.datasets import load_split
from tempme_vl.data.jsonl import jsonl_splits, read_jsonl
from tempme_vl.data.motion import render_motion
from tempme_vl.data.reader import ClipReader, broken_clips
from tempme_vl.data.retrieval import EvalCaptions, EvalClips, TrainPairs
from tempme_vl.data.splits import RetrievalSplit, holdout_validation
from tempme_vl.data.text import ClipTokenizer
from tempme_vl.data.transforms import ClipTransform, Preprocess
from tempme_vl.evaluation.retrieval import embed, retrieval_report, table
from tempme_vl.tasks.retrieval import (
    RetrievalModel,
    create_retrieval_model,
    freeze_as_clip4clip,
    is_new_parameter,
    retrieval_loss,
)
from tempme_vl.training import distributed
from tempme_vl.training.checkpoint import replace_export
from tempme_vl.training.engine import TrainConfig, Trainer
from tempme_vl.training.optim import parameter_groups

RECIPES = Path(__file__).resolve().parent
BROKEN_VIDEOS = "broken_videos.jsonl"
MOTION_ROOT = Path("runs/motion-data")
DATASET_NAMES = Literal["motion", "msrvtt", "msvd", "activitynet", "didemo", "lsmdc", "jsonl"]


@dataclass(frozen=True)
class Options:
    """Fine-tune a CLIP dual encoder with TempMe for text-video retrieval.

    The defaults shown are those of the data set: --help together with --data-root or --dataset shows its own. The
    options in use are written to OUTPUT/options.json.
    """

    dataset: DATASET_NAMES = "msrvtt"
    """Default: motion, the embedded data set; msrvtt as soon as --data-root is given."""
    data_root: Path | None = None
    """Folder of the annotation files (and videos) in their public layout; for motion, where to render it."""
    video_root: Path | None = None
    """Folder of the videos, if it is not below --data-root."""
    annotations: Path | None = None
    """The JSON-lines file of --dataset jsonl."""
    train_split: str = "train"
    """For example train_9k or train_7k on MSRVTT."""
    val_split: str | None = None
    """The data set's own validation split, to choose the best epoch by; else see holdout."""
    test_split: str = "test"
    """Looked at once, after training. For example test_1k or test_full on MSRVTT."""
    holdout: int = 0
    """Clips taken away from train to choose the best epoch by; 0 without a val_split takes the last epoch."""
    on_broken: Literal["record", "raise"] = "record"
    """Videos that cannot be read: listed in OUTPUT/broken_videos.jsonl and counted, or an error."""

    model: str = "open_clip:ViT-B-32-quickgelu"
    """open_clip:NAME, or open_clip:tiny."""
    pretrained: str = "openai"
    """open_clip's tag ("openai"), a weights file, or "none" for random weights."""
    method: Literal["tempme", "tome", "none"] = "tempme"
    """none encodes every frame by itself with all its tokens (mean pooling, CLIP4Clip's meanP)."""
    num_frames: int | None = None
    """Frames sampled from each clip; default: the data set's usual 12 or 64."""
    r: int | None = None
    """Pairs merged a frame in each early block (ImgMe, ToMe). These five default to the paper's for B/32, B/16."""
    merge_layers: tuple[int, ...] | None = None
    """Blocks that join clips (ClipMe)."""
    merge_frames: tuple[int, ...] | None = None
    """Neighbouring clips joined in each of them."""
    cross_percent: int | None = None
    """Percent of tokens merged across clips there."""
    intra_percent: int | None = None
    """Percent of tokens merged inside the clips from there on."""
    clip_position_std: float = 0.0
    """Clip positions start as N(0, std^2): 0 for pretrained weights, 0.5 from scratch."""

    output: Path = Path("runs/run")
    """Run folder."""
    deepspeed_config: Path = RECIPES / "ds" / "zero1.json"
    """zero0, zero1, zero2, zero3, zero3_offload, or your own."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""
    epochs: int = 5
    batch_size: int = 128
    """Global: over all ranks."""
    chunks: int = 1
    """Gradient caching: encode a rank's batch in this many pieces, with the exact gradient of the whole."""
    grad_checkpointing: bool = False
    """Recompute blocks in the backward pass to save memory."""
    lr: float = 1e-7
    """Peak rate of pretrained weights."""
    lr_new: float = 1e-4
    """Peak rate of new modules (clip positions)."""
    weight_decay: float = 0.2
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """sgd is plain, for comparing runs exactly."""
    freeze: Literal["none", "clip4clip"] = "clip4clip"
    """clip4clip freezes token, position and class embeddings, conv1 and ln_pre, as its authors do."""
    augment: Literal["none", "randaugment", "crop_flip"] = "randaugment"
    """crop_flip mirrors clips: not where captions say left or right."""
    sampling: Literal["fps1", "uniform", "segment"] = "fps1"
    """Which frames: one a second (TempMe), evenly, or UMT's segments."""
    frame_cache: str = "none"
    """"memory", a folder, or "none": keeps decoded frames, the main speed-up of later epochs."""
    decode_timeout: float | None = 60.0
    """Seconds after which a decoder is ended; None decodes without a guard."""
    workers: int = 8
    """Loader processes a rank."""
    seed: int = 0
    save_every: int = 500
    """Steps between checkpoints; one is always written at the end and on SIGTERM."""
    resume: Literal["never", "auto"] = "never"
    """auto continues from OUTPUT's last checkpoint if there is one."""
    tensorboard: bool = False
    max_steps: int | None = None
    """Stop after this many steps (for trying things out); the schedule stays that of the whole run."""
    local_rank: int = 0
    """Set by the deepspeed launcher."""


# What differs from the defaults above, which are CLIP4Clip's published full fine-tuning.
SPLITS: dict[str, dict[str, Any]] = {
    "motion": {
        "train_split": "train_9k",
        "test_split": "test_1k",
        "holdout": 96,
        "data_root": MOTION_ROOT,
        "frame_cache": str(MOTION_ROOT / "frames"),
    },
    "msrvtt": {"train_split": "train_9k", "test_split": "test_1k", "holdout": 500},
    "msvd": {"val_split": "val"},
    "activitynet": {"test_split": "val_1", "holdout": 500},
    "didemo": {"val_split": "val"},
    "lsmdc": {"val_split": "val"},
    "jsonl": {},
}
FROM_SCRATCH: dict[str, Any] = {
    "model": "open_clip:tiny",
    "pretrained": "none",
    "num_frames": 8,
    "r": 1,
    "merge_layers": (2, 3, 4),
    "merge_frames": (2, 2, 2),
    "cross_percent": 30,
    "intra_percent": 10,
    "clip_position_std": 0.5,
    "epochs": 5,
    "batch_size": 48,
    "lr": 1e-3,
    "lr_new": 1e-3,
    "weight_decay": 0.05,
    "freeze": "none",
    "augment": "none",
    "sampling": "uniform",
    "frame_cache": "memory",
    "workers": 0,
}


def parse(arguments: list[str] | None = None) -> Options:
    """Options from the command line, on top of the defaults of their data set and model."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("dataset", "data-root", "model", "method"):
        first.add_argument(f"--{name}", f"--{name.replace('-', '_')}")
    given, _ = first.parse_known_args(arguments)
    dataset = given.dataset or ("motion" if given.data_root is None else "msrvtt")
    if dataset not in SPLITS:
        raise ValueError(f"unknown --dataset {dataset}; expected one of {', '.join(SPLITS)}")
    small = dataset == "motion" or given.model == "open_clip:tiny"
    preset = {**(FROM_SCRATCH if small else {}), **SPLITS[dataset], "dataset": dataset}
    output = Path("runs") / f"{dataset}-{given.method or 'tempme'}"
    options = tyro.cli(Options, args=arguments, default=Options(**preset, output=output))
    if dataset == "jsonl" and (options.annotations is None or options.video_root is None):
        raise ValueError("--dataset jsonl needs --annotations FILE and --video-root FOLDER")
    if dataset != "jsonl" and options.data_root is None:
        raise ValueError(f"--dataset {dataset} needs --data-root, the folder of its annotation files")
    return options


def main(options: Options) -> None:
    device = distributed.initialize()
    torch.manual_seed(options.seed)
    train, val, test = read_splits(options)
    model = build_model(options, train).to(device)
    preprocess = Preprocess.from_dict(model.frontend.config["preprocess"])
    tokenizer = ClipTokenizer(min(train.max_words, model.text.context_length))
    model.config["input"] = {"sampling": options.sampling, "max_words": tokenizer.max_words}
    reader = build_reader(options, ClipTransform(preprocess), model.frontend.schedule.frames)
    train_reader = replace(reader, transform=ClipTransform(preprocess, options.augment))

    trainer = Trainer(
        model,
        build_optimizer(options, model),
        TrainPairs(train, train_reader, tokenizer, options.seed),
        config(options),
    )
    announce(options, model, train, val, test)
    last_step = trainer.total_steps if options.max_steps is None else options.max_steps
    start, start_step = time.perf_counter(), trainer.step
    for batch in trainer.batches():
        if trainer.step >= last_step:
            break
        trainer.update(batch, retrieval_loss)
        if trainer.epoch_ended:
            score = float(trainer.epoch)  # without a validation split the last epoch is the best
            if val is not None:
                report = evaluate(trainer.engine, val, reader, tokenizer, device)
                score = report["t2v"]["rsum"] + report["v2t"]["rsum"]
                trainer.log(val_t2v_rsum=report["t2v"]["rsum"], val_v2t_rsum=report["v2t"]["rsum"])
            if trainer.is_best(score):
                export(options, trainer, model)
    seconds = time.perf_counter() - start

    if trainer.step < trainer.total_steps:
        trainer.save()
        say(f"stopped after {trainer.step} of {trainer.total_steps} steps; the test split was not looked at")
        return
    best = RetrievalModel.from_pretrained(options.output / "best").to(device)
    report = evaluate(best, test, reader, tokenizer, device)
    report |= {
        "selected_on": "none: last epoch" if val is None else val.name,
        "selected_step": trainer.best_step,
        "method": options.method,
        "model": options.model,
        "seed": options.seed,
        "output_tokens": model.frontend.schedule.output_tokens,
        "input_tokens": model.frontend.schedule.frames * model.frontend.schedule.tokens,
        "gflops": model.frontend.gflops(),
        "train_seconds": seconds,
        "train_steps": trainer.step - start_step,
        "ranks": distributed.world_size(),
        "broken_videos": broken_clips(options.output / BROKEN_VIDEOS),
    }
    if distributed.is_main():
        (options.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        say(f"\n{report['split']}; best epoch chosen on {report['selected_on']}\n{table({options.method: report})}")
        if report["broken_videos"]:
            say(f"{len(report['broken_videos'])} videos could not be read: {options.output / BROKEN_VIDEOS}")


def read_splits(options: Options) -> tuple[RetrievalSplit, RetrievalSplit | None, RetrievalSplit]:
    """Training, validation (or None) and test split."""
    if options.dataset == "jsonl":
        train, val, test = read_jsonl_splits(options)
    else:
        assert options.data_root is not None
        if options.dataset == "motion":
            render_motion(options.data_root)
        root = options.data_root
        dataset = "msrvtt" if options.dataset == "motion" else options.dataset

        def read(name: str) -> RetrievalSplit:
            return load_split(dataset, root, name, options.video_root)

        train, test = read(options.train_split), read(options.test_split)
        val = read(options.val_split) if options.val_split else None
    if val is None and options.holdout:
        train, val = holdout_validation(train, options.holdout, options.seed)
    return train, val, test


def read_jsonl_splits(options: Options) -> tuple[RetrievalSplit, RetrievalSplit | None, RetrievalSplit]:
    """The file's own splits; without a training split all lines train, without a test split train is tested."""
    assert options.annotations is not None and options.video_root is not None
    there = jsonl_splits(options.annotations)
    read = partial(read_jsonl, options.annotations, options.video_root)
    train = read("train" if "train" in there else None)
    return train, read("val") if "val" in there else None, read("test") if "test" in there else train


def build_model(options: Options, train: RetrievalSplit) -> RetrievalModel:
    names = {
        "none": (),
        "tome": ("r",),
        "tempme": ("r", "merge_layers", "merge_frames", "cross_percent", "intra_percent"),
    }[options.method]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    model = create_retrieval_model(
        options.model,
        None if options.pretrained == "none" else options.pretrained,
        options.method,
        options.num_frames or train.num_frames,
        options.clip_position_std,
        **given,
    )
    if options.freeze == "clip4clip":
        freeze_as_clip4clip(model)
    model.set_grad_checkpointing(options.grad_checkpointing)
    return model


def build_reader(options: Options, transform: ClipTransform, num_frames: int) -> ClipReader:
    return ClipReader(
        num_frames,
        transform,
        sampling=options.sampling,
        # the data set that we rendered ourselves needs no guard around its decoder
        timeout=None if options.dataset == "motion" else options.decode_timeout,
        on_broken=options.on_broken,
        broken_log=options.output / BROKEN_VIDEOS,
        cache=None if options.frame_cache == "none" else options.frame_cache,
    )


def build_optimizer(options: Options, model: RetrievalModel) -> torch.optim.Optimizer:
    groups = parameter_groups(model, options.lr, options.lr_new, options.weight_decay, is_new_parameter)
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups)
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, fused=True)


def config(options: Options) -> TrainConfig:
    return TrainConfig(
        output=options.output,
        deepspeed=options.deepspeed_config,
        epochs=options.epochs,
        batch_size=options.batch_size,
        chunks=options.chunks,
        precision=options.precision,
        seed=options.seed,
        workers=options.workers,
        save_every=options.save_every,
        resume=options.resume,
        tensorboard=options.tensorboard,
    )


def evaluate(
    encoder: Any, split: RetrievalSplit, reader: ClipReader, tokenizer: ClipTokenizer, device: torch.device
) -> dict[str, Any]:
    """Metrics of a split, all ranks together; `encoder` is a model or its DeepSpeed engine."""
    encoder.eval()
    captions = EvalCaptions(split, tokenizer)
    embeddings = embed(encoder, EvalClips(split, reader), captions, captions.video_of_caption, device)
    return {"split": split.name, **retrieval_report(embeddings)}


def export(options: Options, trainer: Trainer, model: RetrievalModel) -> None:
    """Writes OUTPUT/best, which `RetrievalModel.from_pretrained` and eval/retrieval.py load."""
    state = trainer.full_state_dict()
    if distributed.is_main():
        replace_export(options.output / "best", trainer.step, lambda folder: model.save_pretrained(folder, state))
    distributed.barrier()


def announce(
    options: Options,
    model: RetrievalModel,
    train: RetrievalSplit,
    val: RetrievalSplit | None,
    test: RetrievalSplit,
) -> None:
    if not distributed.is_main():
        return
    options.output.mkdir(parents=True, exist_ok=True)
    chosen = {field.name: getattr(options, field.name) for field in fields(options)}
    (options.output / "options.json").write_text(json.dumps(chosen, indent=2, default=str) + "\n")
    if options.dataset == "motion":
        say(f"No data set given: training on the embedded data set motion, in {options.data_root}")
    schedule = model.frontend.schedule
    clips, tokens = schedule.token_counts[-1]
    say(
        f"{options.model}, {options.method}: {schedule.frames} x {schedule.tokens} tokens -> {clips} x {tokens}, "
        f"{model.frontend.gflops():.3g} GFLOPs a video\n"
        f"train {train.name}: {len(train.clips)} clips, {train.num_captions} captions; "
        f"validation {'none' if val is None else f'{val.name}: {len(val.clips)} clips'}; "
        f"test {test.name}: {len(test.clips)} clips"
    )


def say(text: str) -> None:
    if distributed.is_main():
        print(text, flush=True)


if __name__ == "__main__":
    main(parse())
