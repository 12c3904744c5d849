"""Options of writing a model for another runtime; plain data, read from a command line without importing torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tempme_vl.command_line import FIRST_WORD, Command, Example

FormatName = Literal["onnx", "openvino"]
Part = Literal["video", "text"]


@dataclass(frozen=True)
class ExportOptions:
    """Write a front end, or one side of a retrieval model, for onnxruntime or OpenVINO.

    The schedule of merging is fixed, so the file holds the whole forward pass, float32, of that number of frames. It is
    run beside torch before it gets its name: the largest difference is printed, and no file stays if that is too large.
    """

    checkpoint: str = field(metadata=FIRST_WORD)
    """A folder that save_pretrained wrote, such as a training run's OUTPUT/best, or a name on the Hugging Face hub."""
    out: Path
    """The file: .onnx, or .xml of OpenVINO, whose weights go into a .bin beside it."""
    format: FormatName
    """Of the file."""
    part: Part = "video"
    """Of a retrieval model: pixels to tokens and embedding, or ids of words to embedding."""
    batch_size: int | None = 1
    """Videos, or texts, that the file takes at a time. None: any number, which takes longer to export."""


EXPORT = Command(
    "export",
    ExportOptions,
    "tempme_vl.export.exporting:main",
    (
        Example("the videos' side", "runs/motion-tempme/best --format onnx --out video.onnx"),
        Example(
            "the texts' side, for OpenVINO",
            "runs/motion-tempme/best --format openvino --part text --out text.xml",
        ),
    ),
)
