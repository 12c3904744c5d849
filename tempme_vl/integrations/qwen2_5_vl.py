"""Qwen2.5-VL: windows in the tower, and times in the positions of the language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers
from transformers import PreTrainedModel, ProcessorMixin

from tempme_vl.integrations.base import Request
from tempme_vl.integrations.qwen import QwenHost
from tempme_vl.integrations.tiny import SIDE, WIDTH, text_sizes, word_tokenizer

_CHAT = (  # of the tiny one
    "{% for message in messages %}USER: {% for part in message['content'] %}{% if part['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %} "
    "ASSISTANT:"
)


class Qwen2_5_VLHost(QwenHost):
    """Raises:
    ValueError: a transformers that cannot generate from positions of three axes, or that gets times wrong.
    """

    uses_time = True

    def __init__(self, model: Any, processor: Any, request: Request):
        super().__init__(model, processor, request)
        self._check_times()

    @property
    def positions_a_second(self) -> float:
        """How far apart in time the host puts frames a second apart."""
        return self.model.config.vision_config.tokens_per_second

    def _check_times(self) -> None:
        """Two temporal patches a minute apart, asked of the host's own function: huggingface/transformers issue 45381
        is that all patches of a video get one time."""
        side, minute = self._side, 60 * self.positions_a_second
        ids = [self.model.config.vision_start_token_id, self.token_id, self.token_id, 0]
        _, first, second, _ = self._host_positions(ids, [0, 2, 2, 0], [[2, side, side]], [60.0])[0].tolist()
        if second - first != int(minute):
            raise ValueError(
                f"get_rope_index of this transformers puts frames that lie a minute apart {second - first} positions "
                f"apart and not {int(minute)} (huggingface/transformers issue 45381, in 5.3 to 5.5): update "
                f"transformers to compress {type(self.model).__name__} ({self.oldest} is new enough)"
            )

    def attended(self, grid: tuple[int, int]) -> tuple[int, float]:
        vision = self.model.config.vision_config
        patches = grid[0] * grid[1] * self._side**2
        window = min(patches, (vision.window_size // vision.patch_size) ** 2)
        full = len(vision.fullatt_block_indexes) / vision.depth
        return patches, full * patches + (1 - full) * window

    @staticmethod
    def tiny(words: Sequence[str]) -> tuple[PreTrainedModel, ProcessorMixin]:
        named = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
        around = {f"vision_{side}_token": f"<|vision_{side}|>" for side in ("start", "end")}
        tokenizer = word_tokenizer(words, named | around)
        ids: dict[str, Any] = {f"{n}_id": tokenizer.convert_tokens_to_ids(word) for n, word in (named | around).items()}
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
        sizes: dict[str, Any] = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
        config = transformers.Qwen2_5_VLConfig(
            vision_config={
                "depth": 4,
                "hidden_size": WIDTH,
                "intermediate_size": 2 * WIDTH,
                "num_heads": 4,
                "out_hidden_size": WIDTH,
                "patch_size": 4,
                "temporal_patch_size": 2,
                "spatial_merge_size": 2,
                "window_size": 16,
                "fullatt_block_indexes": [1, 3],
                "tokens_per_second": 8,  # the embedded videos last 2 seconds, in which 2 a second tell 4 times apart
                "initializer_range": WIDTH**-0.5,
            },
            text_config={**text_sizes(tokenizer), "rope_parameters": rope, "rope_scaling": rope},
            tie_word_embeddings=False,
            **ids,
        )
        processor = transformers.Qwen2_5_VLProcessor(
            image_processor=transformers.Qwen2VLImageProcessor(**sizes),
            video_processor=transformers.Qwen2VLVideoProcessor(
                **sizes, size={"shortest_edge": 64, "longest_edge": SIDE * SIDE * 16}
            ),
            tokenizer=tokenizer,
            chat_template=_CHAT,
        )
        return transformers.Qwen2_5_VLForConditionalGeneration(config), processor
