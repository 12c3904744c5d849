"""Writing a model for another runtime, and running the file beside torch before it gets its name."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tempme_vl.command import at_least
from tempme_vl.export.onnx import ExportError, Runner, load_onnx, to_onnx, write_onnx
from tempme_vl.export.openvino import load_openvino, write_openvino
from tempme_vl.export.options import ExportOptions, FormatName, Part
from tempme_vl.export.sides import Exportable, Side, TextSide, VideoSide, about
from tempme_vl.frontend import VisualFrontend
from tempme_vl.hub import find_folder
from tempme_vl.pretrained import load_kind
from tempme_vl.reports import show
from tempme_vl.tasks.retrieval import RetrievalConfig, load_retrieval_model
from tempme_vl.tasks.testa.retrieval import TestaRetrievalConfig
from tempme_vl.tasks.umt_retrieval import UMTRetrievalConfig

if TYPE_CHECKING:
    from onnx import ModelProto

TOLERANCE = 1e-4  # of an output's largest value


@dataclass(frozen=True)
class Format:
    """A file's form: its suffix, what must be installed, and what writes and loads it."""

    suffix: str
    packages: tuple[str, ...]
    write: Callable[[ModelProto, str, Path], None]
    load: Callable[[Path], Runner]


FORMATS: Mapping[FormatName, Format] = {
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), write_onnx, load_onnx),
    "openvino": Format(".xml", ("onnx", "onnxscript", "openvino"), write_openvino, load_openvino),
}


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        shapes: of inputs and outputs by name; "batch" stands for any number.
        differences: by output, the largest one from torch, as a share of the output's largest value.
    """

    file: Path
    shapes: dict[str, tuple[int | str, ...]]
    differences: dict[str, float]

    def __str__(self) -> str:
        lines = [f"  {name} ({', '.join(map(str, shape))})" for name, shape in self.shapes.items()]
        told = ", ".join(f"{name} {value:.1e}" for name, value in self.differences.items())
        return "\n".join([f"{self.file}:", *lines, f"largest difference from torch, of the largest value: {told}"])


def main(options: ExportOptions) -> None:
    show(str(export_model(options.checkpoint, options.out, options.format, options.part, options.batch_size)))


def export_model(
    model: str | Path | Exportable,
    file: str | Path,
    format: FormatName = "onnx",
    part: Part = "video",
    batch_size: int | None = 1,
) -> Exported:
    """Writes a front end, or one side of a retrieval model, as a file of another runtime, float32.

    The file is run beside torch on random inputs before it gets its name.

    Args:
        model: or the folder of one, or its name on the Hugging Face hub. Of a model with more than a tower, such as one
            that answers questions, a folder gives the tower.
        file: ends in .onnx, or in .xml for "openvino", which puts the weights into a .bin beside it.
        part: "video", pixels (B, F, 3, H, W) to `VideoSide`'s outputs, or of a retrieval model "text", ids and mask
            (B, L) to `TextSide`'s.
        batch_size: B; None for any.

    Raises:
        ExportError: a model that has no such form, or whose file gives other outputs; what is not installed.
        ValueError: see `load_retrieval_model` and `VisualFrontend.from_pretrained`.
    """
    at_least(1, batch_size=batch_size)
    way, file = _format(format, Path(file)), Path(file)
    side = _side(model, part)
    graph = to_onnx(side, batch_size)
    shapes = _shapes(graph)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as beside:
        made = Path(beside) / file.name
        way.write(graph, about(side, shapes, batch_size), made)
        found = differences(side, way.load(made), batch_size)
        if wrong := {name: value for name, value in found.items() if not value <= TOLERANCE}:
            raise ExportError(
                f"{format} makes other outputs of {side} than torch: {wrong}, as shares of their largest value; "
                f"expected at most {TOLERANCE}. No file was written: run the model in torch"
            )
        for name in sorted(os.listdir(beside), key=lambda name: name == file.name):  # what it reads first
            os.replace(Path(beside) / name, file.parent / name)
    return Exported(file, shapes, found)


def differences(side: Side, run: Runner, batch: int | None) -> dict[str, float]:
    """By output, the largest difference from torch on random inputs, as a share of the output's largest value.

    Two draws count. One whose matches hang on rounding, so that torch in float64 makes others, says nothing of the
    file and is left out, up to three of them.

    Args:
        run: what is compared.
        batch: B; None to try two numbers.
    """
    found: list[dict[str, float]] = []
    for seed in range(1, 6):
        inputs = side.example(batch or (1, 3)[len(found)], seed)
        expected = _outputs(side, inputs)
        made = run({name: value.numpy() for name, value in zip(side.inputs, inputs, strict=True)})
        apart = _apart({name: torch.from_numpy(made[name]) for name in expected}, expected)
        if max(apart.values()) <= TOLERANCE or not _hangs_on_rounding(side, inputs, expected) or seed == 5:
            found.append(apart)
        if len(found) == 2:
            break
    return {name: max(one[name] for one in found) for name in found[0]}


def _outputs(side: Side, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    with torch.no_grad():
        return side.named(*inputs)


def _apart(made: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    return {
        name: float((made[name].double() - value.double()).abs().max() / value.double().abs().max())
        for name, value in expected.items()
    }


def _hangs_on_rounding(side: Side, inputs: tuple[Tensor, ...], expected: Mapping[str, Tensor]) -> bool:
    exact = copy.deepcopy(side).double()
    precise = tuple(value.double() if value.is_floating_point() else value for value in inputs)
    return max(_apart(expected, _outputs(exact, precise)).values()) > TOLERANCE


def _format(name: FormatName, file: Path) -> Format:
    """Raises:
    ExportError: an unknown format, another suffix than its own, or what is not installed.
    """
    if name not in FORMATS:
        raise ExportError(f"expected a format among {', '.join(FORMATS)}; got {name!r}")
    way = FORMATS[name]
    if file.suffix != way.suffix:
        raise ExportError(f"a file of {name} ends in {way.suffix}; got {file}")
    if missing := [package for package in way.packages if find_spec(package) is None]:
        raise ExportError(f"{name} needs {', '.join(missing)}: pip install 'tempme_vl[export]'")
    return way


def _side(model: str | Path | Exportable, part: Part) -> Side:
    """Raises:
    ExportError: texts of a model that has none.
    """
    model = _load(model) if isinstance(model, str | Path) else copy.deepcopy(model)
    model = model.to("cpu", torch.float32).eval()
    if part == "video":
        return VideoSide(model).eval()
    if part != "text":
        raise ExportError(f"expected the part 'video' or 'text'; got {part!r}")
    if isinstance(model, VisualFrontend):
        raise ExportError("a front end has no texts: leave the part 'video', or export a retrieval model")
    return TextSide(model).eval()


def _load(source: str | Path) -> Exportable:
    directory = find_folder(source)
    if load_kind(directory) in (RetrievalConfig.kind, UMTRetrievalConfig.kind, TestaRetrievalConfig.kind):
        return load_retrieval_model(directory)
    return VisualFrontend.from_pretrained(directory)


def _shapes(graph: ModelProto) -> dict[str, tuple[int | str, ...]]:
    """Of inputs and outputs by name, "batch" for any number."""
    found = {}
    for value in (*graph.graph.input, *graph.graph.output):
        sizes = value.type.tensor_type.shape.dim
        found[value.name] = tuple(size.dim_param or size.dim_value for size in sizes)
    return found
