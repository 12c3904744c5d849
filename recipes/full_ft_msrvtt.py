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

TempMe's own weights, or CLIP4Clip's, evaluated as they are; and a second stage on another data set:
    deepspeed recipes/full_ft_msrvtt.py --data-root /data/msrvtt --pretrained best.pth --epochs 0
    deepspeed recipes/full_ft_msrvtt.py --dataset didemo --data-root /data/didemo --pretrained runs/msrvtt-tempme/best

Your own clips (one JSON object a line: file, caption or captions, optional start, end, split):
    deepspeed recipes/full_ft_msrvtt.py --dataset jsonl --annotations clips.jsonl --video-root clips/
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from tempme_vl.command import run
from tempme_vl.data.datasets import Source, SplitNames, usual_splits
from tempme_vl.data.reader import ClipReader
from tempme_vl.data.retrieval import EvalCaptions, EvalClips, TrainPairs
from tempme_vl.data.splits import RetrievalSplit
from tempme_vl.data.transforms import ClipTransform, Preprocess
from tempme_vl.evaluation.rerank import rerank_embeddings
from tempme_vl.evaluation.retrieval import DIRECTIONS, embed, retrieval_report, selection_score, table
from tempme_vl.recipe import (
    FROM_SCRATCH,
    LIMITS,
    MOTION,
    UMT,
    DataOptions,
    ReadingOptions,
    TrainingOptions,
    TuningName,
    TuningOptions,
    VisualOptions,
    about_run,
    announce,
    begin,
    check_files,
    cost,
    export,
    facts,
    first_look,
    in_words,
    merged_by,
    say,
    write_report,
)
from tempme_vl.tasks.retrieval import (
    AnyRetrievalModel,
    create_retrieval_model,
    load_retrieval_model,
)
from tempme_vl.tasks.umt_retrieval import UMTRetrievalModel
from tempme_vl.text.tokenizers import caption_tokenizer
from tempme_vl.training.engine import Trainer

RECIPES = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Options(DataOptions, VisualOptions, TuningOptions, ReadingOptions, TrainingOptions):
    """Fine-tune CLIP or UMT with TempMe for text-video retrieval.

    The defaults shown are those of the data set and the model: --help together with --data-root, --dataset or --model
    shows its own. The options in use are written to OUTPUT/options.json.
    """

    dataset: Literal["motion", "msrvtt", "msvd", "activitynet", "didemo", "lsmdc", "jsonl"] = "msrvtt"
    """Default: motion, the embedded data set; msrvtt as soon as --data-root is given."""
    train_split: str = "train"
    """For example train_9k or train_7k on MSRVTT."""
    val_split: str | None = None
    """The data set's own validation split, to choose the best epoch by; else see holdout."""
    test_split: str = "test"
    """Looked at once, after training. For example test_1k or test_full on MSRVTT."""
    holdout: int = 0
    """Clips taken away from train to choose the best epoch by; 0 without a val_split takes the last epoch."""
    vocabulary: str | None = None
    """UMT's words: a folder with vocab.txt or a hub name; default: those of the training captions."""
    max_words: int | None = None
    """Words kept of a caption, start and end included; default: the data set's usual 32 or 64."""
    tuning: TuningName = "clip4clip"
    freeze: Literal["none", "clip4clip"] | None = None
    """The older name of --tuning: none is full."""
    chunks: int = 1
    """Gradient caching: encode a rank's batch in this many pieces, with the exact gradient of the whole."""
    rerank: int = 128
    """UMT: candidates of each query that the fusion layers rank anew in the test, both ways; 0 leaves it out."""


# What differs from the defaults above, which are CLIP4Clip's published full fine-tuning.
SMALL = {**FROM_SCRATCH, "tuning": "full"}
LARGE = {**UMT, "tuning": "full", "epochs": 10, "warmup": 0.0}
MODELS: dict[str, dict[str, Any]] = {
    "open_clip:tiny": SMALL,
    "umt:tiny": {**SMALL, "model": "umt:tiny"},
    "umt:b16": LARGE,
    "umt:l16": {**LARGE, "vocabulary": "bert-large-uncased", "epochs": 7, "warmup": 1 / 7},
}


def parse(arguments: list[str] | None = None, recipe: Mapping[str, Any] | None = None, suffix: str = "") -> Options:
    """Options from the command line, on top of the defaults of their data set and model.

    Args:
        recipe: what another recipe's defaults are, whatever the data set and the model.
        suffix: of the run folder's name.
    """
    given = first_look(arguments, ("dataset", "data-root", "model", "method", "tuning", "freeze", *LIMITS))
    if given.tuning and given.freeze:
        raise ValueError("--freeze is the older name of --tuning (none is full): give one of them")
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
        **(recipe or {}),
        "output": Path("runs") / f"{dataset}-{given.method or 'tempme'}{suffix}",
        "deepspeed_config": RECIPES / "ds" / "zero1.json",
    }
    options = tyro.cli(Options, args=arguments, default=Options(**merged_by(preset, given)))
    if options.freeze is not None:
        options = replace(options, tuning="full" if options.freeze == "none" else options.freeze, freeze=None)
    source(options)  # says what is missing before anything starts
    if options.is_umt and options.chunks > 1:
        raise ValueError("--chunks caches gradients of a contrastive loss alone; UMT also matches pairs: leave it 1")
    return options


