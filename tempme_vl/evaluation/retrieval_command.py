"""The evaluation of a retrieval checkpoint on one split (`tempme-vl eval retrieval`, eval/retrieval.py)."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from tempme_vl.command import at_least
from tempme_vl.data.datasets import Source
from tempme_vl.data.reader import VideoReader
from tempme_vl.data.retrieval import EvalCaptions, EvalVideos
from tempme_vl.data.splits import RetrievalSplit
from tempme_vl.data.transforms import VideoTransform
from tempme_vl.evaluation.options import RetrievalOptions
from tempme_vl.evaluation.reading import all_broken, check_reading, decode_timeout, own_log, unreadable
from tempme_vl.evaluation.rerank import rerank_embeddings, second_stage
from tempme_vl.evaluation.retrieval import Embeddings, embed, format_retrieval, retrieval_report
from tempme_vl.reports import finish, write_whole
from tempme_vl.tasks.retrieval import RetrievalModel, load_retrieval_model
from tempme_vl.training import distributed


def main(options: RetrievalOptions) -> None:
    at_least(0, rerank=options.rerank)
    check_reading(options)
    device = distributed.initialize()
    split = split_of(options)
    embeddings, report = evaluate(options, split, device)
    if not distributed.is_main():
        return
    file = options.save_embeddings
    more = [] if file is None else [partial(save_embeddings, file, embeddings, split)]
    finish(format_evaluation(report), report, options.json, *more)


def split_of(options: RetrievalOptions) -> RetrievalSplit:
    """The split to evaluate.

    Raises:
        ValueError: options that miss each other, and what the reader of the data set raises.
    """
    source = Source(options.dataset, options.data_root, options.video_root, options.annotations)
    return source.captions(options.split)


def evaluate(
    options: RetrievalOptions, split: RetrievalSplit, device: torch.device
) -> tuple[Embeddings, dict[str, Any]]:
    """Embeddings and report of a split, all ranks together and the same on every rank."""
    model = load_retrieval_model(options.checkpoint).to(device).eval()
    captions = EvalCaptions(split, model.words.tokenizer(model.input.max_words))
    head = model.head if isinstance(model, RetrievalModel) else None
    if options.save_embeddings is not None and head is not None and not head.products:
        raise ValueError(
            f"--save-embeddings writes one embedding a video; the head {head.name!r} compares more than that"
        )
    stage = second_stage(model) if options.rerank != 0 else None
    sampling = options.sampling or model.input.sampling
    with own_log() as log:
        reader = VideoReader(
            model.frontend.schedule.frames,
            VideoTransform(model.frontend.preprocessing, normalize=False),
            sampling=sampling,
            timeout=decode_timeout(options),
            on_broken=options.on_broken,
            broken_log=log,
            cache=options.frame_cache,
        )
        embeddings = embed(
            model,
            EvalVideos(split.videos, reader),
            captions,
            captions.video_of_caption,
            device,
            options.batch_size,
            options.workers,
            second=stage,
            head=head,
        )
        broken = all_broken(log)
    report: dict[str, Any] = {
        "checkpoint": str(options.checkpoint),
        "split": split.name,
        "note": split.note,
        "num_frames": reader.num_frames,
        "sampling": sampling,
        "ranks": distributed.world_size(),
        **retrieval_report(embeddings, options.dual_softmax),
        "broken_videos": broken,
    }
    if stage is not None:
        report["reranked"] = rerank_embeddings(stage, embeddings, device, options.rerank or stage.candidates)
    return embeddings, report


def save_embeddings(file: Path, embeddings: Embeddings, split: RetrievalSplit) -> None:
    """Writes video (V, E), text (Q, E), video_of_caption (Q,), valid (V,); ids and captions in the metadata."""
    assert embeddings.video is not None and embeddings.text is not None
    tensors = {
        "video": embeddings.video,
        "text": embeddings.text,
        "video_of_caption": embeddings.video_of_caption,
        "valid": embeddings.valid,
    }
    metadata = {
        "split": split.name,
        "video_ids": json.dumps([video.video_id for video in split.videos]),
        "captions": json.dumps([caption for texts in split.captions for caption in texts]),
    }
    write_whole(file, save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))


def format_evaluation(report: dict[str, Any]) -> str:
    """The report to read: what was evaluated and how, the metrics, and the videos that could not be read."""
    lines = [
        f"{report['split']}: {report['videos']} videos, {report['captions']} captions, "
        f"{report['unreadable_videos']} videos could not be read",
        f"checkpoint {report['checkpoint']}, {report['num_frames']} frames ({report['sampling']}), "
        f"dual softmax {'over all queries of the split' if report['dual_softmax'] else 'not used'}",
        format_retrieval(
            {
                "dual softmax" if report["dual_softmax"] else "plain": report,
                "re-ranked": report.get("reranked", {}),
            }
        ),
    ]
    lines[1:1] = [report["note"]] if report["note"] else []
    return "\n".join([*lines, *unreadable(report)])
