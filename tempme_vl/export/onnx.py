"""ONNX: the graph of a side of a model, and its file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from tempme_vl.export.sides import Side

if TYPE_CHECKING:
    from onnx import ModelProto

Arrays = Mapping[str, np.ndarray]
Runner = Callable[[Arrays], Arrays]  # inputs by name to outputs by name

LARGEST = 2**31 - 2**24  # bytes of weights: a file of ONNX holds 2 GiB
KEY = "tempme_vl"  # of what a file says of itself


class ExportError(ValueError):
    """A model that cannot be written for another runtime; says why, and what can."""


def to_onnx(side: Side, batch: int | None) -> ModelProto:
    """The forward pass of a side.

    Args:
        batch: videos or texts at a time; None for any number, "batch" in the shapes.

    Raises:
        ExportError: it runs what ONNX has no operator for, depends on a number of videos that is to be any, or is too
            large.
    """
    held = sum(value.numel() * value.element_size() for value in side.state_dict().values())
    if held > LARGEST:
        raise ExportError(
            f"{side} has {held / 2**30:.1f} GiB of weights; a file of ONNX holds 2: choose a smaller model"
        )
    inputs = side.example(batch or 2, seed=0)
    dimensions = None if batch else {name: {0: torch.export.Dim("batch", min=1)} for name in side.inputs}
    advice = f"run {side} in torch" if batch else "try a fixed number at a time, such as --batch-size 1"
    with torch.no_grad():
        outputs = list(side.named(*inputs))
        try:
            program = torch.export.export(side, inputs, dynamic_shapes=dimensions)
        except Exception as error:  # of many kinds, few of them public; the pass itself ran just above
            raise ExportError(f"torch.export cannot trace {side}: {_first_line(error)}; {advice}") from error
    _refuse_own_operators(program, side)
    try:
        exported = torch.onnx.export(
            program,
            dynamo=True,
            input_names=list(side.inputs),
            output_names=outputs,
            custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(f"ONNX has no form of {side}: {_first_line(_cause(error))}; {advice}") from error
    assert exported is not None
    return exported.model_proto if batch else _named(exported.model_proto)


def write_onnx(model: ModelProto, about: str, file: Path) -> None:
    """Writes a graph with what it says of itself."""
    from onnx import helper

    helper.set_model_props(model, {KEY: about})
    file.write_bytes(model.SerializeToString())


def load_onnx(file: Path, threads: int | None = None) -> Runner:
    """A file in onnxruntime on the CPU.

    Args:
        threads: default: onnxruntime's choice.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, dict(inputs)), strict=True))


def _named(model: ModelProto) -> ModelProto:
    """The same, its number of videos or texts called "batch" where inputs and outputs have it."""
    graph = model.graph
    given = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = re.sub(rf"\b{given}\b", "batch", size.dim_param)
    return model


def _stable_sort(self: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """ONNX has no sort; of equal values its TopK gives the one at the lower place first, as a stable sort does."""
    from onnxscript import opset18 as op

    size: Any = op.Constant(value_ints=[dim])
    return op.TopK(self, op.Gather(op.Shape(self), size), axis=dim, largest=int(descending), sorted=1)


def _refuse_own_operators(program: torch.export.ExportedProgram, side: Side) -> None:
    """Raises:
    ExportError: the graph calls an operator of this package, whose steps no tracer sees.
    """
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, fx.GraphModule)]
    called = {str(node.target).removesuffix(".default") for graph in graphs for node in graph.nodes}
    if own := sorted(name for name in called if name.startswith("tempme_vl.")):
        raise ExportError(
            f"{side} runs {', '.join(own)}, which stops when nothing changes any more and has no form in ONNX: choose "
            "a method without clustering, or run it in torch"
        )


def _cause(error: BaseException) -> BaseException:
    return error if error.__cause__ is None else _cause(error.__cause__)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