def source(options: Options) -> Source:
    return Source(options.dataset, options.data_root, options.video_root, options.annotations)


def main(options: Options) -> None:
    device = begin(options)
    names = SplitNames(options.train_split, options.val_split, options.test_split, options.holdout)
    train, val, test = source(options).read_all(names, options.seed)
    check_files(options, train, val, test)
    model = build_model(options, train).to(device)
    preprocess = Preprocess.from_dict(model.frontend.config["preprocess"])
    max_words = min(options.max_words or train.max_words, model.text.context_length)
    model.config["input"] = {"sampling": options.sampling, "max_words": max_words}
    tokenizer = caption_tokenizer(model.vocabulary, max_words)
    reader = options.reader(model.frontend.schedule.frames, ClipTransform(preprocess), options.output)
    train_reader = replace(reader, transform=ClipTransform(preprocess, options.augment))

    trainer = Trainer(
        model,
        options.build_optimizer(model, model.is_new_parameter),
        TrainPairs(train, train_reader, tokenizer, options.seed),
        options.config(),
        facts(options, model.frontend.full_config(), train=train, val=val, test=test),
    )
    data = (
        f"train {train.name}: {len(train.clips)} clips, {train.num_captions} captions; "
        f"validation {'none' if val is None else f'{val.name}: {len(val.clips)} clips'}; "
        f"test {test.name}: {len(test.clips)} clips"
    )
    announce(options, in_words(options, model.frontend), data)

    def end_epoch() -> None:
        score = float(trainer.epoch)  # without a validation split the last epoch is the best
        if val is not None:
            report = evaluate(trainer.engine, val, reader, tokenizer, device, options.workers)
            score = selection_score(report)
            trainer.log(**{f"val_{way}_rsum": report[way]["rsum"] for way in DIRECTIONS if way in report})
        if trainer.is_best(score):
            export(trainer, model, options.output)

    last_step = trainer.total_steps if options.max_steps is None else options.max_steps
    start, start_step = time.perf_counter(), trainer.step
    for batch in trainer.batches(end_epoch):
        if trainer.step >= last_step:
            break
        trainer.update(batch, model.loss)
    seconds = time.perf_counter() - start

    if trainer.step < trainer.total_steps:
        trainer.save()
        say(f"stopped after {trainer.step} of {trainer.total_steps} steps; the test split was not looked at")
        return
    best = load_retrieval_model(options.output / "best").to(device)
    report = evaluate(best, test, reader, tokenizer, device, options.workers, options.rerank)
    report |= {
        "model": options.model,
        **about_run(options, trainer, None if val is None else val.name, start_step, seconds),
        **cost(model.frontend),
    }
    rows = {options.method: report, f"re-ranked {options.rerank}": report.get("reranked", {})}
    heading = f"{test.name}: {test.note}" if test.note else test.name
    write_report(options, report, f"{heading}\n{table(rows)}")


def build_model(options: Options, train: RetrievalSplit) -> AnyRetrievalModel:
    vocabulary = None
    if options.is_umt:
        words = [caption for captions in train.captions for caption in captions]
        vocabulary = options.words(words, options.vocabulary)
    model = create_retrieval_model(
        options.model, tuning=options.tuned(), vocabulary=vocabulary, **options.tower(train.num_frames)
    )
    model.set_grad_checkpointing(options.grad_checkpointing)
    return model


def evaluate(
    encoder: Any,
    split: RetrievalSplit,
    reader: ClipReader,
    tokenizer: Any,
    device: torch.device,
    workers: int,
    rerank: int = 0,
) -> dict[str, Any]:
    """Metrics of a split, all ranks together; `encoder` is a model or, without re-ranking, its DeepSpeed engine."""
    encoder.eval()
    captions, rerank = EvalCaptions(split, tokenizer), rerank if isinstance(encoder, UMTRetrievalModel) else 0
    clips = EvalClips(split.clips, reader)
    embeddings = embed(
        encoder, clips, captions, captions.video_of_caption, device, workers=workers, keep_tokens=rerank > 0
    )
    report = {"split": split.name, "note": split.note, **retrieval_report(embeddings)}
    return {**report, "reranked": rerank_embeddings(encoder, embeddings, device, rerank)} if rerank else report


if __name__ == "__main__":
    run(main, parse)
