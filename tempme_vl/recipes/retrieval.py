"""Text-video retrieval: fine-tuning CLIP, UMT or TESTA (recipes/full_ft_msrvtt.py, recipes/peft_msrvtt.py)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tempme_vl.data.dataset import SplitNames
from tempme_vl.data.reader import VideoReader
from tempme_vl.data.retrieval import EvalCaptions, EvalVideos, TrainPairs
from tempme_vl.data.splits import RetrievalSplit
from tempme_vl.data.transforms import VideoTransform
from tempme_vl.evaluation.rerank import rerank_embeddings, second_stage
from tempme_vl.evaluation.retrieval import DIRECTIONS, embed, format_retrieval, retrieval_report, selection_score
from tempme_vl.families import find_family
from tempme_vl.recipes.build import optimizer, tower, video_reader, words_of
from tempme_vl.recipes.loop import fit
from tempme_vl.recipes.options.retrieval import Options
from tempme_vl.recipes.report import about_run, cost, write_report, write_results
from tempme_vl.recipes.start import announce, begin, check_files, facts, in_words
from tempme_vl.tasks.inputs import Inputs
from tempme_vl.tasks.retrieval import (
    AnyRetrievalModel,
    RetrievalModel,
    create_retrieval_model,
    load_retrieval_model,
)
from tempme_vl.training.engine import Trainer


def main(options: Options) -> None:
    device = begin(options)
    names = SplitNames(options.train_split, options.val_split, options.test_split, options.holdout)
    train, val, test = options.source().all_captions(names, options.seed)
    check_files(options, train, val, test)
    model = build_model(options, train).to(device)
    preprocess = model.frontend.preprocessing
    max_words = model.text.max_words(options.max_words or train.max_words)
    model.input = Inputs(options.sampling, max_words)
    tokenizer = model.words.tokenizer(max_words)
    reader = video_reader(options, model.frontend.schedule.frames, VideoTransform(preprocess, normalize=False))
    train_reader = replace(reader, transform=VideoTransform(preprocess, options.augment, normalize=False))

    trainer = Trainer(
        model,
        optimizer(options, model, model.is_new_parameter),
        TrainPairs(train, train_reader, tokenizer, options.seed),
        options,
        facts(options, model.frontend.full_config().to_dict(), train=train, val=val, test=test),
    )
    data = (
        f"train {train.name}: {len(train.videos)} videos, {train.num_captions} captions; "
        f"validation {'none' if val is None else f'{val.name}: {len(val.videos)} videos'}; "
        f"test {test.name}: {len(test.videos)} videos"
    )
    announce(options, in_words(options, model), data)

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
        "head": options.head,
        **about_run(options, trainer, trained, val),
        **cost(model),
    }
    again = report.get("reranked", {})
    rows = {options.method: report, f"re-ranked {again.get('rerank_top_k')}": again}
    heading = f"{test.name}: {test.note}" if test.note else test.name
    write_report(options, report, f"{heading}\n{format_retrieval(rows)}")
    ranks = {"R@1": "r1", "R@5": "r5", "R@10": "r10", "R-Sum": "rsum"}
    numbers = {f"{way} {name}": report[way][key] for way in DIRECTIONS if way in report for name, key in ranks.items()}
    write_results(options, model, test.name, numbers)


def build_model(options: Options, train: RetrievalSplit) -> AnyRetrievalModel:
    vocabulary = None
    if find_family(options.model).needs_vocabulary:
        words = [caption for captions in train.captions for caption in captions]
        vocabulary = words_of(options, words, options.vocabulary)
    model = create_retrieval_model(
        options.model,
        tuning=options.tuned(),
        head=options.head,
        vocabulary=vocabulary,
        **tower(options, train.num_frames),
        **options.of_head(),
        **options.of_contrast(),
    )
    if options.chunks > 1 and isinstance(model, RetrievalModel) and model.head.learns:
        raise ValueError(f"the weights of the head {options.head!r} see all pairs of a batch at once: leave --chunks 1")
    model.set_grad_checkpointing(options.grad_checkpointing)
    return model


def evaluate(
    encoder: Any,
    split: RetrievalSplit,
    reader: VideoReader,
    tokenizer: Any,
    device: torch.device,
    workers: int,
    rerank: int | None = 0,
) -> dict[str, Any]:
    """Metrics of a split, all ranks together; `encoder` is a model or, without re-ranking, its DeepSpeed engine.

    Args:
        rerank: candidates of a query for a model with a second stage; None for as many as that says, 0 for none.
    """
    encoder.eval()
    captions = EvalCaptions(split, tokenizer)
    videos, owners = EvalVideos(split.videos, reader), captions.video_of_caption
    model = getattr(encoder, "module", encoder)
    stage = second_stage(model) if rerank != 0 else None
    embeddings = embed(
        encoder,
        videos,
        captions,
        owners,
        device,
        workers=workers,
        second=stage,
        head=model.head if isinstance(model, RetrievalModel) else None,
    )
    report = {"split": split.name, "note": split.note, **retrieval_report(embeddings)}
    if stage is not None:
        report["reranked"] = rerank_embeddings(stage, embeddings, device, rerank or stage.candidates)
    return report
