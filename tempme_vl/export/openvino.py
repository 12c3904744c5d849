"""OpenVINO: a graph of ONNX as its two files, .xml and .bin."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tempme_vl.export.onnx import KEY, Arrays, Runner

if TYPE_CHECKING:
    from onnx import ModelProto

Precision = Literal["f32", "bf16"]


def write_openvino(model: ModelProto, about: str, file: Path) -> None:
    """Writes a graph with what it says of itself, float32."""
    import openvino

    converted = openvino.convert_model(io.BytesIO(model.SerializeToString()))
    for node in converted.get_ops():
        if node.get_type_name() == "TopK":  # else equal values come in any order
            node.set_attribute("stable", True)
    converted.set_rt_info(about, KEY)
    openvino.save_model(converted, file, compress_to_fp16=False)


def load_openvino(file: Path, threads: int | None = None, precision: Precision = "f32") -> Runner:
    """A file in OpenVINO on the CPU.

    Args:
        threads: default: OpenVINO's choice.
        precision: what it computes in. Left to OpenVINO, that is bfloat16 on CPUs that have it.
    """
    import openvino

    limit = {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": precision, **limit})

    def run(inputs: Arrays) -> Arrays:
        made = compiled(dict(inputs), share_inputs=True)
        return {output.get_any_name(): made[output] for output in compiled.outputs}

    return run
