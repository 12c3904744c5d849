"""Qwen3-VL: as Qwen2.5-VL, with features for deeper layers of the language model (deepstack), which merge by the same
matches, and a prompt that writes its time in front of each temporal patch, and here of each clip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tempme_vl.integrations.base import Feed, SampledVideo, VisualTokens
from tempme_vl.integrations.post_encoder import ClipFeatures, FrameFeatures, clip_seconds
from tempme_vl.integrations.qwen2_5_vl import Qwen2_5_VLHost


@dataclass
class DeepstackOutput(BaseModelOutputWithPooling):
    """With a field of its own for the features of deeper layers, a list of videos each: those who make the inputs anew
    (accelerate's hooks, Trainer, chunked prefill) copy the fields of an output and nothing else."""

    deepstack_features: Any = None


class Qwen3VLHost(Qwen2_5_VLHost):
    oldest = "5.18.0"
    projector = ("merger", "deepstack_merger_list")
    feeds: ClassVar[tuple[Feed, ...]] = ("encoder_outputs",)  # features for deeper layers find no other way in

    def _check_times(self) -> None:
        """The prompt writes them."""

    def attended(self, grid: tuple[int, int]) -> tuple[int, float]:
        patches = grid[0] * grid[1] * self._side**2
        return patches, patches

    @staticmethod
    def levels(output: Any) -> list[Sequence[Tensor]]:
        return [output.pooler_output, *output.deepstack_features]

    def visual_tokens(self, video: SampledVideo, frames: FrameFeatures, clips: ClipFeatures) -> VisualTokens:
        slots, size, _ = frames.x.shape
        rows, columns = frames.grid
        return VisualTokens(
            clips.x.flatten(0, 1),
            {
                # a clip stands where one temporal patch stood, and its tokens keep their rows and columns
                "runs": [(size, [source % size for source in clip]) for clip in clips.source.tolist()],
                "grid": [len(clips.x), rows * self._side, columns * self._side],
                "seconds": clip_seconds(video, slots, len(clips.x)),
                "deeper": [level.flatten(0, 1) for level in clips.deeper],
            },
        )

    def written(self, tokens: VisualTokens) -> str:
        start, end = self.processor.vision_start_token, self.processor.vision_end_token
        return "".join(
            f"<{second:.1f} seconds>{start}{self.placeholder * len(kept)}{end}"
            for second, (_, kept) in zip(tokens.extra["seconds"], tokens.extra["runs"], strict=True)
        )

    def image_extra(self, number: int, values: Mapping[str, Tensor], output: Any) -> dict[str, Any]:
        deeper = [level[number] for level in output.deepstack_features]
        return {**super().image_extra(number, values, output), "deeper": deeper}

    def encoder_output(self, tokens: Sequence[VisualTokens]) -> BaseModelOutputWithPooling:
        deeper = [list(level) for level in zip(*(t.extra["deeper"] for t in tokens), strict=True)]
        features: Any = [t.features for t in tokens]
        return DeepstackOutput(pooler_output=features, deepstack_features=deeper)
