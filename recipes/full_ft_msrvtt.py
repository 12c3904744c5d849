"""Full fine-tuning of CLIP or UMT with TempMe for text-video retrieval.

A first try, on any machine (renders its own small data set; 2 minutes on 2 CPU cores):
    deepspeed recipes/full_ft_msrvtt.py

MSRVTT-1kA, ViT-B/16, on 8 A100 (not yet measured; the paper reports R-Sum 210.2 for this setting on 4 GPUs):
    deepspeed --num_gpus 8 recipes/full_ft_msrvtt.py --data-root /data/msrvtt \
        --model open_clip:ViT-B-16-quickgelu --pretrained openai --deepspeed-config recipes/ds/zero2.json

The same on two nodes (hostfile: one line "worker-1 slots=8" a node; the data under the same path on both):
    deepspeed --hostfile hosts --num_nodes 2 --num_gpus 8 recipes/full_ft_msrvtt.py --data-root /data/msrvtt ...

UMT B/16 with its frames apart (UMT4Clip) and TempMe, from a public UMT checkpoint (not yet measured; paper: 209.2):
    deepspeed --num_gpus 8 recipes/full_ft_msrvtt.py --data-root /data/msrvtt --model umt:b16 --mode clip \
        --pretrained b16_25m.pth --lr 1e-5 --warmup 0.1 --deepspeed-config recipes/ds/zero2.json

Your own clips (one JSON object a line: file, caption or captions, optional start, end, split):
    deepspeed recipes/full_ft_msrvtt.py --dataset jsonl --annotations clips.jsonl --video-root clips/
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from tempme_vl.backbones import split_name
from tempme_vl.data.datasets import Source, SplitNames, usual_splits
from tempme_vl.data.reader import ClipReader, broken_clips
from tempme_vl.data.retrieval import EvalCaptions, EvalClips, TrainPairs
from tempme_vl.data.splits import RetrievalSplit
from tempme_vl.data.text import bert_vocabulary, caption_tokenizer, word_vocabulary
from tempme_vl.data.transforms import ClipTransform, Preprocess
from tempme_vl.evaluation.rerank import rerank_embeddings
from tempme_vl.evaluation.retrieval import embed, retrieval_report, table
from tempme_vl.tasks.retrieval import (
    AnyRetrievalModel,
    create_retrieval_model,
    freeze_as_clip4clip,
    is_new_parameter,
    load_retrieval_model,
)
from tempme_vl.tasks.umt_retrieval import UMTRetrievalModel
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
    """Fine-tune CLIP or UMT with TempMe for text-video retrieval.

    The defaults shown are those of the data set and the model: --help together with --data-root, --dataset or --model
    shows its own. The options in use are written to OUTPUT/options.json.
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
    """open_clip:NAME, umt:b16 or umt:l16; open_clip:tiny and umt:tiny train from scratch in minutes."""
    pretrained: str = "openai"
    """open_clip's tag ("openai"), a weights file (UMT: any of its public forms), or "none" for random weights."""
    mode: Literal["clip", "joint"] = "clip"
    """UMT's frames: apart (UMT4Clip, which TempMe needs), or attending together as in UMT itself."""
    vocabulary: str | None = None
    """UMT's words: a folder with vocab.txt or a hub name; default: those of the training captions."""
    method: Literal["tempme", "tome", "none"] = "tempme"
    """none encodes every frame by itself with all its tokens (mean pooling, CLIP4Clip's meanP)."""
    num_frames: int | None = None
    """Frames sampled from each clip; default: the data set's usual 12 or 64."""
    max_words: int | None = None
    """Words kept of a caption, start and end included; default: the data set's usual 32 or 64."""
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
    warmup: float = 0.1
    """Share of the steps in which the rate rises; it then falls along a cosine to lr_floor of its peak."""
    lr_floor: float = 0.0
    weight_decay: float = 0.2
    beta2: float = 0.98
    """AdamW's."""
    clip_grad: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """sgd is plain, for comparing runs exactly."""
    freeze: Literal["none", "clip4clip"] = "clip4clip"
    """clip4clip freezes token, position and class embeddings, conv1 and ln_pre, as its authors do; CLIP only."""
    augment: Literal["none", "randaugment", "crop_flip"] = "randaugment"
    """crop_flip mirrors clips: not where captions say left or right."""
    sampling: Literal["fps1", "uniform", "segment"] = "fps1"
    """Which frames: one a second (TempMe), evenly, or UMT's segments."""
    rerank: int = 128
    """UMT: candidates of each query that the fusion layers rank anew in the test, both ways; 0 leaves it out."""
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
MOTION = {"data_root": MOTION_ROOT, "frame_cache": str(MOTION_ROOT / "frames"), "max_words": 12}
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
UMT: dict[str, Any] = {  # as published, for 8 GPUs
    "pretrained": "none",
    "vocabulary": "bert-base-uncased",
    "epochs": 10,
    "batch_size": 256,
    "lr": 2e-5,
    "lr_new": 1e-4,  # ours: UMT has no clip positions
    "warmup": 0.0,
    "lr_floor": 0.01,
    "weight_decay": 0.02,
    "beta2": 0.999,
    "clip_grad": 0.0,
    "freeze": "none",
    "augment": "crop_flip",
    "sampling": "segment",
    "grad_checkpointing": True,
}
MODELS: dict[str, dict[str, Any]] = {
    "open_clip:tiny": FROM_SCRATCH,
    "umt:tiny": {**FROM_SCRATCH, "model": "umt:tiny"},
    "umt:b16": UMT,
    "umt:l16": {**UMT, "vocabulary": "bert-large-uncased", "epochs": 7, "warmup": 1 / 7},
}


