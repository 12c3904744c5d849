"""What `generate` of a model can be asked for with features that were made ahead, in this version of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from packaging.version import Version

PARTS = "5.23.0"  # of transformers: older ones give every part of a prompt the features of its first visual tokens
BEAMS = "5.19.0"  # older ones repeat each entry for the beams of a prompt, where there are several: each token


def check_generation(model: Any, inputs: Mapping[str, Any]) -> None:
    """Refuses what this transformers would write other words for than from the same features as embeddings.

    Args:
        model: whose `generate` it is.
        inputs: all of its arguments.

    Raises:
        ValueError: `prefill_chunk_size`; or several beams or answers where each token has an entry of its own, since
            prompts have unlike numbers of them.
    """
    outputs = inputs.get("mm_encoder_outputs")
    if outputs is None:
        return
    config = inputs.get("generation_config") or model.generation_config
    told = {name: inputs.get(name, getattr(config, name, None)) for name in _OPTIONS}
    if told["prefill_chunk_size"] is not None and _older_than(PARTS):
        raise ValueError(_refusal("gives every part of a prompt the features of its first visual tokens", told, PARTS))
    by_token = any(len(output.pooler_output) > len(inputs["input_ids"]) for output in outputs.values())
    if by_token and max(told["num_beams"] or 1, told["num_return_sequences"] or 1) > 1 and _older_than(BEAMS):
        raise ValueError(_refusal("mixes up the visual tokens of prompts with unlike numbers of them", told, BEAMS))


_OPTIONS = ("prefill_chunk_size", "num_beams", "num_return_sequences")


def _older_than(version: str) -> bool:
    return Version(transformers.__version__) < Version(version)


def _refusal(fault: str, told: Mapping[str, Any], version: str) -> str:
    given = ", ".join(f"{name}={value}" for name, value in told.items() if value is not None)
    return (
        f"transformers {transformers.__version__} {fault}, and writes other words; got {given}. Leave that out, update "
        f"transformers to {version}, or compress with feed='embeddings'"
    )
