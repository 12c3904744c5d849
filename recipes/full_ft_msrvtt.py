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

import json
import time
from dataclasses import dataclass, fields, replace
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
DATASET_NAMES = Literal["motion", "msrvtt", "msvd", "activitynet", "didemo", "lsmdc", "jsonl"]


@dataclass(frozen=True)
class Options:
    """Fine-tune a CLIP dual encoder with TempMe for text-video retrieval.

    Options left out take the preset of the data set: small and from scratch for "motion", CLIP4Clip's published
    full fine-tuning otherwise. The options in use are written to OUTPUT/options.json.
    """

    dataset: DATASET_NAMES | None = None
    """Default: motion, the embedded data set; msrvtt as soon as --data-root is given."""
    data_root: Path | None = None
    """Folder of the annotation files (and videos) in their public layout; for motion, where to render it."""
    video_root: Path | None = None
    """Folder of the videos, if it is not below --data-root."""
    annotations: Path | None = None
    """The JSON-lines file of --dataset jsonl."""
    train_split: str | None = None
    """For example train_9k (default) or train_7k on MSRVTT."""
    val_split: str | None = None
    """The data set's own validation split, to choose the best epoch by; else see holdout."""
    test_split: str | None = None
    """Looked at once, after training. For example test_1k (default) or test_full on MSRVTT."""
    holdout: int | None = None
    """Clips taken away from train to choose the best epoch by; 0 takes the last epoch instead."""
    on_broken: Literal["record", "raise"] = "record"
    """Videos that cannot be read: listed in OUTPUT/broken_videos.jsonl and counted, or an error."""

    model: str | None = None
    """open_clip:NAME, or open_clip:tiny."""
    pretrained: str | None = None
    """open_clip's tag ("openai"), a weights file, or "none" for random weights."""
    method: Literal["tempme", "tome", "none"] = "tempme"
    """none encodes every frame by itself with all its tokens (mean pooling, CLIP4Clip's meanP)."""
    num_frames: int | None = None
    """Frames sampled from each clip."""
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
    clip_position_std: float | None = None
    """Clip positions start as N(0, std^2): 0 for pretrained weights, 0.5 from scratch."""

    output: Path | None = None
    """Run folder. Default: runs/DATASET-METHOD."""
    deepspeed_config: Path = RECIPES / "ds" / "zero1.json"
    """zero0, zero1, zero2, zero3, zero3_offload, or your own."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""
    epochs: int | None = None
    batch_size: int | None = None
    """Global: over all ranks."""
    chunks: int = 1
    """Gradient caching: encode a rank's batch in this many pieces, with the exact gradient of the whole."""
    grad_checkpointing: bool = False
    """Recompute blocks in the backward pass to save memory."""
    lr: float | None = None
    """Peak rate of pretrained weights."""
    lr_new: float | None = None
    """Peak rate of new modules (clip positions)."""
    weight_decay: float | None = None
    adam_eps: float | None = None
    """AdamW's epsilon: 1e-6 for pretrained weights; from scratch it drowns the small gradients of a plateau, 1e-8."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """sgd is plain, for comparing runs exactly."""
    freeze: Literal["none", "clip4clip"] | None = None
    """clip4clip freezes token, position and class embeddings, conv1 and ln_pre, as its authors do."""
    augment: Literal["none", "randaugment", "crop_flip"] | None = None
    """crop_flip mirrors clips: not where captions say left or right."""
    sampling: Literal["fps1", "uniform", "segment"] | None = None
    """Which frames: one a second (TempMe), evenly, or UMT's segments."""
    frame_cache: str | None = None
    """"memory", a folder, or "none": keeps decoded frames, the main speed-up of later epochs."""
    decode_timeout: float | None = 60.0
    """Seconds after which a decoder is ended."""
    workers: int | None = None
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