def parse(arguments: list[str] | None = None) -> Options:
    """Options from the command line, on top of the defaults of their data set and model."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("dataset", "data-root", "model", "method"):
        first.add_argument(f"--{name}", f"--{name.replace('-', '_')}")
    given, _ = first.parse_known_args(arguments)
    dataset = given.dataset or ("motion" if given.data_root is None else "msrvtt")
    splits = usual_splits(dataset)
    preset: dict[str, Any] = {
        "dataset": dataset,
        "train_split": splits.train,
        "val_split": splits.val,
        "test_split": splits.test,
        "holdout": splits.holdout,
        **MODELS.get(given.model or ("open_clip:tiny" if dataset == "motion" else ""), {}),
        **(MOTION if dataset == "motion" else {}),
        "output": Path("runs") / f"{dataset}-{given.method or 'tempme'}",
    }
    options = tyro.cli(Options, args=arguments, default=Options(**preset))
    source(options)  # says what is missing before anything starts
    if options.model.startswith("umt:") and options.chunks > 1:
        raise ValueError("--chunks caches gradients of a contrastive loss alone; UMT also matches pairs: leave it 1")
    return options


def source(options: Options) -> Source:
    return Source(options.dataset, options.data_root, options.video_root, options.annotations)


def main(options: Options) -> None:
    device = distributed.initialize()
    if distributed.is_main():  # what became of every key of a UMT checkpoint
        logging.getLogger("tempme_vl.tasks").addHandler(logging.StreamHandler())
        logging.getLogger("tempme_vl.tasks").setLevel(logging.INFO)
    torch.manual_seed(options.seed)
    names = SplitNames(options.train_split, options.val_split, options.test_split, options.holdout)
    train, val, test = source(options).read_all(names, options.seed)
    model = build_model(options, train).to(device)
    preprocess = Preprocess.from_dict(model.frontend.config["preprocess"])
    max_words = min(options.max_words or train.max_words, model.text.context_length)
    model.config["input"] = {"sampling": options.sampling, "max_words": max_words}
    tokenizer = caption_tokenizer(model.vocabulary, max_words)
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
        trainer.update(batch, model.loss)
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
    best = load_retrieval_model(options.output / "best").to(device)
    report = evaluate(best, test, reader, tokenizer, device, options.rerank)
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
        rows = {options.method: report, f"re-ranked {options.rerank}": report.get("reranked", {})}
        say(f"\n{report['split']}; best epoch chosen on {report['selected_on']}\n{table(rows)}")
        if report["broken_videos"]:
            say(f"{len(report['broken_videos'])} videos could not be read: {options.output / BROKEN_VIDEOS}")


def build_model(options: Options, train: RetrievalSplit) -> AnyRetrievalModel:
    names = {
        "none": (),
        "tome": ("r",),
        "tempme": ("r", "merge_layers", "merge_frames", "cross_percent", "intra_percent"),
    }[options.method]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    vocabulary = None
    if split_name(options.model)[0] == "umt":
        given["mode"] = options.mode
        words = [caption for captions in train.captions for caption in captions]
        vocabulary = word_vocabulary(words) if options.vocabulary is None else bert_vocabulary(options.vocabulary)
    model = create_retrieval_model(
        options.model,
        None if options.pretrained == "none" else options.pretrained,
        options.method,
        options.num_frames or train.num_frames,
        options.clip_position_std,
        vocabulary,
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


def build_optimizer(options: Options, model: AnyRetrievalModel) -> torch.optim.Optimizer:
    groups = parameter_groups(model, options.lr, options.lr_new, options.weight_decay, is_new_parameter)
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups)
    return torch.optim.AdamW(groups, betas=(0.9, options.beta2), eps=1e-6, fused=True)


def config(options: Options) -> TrainConfig:
    return TrainConfig(
        output=options.output,
        deepspeed=options.deepspeed_config,
        epochs=options.epochs,
        batch_size=options.batch_size,
        chunks=options.chunks,
        warmup=options.warmup,
        lr_floor=options.lr_floor,
        clip_grad=options.clip_grad,
        precision=options.precision,
        seed=options.seed,
        workers=options.workers,
        save_every=options.save_every,
        resume=options.resume,
        tensorboard=options.tensorboard,
    )


def evaluate(
    encoder: Any, split: RetrievalSplit, reader: ClipReader, tokenizer: Any, device: torch.device, rerank: int = 0
) -> dict[str, Any]:
    """Metrics of a split, all ranks together; `encoder` is a model or, without re-ranking, its DeepSpeed engine."""
    encoder.eval()
    captions, rerank = EvalCaptions(split, tokenizer), rerank if isinstance(encoder, UMTRetrievalModel) else 0
    clips = EvalClips(split, reader)
    embeddings = embed(encoder, clips, captions, captions.video_of_caption, device, keep_tokens=rerank > 0)
    report = {"split": split.name, **retrieval_report(embeddings)}
    return {**report, "reranked": rerank_embeddings(encoder, embeddings, device, rerank)} if rerank else report


def export(options: Options, trainer: Trainer, model: AnyRetrievalModel) -> None:
    """Writes OUTPUT/best, which `RetrievalModel.from_pretrained` and eval/retrieval.py load."""
    state = trainer.full_state_dict()
    if distributed.is_main():
        replace_export(options.output / "best", trainer.step, lambda folder: model.save_pretrained(folder, state))
    distributed.barrier()


def announce(
    options: Options,
    model: AnyRetrievalModel,
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
