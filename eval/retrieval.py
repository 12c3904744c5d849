"""Evaluates a retrieval checkpoint on one split.

What the first try of recipes/full_ft_msrvtt.py wrote (on the embedded data set):
    python eval/retrieval.py --checkpoint runs/motion-tempme/best --dataset motion

MSRVTT 1k-A, then with dual softmax (another setting: it sees all queries at once), on 8 GPUs:
    deepspeed --num_gpus 8 eval/retrieval.py --checkpoint runs/msrvtt-tempme/best --dataset msrvtt \
        --data-root /data/msrvtt --json report.json
    deepspeed --num_gpus 8 eval/retrieval.py --checkpoint runs/msrvtt-tempme/best --dataset msrvtt \
        --data-root /data/msrvtt --dual-softmax

Your own clips (one JSON object a line: file, caption or captions, optional start, end, split):
    python eval/retrieval.py --checkpoint DIR --dataset jsonl --annotations clips.jsonl --video-root clips/
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save

from tempme_vl.command import above_zero, at_least, run
from tempme_vl.data.datasets import Source, usual_splits
from tempme_vl.data.reader import ClipReader, broken_clips
from tempme_vl.data.retrieval import EvalCaptions, EvalClips
from tempme_vl.data.splits import RetrievalSplit
from tempme_vl.data.transforms import ClipTransform, Preprocess
from tempme_vl.evaluation.rerank import rerank_embeddings
from tempme_vl.evaluation.retrieval import Embeddings, embed, retrieval_report, table
from tempme_vl.reports import finish, write_whole
from tempme_vl.tasks.retrieval import load_retrieval_model
from tempme_vl.tasks.umt_retrieval import UMTRetrievalModel
from tempme_vl.training import distributed


@dataclass(frozen=True)
class Options:
    """Evaluate a retrieval checkpoint on one split of a data set, in both directions.

    The number of frames and the preprocessing are the checkpoint's.
    """

    checkpoint: Path
    """Folder that a retrieval model's save_pretrained wrote, such as a training run's OUTPUT/best."""
    dataset: Literal["motion", "msrvtt", "msvd", "activitynet", "didemo", "lsmdc", "jsonl"]
    data_root: Path | None = None
    """Folder of the annotation files (and videos) in their public layout; for motion, where to render it."""
    video_root: Path | None = None
    """Folder of the videos, if it is not below --data-root."""
    annotations: Path | None = None
    """The JSON-lines file of --dataset jsonl."""
    split: str | None = None
    """Default: the test split (msrvtt test_1k, activitynet val_1); of jsonl without any splits all clips."""
    sampling: Literal["fps1", "uniform", "segment"] | None = None
    """Which frames. Default: as in training."""
    dual_softmax: bool = False
    """Reweight scores by a softmax over all queries of the split; named in the report."""
    rerank: int = 128
    """UMT: candidates of each query that the fusion layers rank anew, both ways; 0 leaves it out."""
    save_embeddings: Path | None = None
    """Write the L2-normalised embeddings of clips and captions to this .safetensors file."""
    json: Path | None = None
    """Write the report to this file."""
    batch_size: int = 32
    """Clips or captions that a rank encodes at once, 1 or more."""
    workers: int = 2
    """Loader processes a rank; 0 loads in the rank's own."""
    frame_cache: Path | None = None
    """Folder that keeps decoded frames for the next evaluation."""
    on_broken: Literal["record", "raise"] = "record"
    """Videos that cannot be read: counted, listed and never found, or an error."""
    decode_timeout: float | None = 60.0
    """Seconds after which a decoder is ended."""
    local_rank: int = 0
    """Set by the deepspeed launcher."""


