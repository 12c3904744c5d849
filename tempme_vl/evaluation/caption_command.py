"""Captions of videos (`tempme-vl caption`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tempme_vl.command import above_zero, at_least
from tempme_vl.data.datasets import Source
from tempme_vl.data.reader import VideoReader, broken_videos
from tempme_vl.data.splits import RetrievalSplit, Video
from tempme_vl.data.transforms import VideoTransform
from tempme_vl.evaluation.caption_options import CaptionOptions
from tempme_vl.evaluation.reading import own_log, unreadable
from tempme_vl.reports import finish
from tempme_vl.tasks.testa import TestaPretrainingModel
from tempme_vl.tasks.testa.captioning import TestaCaptioner
from tempme_vl.text.beams import Writing
from tempme_vl.text.tokenizers import END


def main(options: CaptionOptions) -> None:
    """ValueError for options that miss each other, and what the reader of a data set or of a folder raises."""
    at_least(1, batch_size=options.batch_size, beams=options.beams, most_words=options.most_words)
    at_least(0, least_words=options.least_words)
    above_zero(decode_timeout=options.decode_timeout)
    if bool(options.files) == (options.dataset is not None):
        raise ValueError("expected videos in front of the options, or --dataset: one of them")
    split = captions_of(options)
    videos = tuple(Video(str(file), file) for file in options.files) if split is None else split.videos
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = TestaPretrainingModel.from_pretrained(options.checkpoint).to(device).eval()
    captioner = model.captioner(options.prompt).eval()
    with own_log() as log:
        reader = VideoReader(
            model.frontend.schedule.frames,
            VideoTransform(model.frontend.preprocessing, normalize=False),
            sampling=model.input.sampling,
            timeout=options.decode_timeout,
            on_broken="raise" if split is None else "record",
            broken_log=log,
            cache=options.frame_cache,
        )
        texts = list(written(captioner, reader, videos, options, device))
        broken = broken_videos(log)
    report: dict[str, Any] = {
        "checkpoint": str(options.checkpoint),
        "captions": [{"video": video.video_id, "caption": text} for video, text in zip(videos, texts, strict=True)],
    }
    if split is not None:
        report |= {"split": split.name, "note": split.note, **agreement(captioner, texts, split)}
    report["broken_videos"] = broken
    finish(captions_shown(report), report, options.json)


def captions_of(options: CaptionOptions) -> RetrievalSplit | None:
    """The split whose videos are described; None for files.

    Raises:
        ValueError: what the reader of the data set raises.
    """
    if options.dataset is None:
        return None
    return Source(options.dataset, options.data_root, options.video_root, options.annotations).captions(options.split)


@torch.inference_mode()
def written(
    captioner: TestaCaptioner,
    reader: VideoReader,
    videos: tuple[Video, ...],
    options: CaptionOptions,
    device: torch.device,
) -> Iterator[str | None]:
    """A caption of each video, None for one that cannot be read.

    Raises:
        VideoError: the same, where the reader raises it.
    """
    writing = Writing(
        captioner.vocabulary.index(END),
        beams=options.beams,
        most=options.most_words,
        least=options.least_words,
    )
    for first in range(0, len(videos), options.batch_size):
        read = [reader(video) for video in videos[first : first + options.batch_size]]
        tokens = captioner({"video": torch.stack([one.video for one in read]).to(device)})["tokens"]
        for one, text in zip(read, captioner.caption(tokens, writing), strict=True):
            yield text if one.valid else None


def agreement(captioner: TestaCaptioner, texts: list[str | None], split: RetrievalSplit) -> dict[str, Any]:
    """How many of the captions are one of their video's, as the model would write these; of all videos."""
    said = [{captioner.as_written(text) for text in own} for own in split.captions]
    equal = [text in own for text, own in zip(texts, said, strict=True)]
    return {"videos": len(equal), "equal": sum(equal), "percent": 100 * sum(equal) / len(equal)}


def captions_shown(report: dict[str, Any]) -> str:
    """A line a video, and how many captions are known ones."""
    lines = [f"{Path(one['video']).name}: {one['caption']}" for one in report["captions"]]
    if "split" in report:
        lines += [report["note"]] if report["note"] else []
        share = f"{report['equal']} of {report['videos']} ({report['percent']:.2f} %)"
        lines.append(f"{report['split']}: captions that are one of the video's own, word for word: {share}")
    return "\n".join([*lines, *unreadable(report)])
