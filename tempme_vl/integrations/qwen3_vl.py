"""Qwen3-VL and Qwen3-VL-MoE: a time in front of each clip, and features for deeper layers of the language model
(deepstack), which merge by the same matches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tempme_vl.compressors import KeptFeatures
from tempme_vl.compressors.base import Grid
from tempme_vl.integrations.base import Feed, SampledVideo, VisualTokens
from tempme_vl.integrations.qwen import QwenClipsHost


@dataclass
class DeepstackOutput(BaseModelOutputWithPooling):
    """With a field of its own for the features of deeper layers, a list of videos each: those who make the inputs anew
    (accelerate's hooks, Trainer, chunked prefill) copy the fields of an output and nothing else."""

    deepstack_features: Any = None


class Qwen3VLHost(QwenClipsHost):
    oldest = "5.18.0"
    projector = ("merger", "deepstack_merger_list")
    feeds: ClassVar[tuple[Feed, ...]] = ("encoder_outputs",)  # features for deeper layers find no other way in

    @staticmethod
    def levels(output: Any) -> list[Sequence[Tensor]]:
        return [output.pooler_output, *output.deepstack_features]

    def visual_tokens(self, video: SampledVideo, slots: int, grid: Grid, left: KeptFeatures) -> VisualTokens:
        tokens = super().visual_tokens(video, slots, grid, left)
        return VisualTokens(tokens.features, {**tokens.extra, "deeper": list(left.deeper)})

    def image_extra(self, number: int, values: Mapping[str, Tensor], output: Any) -> dict[str, Any]:
        deeper = [level[number] for level in output.deepstack_features]
        return {**super().image_extra(number, values, output), "deeper": deeper}

    def encoder_output(self, tokens: Sequence[VisualTokens]) -> BaseModelOutputWithPooling:
        deeper = [list(level) for level in zip(*(t.extra["deeper"] for t in tokens), strict=True)]
        features: Any = [t.features for t in tokens]
        return DeepstackOutput(pooler_output=features, deepstack_features=deeper)
