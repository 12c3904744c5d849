"""Options of captioning; plain data, read from a command line without importing torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tempme_vl.command_line import FIRST_WORD, Command, Example
from tempme_vl.data.datasets import CAPTIONED
from tempme_vl.data.options import DataOptions


@dataclass(frozen=True)
class CaptionOptions(DataOptions):
    """Write captions of videos with a pre-trained model of TESTA.

    Of files, or of a split of a data set: then also the share of videos whose caption is one of theirs, word for word.
    """

    files: tuple[Path, ...] = field(default=(), metadata=FIRST_WORD)
    """Videos, or pictures as still ones."""
    checkpoint: Path = field(kw_only=True)
    """Folder that pre-training wrote, such as the OUTPUT/best of train pretraining; with --epochs 0 that makes one of a
    public file."""
    dataset: Annotated[str, CAPTIONED] | None = None
    """In place of files."""
    split: str | None = None
    """Default: the test split; of jsonl without any splits all videos."""
    beams: int = 3
    """Texts that are followed at a time; 1 takes the likeliest word each time."""
    most_words: int = 30
    """Word pieces of a caption at most, its start among them."""
    least_words: int = 10
    """And at least."""
    prompt: str = ""
    """What every caption begins with, and is left out: "a picture of " for a decoder that BLIP has fine-tuned."""
    batch_size: int = 8
    """Videos at a time."""
    frame_cache: Path | None = None
    """Folder that keeps decoded frames for the next time."""
    decode_timeout: float | None = 60.0
    """Seconds after which a decoder is ended; None decodes without a guard."""
    json: Path | None = None
    """Write the captions to this file."""


CAPTION = Command(
    "caption",
    CaptionOptions,
    "tempme_vl.evaluation.caption_command:main",
    (
        Example("two files", "a.mp4 b.mp4 --checkpoint runs/motion-pretraining/best"),
        Example(
            "your own videos, compared with their captions",
            "--checkpoint runs/pretraining/best --dataset jsonl --annotations videos.jsonl --video-root videos/",
        ),
    ),
)
