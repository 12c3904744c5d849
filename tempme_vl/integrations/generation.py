"""What `generate` of a model can be asked for with features that were made ahead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from packaging.version import Version

PARTS = "5.23.0"  # of transformers: older ones give every part of a prompt the features of its first visual tokens


def check_parts(model: Any, inputs: Mapping[str, Any]) -> None:
    """Raises ValueError: a prompt with features that is to be read in parts, in a transformers that mixes them up.

    Args:
        model: whose `generate` it is.
        inputs: all of its arguments.
    """
    config = inputs.get("generation_config") or model.generation_config
    size = inputs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
    if size is not None and "mm_encoder_outputs" in inputs and Version(transformers.__version__) < Version(PARTS):
        raise ValueError(
            f"transformers {transformers.__version__} gives every part of a prompt the features of its first visual "
            f"tokens, and writes other words: expected no prefill_chunk_size; got {size}. Leave it out, update "
            f"transformers to {PARTS}, or compress with feed='embeddings'"
        )
