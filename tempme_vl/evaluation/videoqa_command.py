"""Accuracy of anybody's predictions or of a checkpoint (`tempme-vl eval videoqa`, eval/videoqa.py).

Predictions are scored without importing torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from tempme_vl.data.datasets import Source
from tempme_vl.data.videoqa import QASplit, read_question_lines, read_questions, read_vocabulary
from tempme_vl.evaluation.options import VideoQAOptions
from tempme_vl.evaluation.predictions import load_predictions
from tempme_vl.evaluation.reading import all_broken, check_reading, decode_timeout, own_log, unreadable
from tempme_vl.evaluation.videoqa import accuracy, format_accuracy
from tempme_vl.registries import DATASETS
from tempme_vl.reports import finish, write_json


def main(options: VideoQAOptions) -> None:
    """ValueError for options that miss each other and for files that are not as described above."""
    if (options.predictions is None) == (options.checkpoint is None):
        raise ValueError("expected either --predictions, a file, or --checkpoint, the folder of a model")
    check_reading(options)
    more: list[Callable[[], object]] = []
    if options.checkpoint is None:
        report = score_predictions(options)
    else:
        scored = score_checkpoint(options)
        if scored is None:
            return
        report, predictions = scored
        if options.save_predictions is not None:
            more = [partial(write_json, options.save_predictions, predictions, indent=0)]
    finish("\n".join([format_accuracy(report), *unreadable(report)]), report, options.json, *more)


def score_predictions(options: VideoQAOptions) -> dict[str, Any]:
    if options.annotations is None:
        raise ValueError("--predictions needs --annotations, the questions with their answers")
    assert options.predictions is not None
    split = read_questions(options.annotations, options.split)
    predictions = load_predictions(options.predictions, options.prediction_key, options.id_key)
    predictions.refuse_ground_truth(split)
    return {
        "predictions": str(options.predictions),
        "prediction_key": predictions.prediction_key,
        "id_key": predictions.id_key,
        "predictions_read": predictions.in_words(),
        "annotations": str(options.annotations),
        **accuracy(predictions.answers, split, vocabulary_of(options), normalize=options.normalize),
    }


def score_checkpoint(options: VideoQAOptions) -> tuple[dict[str, Any], dict[str, str]] | None:
    """The report of a model's predictions and these, all ranks together; None on ranks other than the first."""
    from tempme_vl.evaluation.predict import predict
    from tempme_vl.pipeline import VideoQA
    from tempme_vl.training import distributed

    assert options.checkpoint is not None
    split = split_of(options)
    device = distributed.initialize()
    qa = VideoQA.from_pretrained(options.checkpoint, vocabulary_of(options) or (), device)
    with own_log() as log:
        reader = replace(qa.reader, on_broken="record", broken_log=log, cache=options.frame_cache)
        reader.timeout = decode_timeout(options)
        predictions = predict(qa.model, qa.model, split, reader, device, options.batch_size, options.workers)
        broken = all_broken(log)
    if not distributed.is_main():
        return None
    report = {
        "checkpoint": str(options.checkpoint),
        "num_frames": reader.num_frames,
        "sampling": reader.sampling,
        "ranks": distributed.world_size(),
        **accuracy(predictions, split, qa.answers or None, normalize=options.normalize),
        "broken_videos": broken,
    }
    return report, predictions


def split_of(options: VideoQAOptions) -> QASplit:
    """The questions that a model is asked, with where their videos lie."""
    both = options.dataset is not None and "annotations" in DATASETS[options.dataset].needs
    if (options.annotations is None) == (options.dataset is None) and not both:
        raise ValueError("--checkpoint needs either --dataset or --annotations, a .jsonl file")
    if options.dataset is not None:
        source = Source(options.dataset, options.data_root, options.video_root, options.annotations)
        return source.questions(options.split)
    assert options.annotations is not None
    if options.annotations.suffix != ".jsonl" or options.video_root is None:
        raise ValueError(f"expected a .jsonl file and --video-root; got {options.annotations} (else use --dataset)")
    return read_question_lines(options.annotations, options.video_root, options.split)


def vocabulary_of(options: VideoQAOptions) -> tuple[str, ...] | None:
    """The answers of --vocabulary, cut to --vocabulary-size."""
    size = options.vocabulary_size
    if options.vocabulary is None:
        if size is not None:
            raise ValueError("--vocabulary-size needs --vocabulary")
        return None
    answers = read_vocabulary(options.vocabulary)
    if size is not None and not 0 < size <= len(answers):
        raise ValueError(f"{options.vocabulary} has {len(answers)} answers; got --vocabulary-size {size}")
    return answers[:size]
