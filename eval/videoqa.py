"""Accuracy of answers to questions about videos: of any model's predictions, or of a model of this package.

Predictions, without a GPU, a model or torch:
    python eval/videoqa.py --predictions predictions.json --annotations MSRVTT-QA/test_qa.json --json report.json

With the answer list of the training split, for the ceiling of a classifier over its 1,500 most frequent answers:
    python eval/videoqa.py --predictions predictions.csv --annotations msrvtt_qa/test.csv \
        --vocabulary answers.json --vocabulary-size 1500

A model, on one process or several (for a retrieval model, which answers zero-shot, --vocabulary is what it tries):
    deepspeed --num_gpus 8 eval/videoqa.py --checkpoint runs/msrvtt_qa-decoder-tempme/best --dataset msrvtt_qa \
        --data-root /data/msrvtt --save-predictions predictions.json

Predictions: a JSON object {question id: answer}; a JSON list or JSON lines of {"question_id": ..., "answer": ...} or,
with the ground truth beside it, of {"id": ..., "answer": truth, "pred": ...}; csv alike. Annotations: MSRVTT-QA (JSON
or csv), MSVD-QA, ActivityNet-QA (NAME_q.json with NAME_a.json beside it), or one's own .jsonl file (file, question,
answer or answers, optional options, id and split).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tempme_vl.command import above_zero, at_least, run
from tempme_vl.data.videoqa import QASplit, read_jsonl, read_questions, read_split, read_vocabulary
from tempme_vl.evaluation.predictions import load_predictions
from tempme_vl.evaluation.videoqa import accuracy, table
from tempme_vl.reports import finish, write_json


@dataclass(frozen=True)
class Options:
    """Accuracy, overall and by type of question, in percent. Questions without a prediction count as wrong."""

    predictions: Path | None = None
    """Answers by question id: a JSON object or list, JSON lines, or a csv file."""
    prediction_key: str | None = None
    """The key or column of --predictions that holds the answers. Default: pred, prediction, output, response or
    another of tempme_vl.evaluation.predictions, else answer; the report says which."""
    id_key: str | None = None
    """The one that holds the question's id. Default: question_id, id, qid or questionId."""
    checkpoint: Path | None = None
    """Or the folder of a model, such as a training run's OUTPUT/best, to predict them."""
    annotations: Path | None = None
    """The questions of the split with their answers: .json, .csv or .jsonl. A model's videos: --video-root."""
    split: str | None = None
    """Of a .jsonl file, the lines of this split only; of --dataset, "test" by default."""
    vocabulary: Path | None = None
    """The answers the model can give, from the training split, the most frequent first: a JSON list or a text file
    with one a line. Gives the ceiling; a --checkpoint has its own."""
    vocabulary_size: int | None = None
    """Take that many answers from the front of --vocabulary."""
    normalize: bool = False
    """Compare without case, punctuation and leading articles, as is usual for generated answers. Default: exact."""
    json: Path | None = None
    """Write the report to this file."""

    dataset: Literal["motion", "msrvtt_qa", "msvd_qa", "activitynet_qa"] | None = None
    """For --checkpoint, instead of --annotations."""
    data_root: Path | None = None
    """Folder of its annotation files (and videos) in their public layout; for motion, where to render it."""
    video_root: Path | None = None
    """Folder of the videos, if it is not below --data-root."""
    save_predictions: Path | None = None
    """Write what a --checkpoint answers to this file, as --predictions reads it."""
    batch_size: int = 32
    """Clips or questions that a rank takes at once, 1 or more."""
    workers: int = 2
    """Loader processes a rank; 0 loads in the rank's own."""
    frame_cache: Path | None = None
    """Folder that keeps decoded frames for the next evaluation."""
    decode_timeout: float | None = 60.0
    """Seconds after which a decoder is ended."""
    local_rank: int = 0
    """Set by the deepspeed launcher."""


def main(options: Options) -> None:
    """ValueError for options that miss each other and for files that are not as described above."""
    if (options.predictions is None) == (options.checkpoint is None):
        raise ValueError("expected either --predictions, a file, or --checkpoint, the folder of a model")
    at_least(0, workers=options.workers)
    at_least(1, batch_size=options.batch_size)
    above_zero(decode_timeout=options.decode_timeout)
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
    lost = [f"could not read {name}: {cause}" for name, cause in report.get("broken_videos", {}).items()]
    finish("\n".join([table(report), *lost]), report, options.json, *more)


def score_predictions(options: Options) -> dict[str, Any]:
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


def score_checkpoint(options: Options) -> tuple[dict[str, Any], dict[str, str]] | None:
    """The report of a model's predictions and these, all ranks together; None on ranks other than the first."""
    from tempme_vl.data.reader import broken_clips
    from tempme_vl.evaluation.predict import predict
    from tempme_vl.pipeline import VideoQA
    from tempme_vl.training import distributed

    assert options.checkpoint is not None
    split = split_of(options)
    device = distributed.initialize()
    qa = VideoQA.from_pretrained(options.checkpoint, vocabulary_of(options) or (), device)
    with tempfile.TemporaryDirectory() as folder:
        # a rank's own log; what it holds goes into the report
        log = Path(folder) / "broken.jsonl"
        reader = replace(qa.reader, on_broken="record", broken_log=log, cache=options.frame_cache)
        reader.timeout = None if options.dataset == "motion" else options.decode_timeout
        predictions = predict(qa.model, qa.model, split, reader, device, options.batch_size, options.workers)
        logs = distributed.gather_objects(broken_clips(log))
    if not distributed.is_main():
        return None
    report = {
        "checkpoint": str(options.checkpoint),
        "num_frames": reader.num_frames,
        "sampling": reader.sampling,
        "ranks": distributed.world_size(),
        **accuracy(predictions, split, qa.answers or None, normalize=options.normalize),
        "broken_videos": {name: cause for log in logs for name, cause in log.items()},
    }
    return report, predictions


def split_of(options: Options) -> QASplit:
    """The questions that a model is asked, with where their videos lie."""
    if (options.annotations is None) == (options.dataset is None):
        raise ValueError("--checkpoint needs either --dataset or --annotations, a .jsonl file")
    if options.dataset is not None:
        default = Path("runs") / "motion-data" if options.dataset == "motion" else None
        root = options.data_root or default
        if root is None:
            raise ValueError(f"--dataset {options.dataset} needs --data-root, the folder of its annotation files")
        return read_split(options.dataset, root, options.split or "test", options.video_root)
    assert options.annotations is not None
    if options.annotations.suffix != ".jsonl" or options.video_root is None:
        raise ValueError(f"expected a .jsonl file and --video-root; got {options.annotations} (else use --dataset)")
    return read_jsonl(options.annotations, options.video_root, options.split)


def vocabulary_of(options: Options) -> tuple[str, ...] | None:
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


if __name__ == "__main__":
    run(main, Options)