PRESETS: dict[str, dict[str, Any]] = {
    "motion": {
        "model": "open_clip:tiny",
        "pretrained": "none",
        "num_frames": 8,
        "r": 1,
        "merge_layers": (0, 1, 2),
        "merge_frames": (2, 2, 2),
        "cross_percent": 30,
        "intra_percent": 10,
        "clip_position_std": 0.5,
        "train_split": "train_9k",
        "test_split": "test_1k",
        "holdout": 96,
        "epochs": 6,
        "batch_size": 48,
        "lr": 1.5e-3,
        "lr_new": 1.5e-3,
        "weight_decay": 0.05,
        "adam_eps": 1e-8,
        "freeze": "none",
        "augment": "none",
        "sampling": "uniform",
        "frame_cache": "memory",
        "workers": 0,
    },
    "published": {
        "model": "open_clip:ViT-B-32-quickgelu",
        "pretrained": "openai",
        "clip_position_std": 0.0,
        "epochs": 5,
        "batch_size": 128,
        "lr": 1e-7,
        "lr_new": 1e-4,
        "weight_decay": 0.2,
        "adam_eps": 1e-6,
        "freeze": "clip4clip",
        "augment": "randaugment",
        "sampling": "fps1",
        "frame_cache": "none",
        "workers": 8,
    },
    # without a validation split of the data set's own, `holdout` clips are taken away from train
    "msrvtt": {"train_split": "train_9k", "test_split": "test_1k", "holdout": 500},
    "msvd": {"train_split": "train", "val_split": "val", "test_split": "test", "holdout": 0},
    "activitynet": {"train_split": "train", "test_split": "val_1", "holdout": 500},
    "didemo": {"train_split": "train", "val_split": "val", "test_split": "test", "holdout": 0},
    "lsmdc": {"train_split": "train", "val_split": "val", "test_split": "test", "holdout": 0},
    "jsonl": {"holdout": 0},
}


def main(options: Options) -> None:
    options = fill(options)
    device = distributed.initialize()
    torch.manual_seed(options.seed)
    train, val, test = read_splits(options)
    model = build_model(options, train).to(device)
    preprocess = Preprocess.from_dict(model.frontend.config["preprocess"])
    tokenizer = ClipTokenizer(min(train.max_words, model.text.context_length))
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
        "broken_videos": broken_clips(reader.broken_log),
    }
    if distributed.is_main():
        (options.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        say(f"\n{report['split']}; best epoch chosen on {report['selected_on']}\n{table({options.method: report})}")
        if report["broken_videos"]:
            say(f"{len(report['broken_videos'])} videos could not be read: {reader.broken_log}")


def fill(options: Options) -> Options:
    """The options with the data set's preset in place of everything left out.

    Raises:
        ValueError: options that miss each other.
    """
    dataset = options.dataset or ("motion" if options.data_root is None else "msrvtt")
    if dataset == "jsonl" and (options.annotations is None or options.video_root is None):
        raise ValueError("--dataset jsonl needs --annotations FILE and --video-root FOLDER")
    if dataset not in ("motion", "jsonl") and options.data_root is None:
        raise ValueError(f"--dataset {dataset} needs --data-root, the folder of its annotation files")
    preset = PRESETS["motion"] if dataset == "motion" else {**PRESETS["published"], **PRESETS[dataset]}
    if options.model == "open_clip:tiny":  # another data set with the small model: train it as motion does
        small = {key: value for key, value in PRESETS["motion"].items() if "split" not in key and key != "holdout"}
        preset = {**preset, **small}
    preset |= {"dataset": dataset, "output": Path("runs") / f"{dataset}-{options.method}"}
    if dataset == "motion":
        preset["data_root"] = Path("runs") / "motion-data"
    left_out = {field.name for field in fields(options) if getattr(options, field.name) is None}
    return replace(options, **{name: value for name, value in preset.items() if name in left_out})


def read_splits(options: Options) -> tuple[RetrievalSplit, RetrievalSplit | None, RetrievalSplit]:
    """Training, validation (or None) and test split."""
    if options.dataset == "jsonl":
        there = jsonl_splits(options.annotations)

        def read(name: str | None) -> RetrievalSplit:
            return read_jsonl(options.annotations, options.video_root, name)

        train = read("train" if "train" in there else None)
        val = read("val") if "val" in there else None
        test = read("test") if "test" in there else train
    else:
        if options.dataset == "motion":
            render_motion(options.data_root)
        dataset = "msrvtt" if options.dataset == "motion" else options.dataset

        def read(name: str | None) -> RetrievalSplit:
            return load_split(dataset, options.data_root, name, options.video_root)

        train, test = read(options.train_split), read(options.test_split)
        val = read(options.val_split) if options.val_split else None
    if val is None and options.holdout:
        train, val = holdout_validation(train, options.holdout, options.seed)
    return train, val, test


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
        broken_log=options.output / "broken_videos.jsonl",
        cache=None if options.frame_cache == "none" else options.frame_cache,
    )


def build_optimizer(options: Options, model: RetrievalModel) -> torch.optim.Optimizer:
    groups = parameter_groups(model, options.lr, options.lr_new, options.weight_decay, is_new_parameter)
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups)
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=options.adam_eps)


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
        say(f"No --data-root given: training on the embedded data set motion, in {options.data_root}")
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
    main(tyro.cli(Options))