def main(options: Options) -> None:
    at_least(0, workers=options.workers, rerank=options.rerank)
    at_least(1, batch_size=options.batch_size)
    above_zero(decode_timeout=options.decode_timeout)
    device = distributed.initialize()
    split = read_split(options)
    embeddings, report = evaluate(options, split, device)
    if not distributed.is_main():
        return
    file = options.save_embeddings
    more = [] if file is None else [partial(save_embeddings, file, embeddings, split)]
    finish(describe(report), report, options.json, *more)


def read_split(options: Options) -> RetrievalSplit:
    """The split to evaluate.

    Raises:
        ValueError: options that miss each other, and what the reader of the data set raises.
    """
    default = Path("runs") / "motion-data" if options.dataset == "motion" else None
    source = Source(options.dataset, options.data_root or default, options.video_root, options.annotations)
    return source.read(options.split or usual_splits(options.dataset).test)


def evaluate(options: Options, split: RetrievalSplit, device: torch.device) -> tuple[Embeddings, dict[str, Any]]:
    """Embeddings and report of a split, all ranks together and the same on every rank."""
    model = load_retrieval_model(options.checkpoint).to(device).eval()
    captions = EvalCaptions(split, model.words.tokenizer(model.config["input"]["max_words"]))
    matcher = model if isinstance(model, UMTRetrievalModel) and options.rerank else None
    sampling = options.sampling or model.config["input"]["sampling"]
    with tempfile.TemporaryDirectory() as folder:
        # a rank's own log; what it holds goes into the report
        reader = ClipReader(
            model.frontend.schedule.frames,
            ClipTransform(Preprocess.from_dict(model.frontend.config["preprocess"])),
            sampling=sampling,
            timeout=None if options.dataset == "motion" else options.decode_timeout,
            on_broken=options.on_broken,
            broken_log=Path(folder) / "broken.jsonl",
            cache=options.frame_cache,
        )
        embeddings = embed(
            model,
            EvalClips(split.clips, reader),
            captions,
            captions.video_of_caption,
            device,
            options.batch_size,
            options.workers,
            keep_tokens=matcher is not None,
        )
        logs = distributed.gather_objects(broken_clips(Path(folder) / "broken.jsonl"))
    report = {
        "checkpoint": str(options.checkpoint),
        "split": split.name,
        "note": split.note,
        "num_frames": reader.num_frames,
        "sampling": sampling,
        "ranks": distributed.world_size(),
        **retrieval_report(embeddings, options.dual_softmax),
        **({"reranked": rerank_embeddings(matcher, embeddings, device, options.rerank)} if matcher else {}),
        "broken_videos": {name: cause for log in logs for name, cause in log.items()},
    }
    return embeddings, report


def save_embeddings(file: Path, embeddings: Embeddings, split: RetrievalSplit) -> None:
    """Writes video (V, E), text (Q, E), video_of_caption (Q,), valid (V,); ids and captions in the metadata."""
    tensors = {
        "video": embeddings.video,
        "text": embeddings.text,
        "video_of_caption": embeddings.video_of_caption,
        "valid": embeddings.valid,
    }
    metadata = {
        "split": split.name,
        "video_ids": json.dumps([clip.video_id for clip in split.clips]),
        "captions": json.dumps([caption for texts in split.captions for caption in texts]),
    }
    write_whole(file, save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))


def describe(report: dict[str, Any]) -> str:
    """The report to read: what was evaluated and how, the metrics, and the videos that could not be read."""
    lines = [
        f"{report['split']}: {report['videos']} videos, {report['captions']} captions, "
        f"{report['unreadable_videos']} videos could not be read",
        f"checkpoint {report['checkpoint']}, {report['num_frames']} frames ({report['sampling']}), "
        f"dual softmax {'over all queries of the split' if report['dual_softmax'] else 'not used'}",
        table(
            {
                "dual softmax" if report["dual_softmax"] else "plain": report,
                "re-ranked": report.get("reranked", {}),
            }
        ),
    ]
    lines[1:1] = [report["note"]] if report["note"] else []
    lines += [f"could not read {name}: {cause}" for name, cause in report["broken_videos"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main, Options)
