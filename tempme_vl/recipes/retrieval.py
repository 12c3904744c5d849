"""Text-video retrieval: fine-tuning CLIP or UMT with TempMe (recipes/full_ft_msrvtt.py, recipes/peft_msrvtt.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from tempme_vl.data.datasets import Source, SplitNames, usual_splits
from tempme_vl.data.reader import ClipReader
from tempme_vl.data.retrieval import EvalCaptions, EvalClips, TrainPairs
from tempme_vl.data.splits import RetrievalSplit
from tempme_vl.data.transforms import ClipTransform, Preprocess
from tempme_vl.evaluation.rerank import rerank_embeddings
from tempme_vl.evaluation.retrieval import DIRECTIONS, embed, retrieval_report, selection_score, table
from tempme_vl.recipes.loop import fit
from tempme_vl.recipes.options import (
    LIMITS,
    RecipeOptions,
    TuningName,
    TuningOptions,
    VisualOptions,
    first_look,
    merged_by,
)
from tempme_vl.recipes.presets import DEEPSPEED, FROM_SCRATCH, MOTION, UMT
from tempme_vl.recipes.report import about_run, cost, write_report
from tempme_vl.recipes.start import announce, begin, check_files, facts, in_words
from tempme_vl.tasks.retrieval import (
    AnyRetrievalModel,
    create_retrieval_model,
    load_retrieval_model,
)
from tempme_vl.tasks.umt_retrieval import UMTRetrievalModel
from tempme_vl.training.engine import Trainer


@dataclass(frozen=True)
class Options(TuningOptions, VisualOptions, RecipeOptions):
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
        "deepspeed_config": DEEPSPEED / "zero1.json",
    }
    options = tyro.cli(Options, args=arguments, default=Options(**merged_by(preset, given)))
    if options.freeze is not None:
        options = replace(options, tuning="full" if options.freeze == "none" else options.freeze, freeze=None)
    options.tuned()  # both say what is wrong before anything starts
    source(options)
    if options.family.needs_vocabulary and options.chunks > 1:
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
    max_words = model.text.max_words(options.max_words or train.max_words)
    model.config["input"] = {"sampling": options.sampling, "max_words": max_words}
    tokenizer = model.words.tokenizer(max_words)
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

    def validate() -> tuple[float, dict[str, Any]]:
        assert val is not None
        report = evaluate(trainer.engine, val, reader, tokenizer, device, options.workers)
        return selection_score(report), {f"val_{way}_rsum": report[way]["rsum"] for way in DIRECTIONS if way in report}

    trained = fit(options, trainer, model, None if val is None else validate)
    if trained is None:
        return
    best = load_retrieval_model(options.output / "best").to(device)
    report = evaluate(best, test, reader, tokenizer, device, options.workers, options.rerank)
    report |= {
        "model": options.model,
        **about_run(options, trainer, trained, val),
        **cost(model.frontend),
    }
    rows = {options.method: report, f"re-ranked {options.rerank}": report.get("reranked", {})}
    heading = f"{test.name}: {test.note}" if test.note else test.name
    write_report(options, report, f"{heading}\n{table(rows)}")


def build_model(options: Options, train: RetrievalSplit) -> AnyRetrievalModel:
    vocabulary = None
    if options.family.needs_vocabulary:
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
