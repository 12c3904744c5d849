"""Qwen2.5-VL: windows and rotary positions in the tower, a 2x2 merger, and positions of time, row and column (M-RoPE)
in the language model, which are given for the kept tokens. The model's own memory of them (`rope_deltas`) is what it
would be of these inputs, for a second turn on the cache of the first."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tempme_vl.integrations.base import SampledVideo, VisualTokens, as_input, pooled
from tempme_vl.integrations.post_encoder import ClipFeatures, FrameFeatures, PostEncoderHost
from tempme_vl.integrations.tiny import SIDE, WIDTH, text_sizes, word_tokenizer

_CHAT = (  # of the tiny one
    "{% for message in messages %}USER: {% for part in message['content'] %}{% if part['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %} "
    "ASSISTANT:"
)


class Qwen2_5_VLHost(PostEncoderHost):
    """Raises:
    ValueError: a transformers that cannot generate from positions of three axes, or that gets times wrong.
    """

    uses_time = True
    projector: ClassVar[tuple[str, ...]] = ("merger",)
    oldest: ClassVar[str] = "5.14.1"  # of transformers, among those that were tried

    def __init__(self, model: Any, processor: Any, method: str, num_frames: int, options: Mapping[str, Any]):
        self.slot_frames = processor.video_processor.temporal_patch_size
        super().__init__(model, processor, method, num_frames, options)
        if not hasattr(model, "_prepare_position_ids_for_generation"):
            raise ValueError(
                "generate() of this transformers loses the positions of time, row and column that kept tokens need; "
                f"update transformers to compress {type(model).__name__} ({self.oldest} is new enough)"
            )
        self._check_times()

    def _check_times(self) -> None:
        """Two temporal patches a minute apart, asked of the host's own function: huggingface/transformers issue 45381
        is that all patches of a video get one time."""
        config, side = self.model.config, self._side
        minute = 60 * config.vision_config.tokens_per_second
        ids, kinds = [config.vision_start_token_id, self.token_id, self.token_id], [0, 2, 2]
        _, first, second = self._host_positions(ids, kinds, [[2, side, side]], [60.0])[0].tolist()
        if second - first != int(minute):
            raise ValueError(
                f"get_rope_index of this transformers puts frames that lie a minute apart {second - first} positions "
                f"apart and not {int(minute)} (huggingface/transformers issue 45381, in 5.3 to 5.5): update "
                f"transformers to compress {type(self.model).__name__} ({self.oldest} is new enough)"
            )

    @staticmethod
    def tower_of(model: Any) -> nn.Module:
        return model.model.visual

    @property
    def _side(self) -> int:
        """Patches of a token's side."""
        return self.model.config.vision_config.spatial_merge_size

    def grid(self, height: int, width: int) -> tuple[int, int]:
        blank = torch.zeros(self.num_frames, 3, height, width, dtype=torch.uint8)
        _, rows, columns = self.preprocess([blank])["video_grid_thw"][0].tolist()
        return rows // self._side, columns // self._side

    def attended(self, grid: tuple[int, int]) -> tuple[int, float]:
        vision = self.model.config.vision_config
        patches = grid[0] * grid[1] * self._side**2
        window = min(patches, (vision.window_size // vision.patch_size) ** 2)
        full = len(vision.fullatt_block_indexes) / vision.depth
        return patches, full * patches + (1 - full) * window

    def features(self, videos: Sequence[SampledVideo]) -> list[FrameFeatures]:
        values = self.preprocess([video.frames for video in videos])
        pixels, grids = values["pixel_values_videos"], values["video_grid_thw"]
        output = self.model.model.get_video_features(as_input(pixels, self.tower), as_input(grids, self.tower))
        features = []
        for (slots, rows, columns), levels in zip(grids.tolist(), zip(*self.levels(output), strict=True), strict=True):
            x, *deeper = (level.unflatten(0, (slots, -1)) for level in levels)
            features.append(FrameFeatures(x, (rows // self._side, columns // self._side), tuple(deeper)))
        return features

    @staticmethod
    def levels(output: Any) -> list[Sequence[Tensor]]:
        """Features of each video for the first layer of the language model, and for deeper ones."""
        return [pooled(output)]

    def visual_tokens(self, video: SampledVideo, frames: FrameFeatures, clips: ClipFeatures) -> VisualTokens:
        rows, columns = frames.grid
        # the host cuts fractions of positions off, and times out of seconds may lie a rounding below a whole one
        rounding = 1.0 if video.times is None else 1 + 1e-6
        return VisualTokens(
            clips.x.flatten(0, 1),
            {
                # runs of placeholders in the prompt: tokens before merging, and which of them are kept
                "runs": [(frames.x.shape[0] * frames.x.shape[1], clips.source.flatten().tolist())],
                "grid": [len(frames.x), rows * self._side, columns * self._side],
                "slot_seconds": self.slot_frames * video.interval * rounding,
            },
        )

    def encoder_output(self, tokens: Sequence[VisualTokens]) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(pooler_output=[t.features for t in tokens])  # type: ignore[arg-type]

    def image_extra(self, number: int, values: Mapping[str, Tensor], output: Any) -> dict[str, Any]:
        grid = values["image_grid_thw"][number].tolist()
        count = math.prod(grid) // self._side**2
        return {"runs": [(count, range(count))], "grid": grid}

    def extra_inputs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        tokens: Sequence[Sequence[VisualTokens]],
        images: Sequence[Sequence[VisualTokens]],
    ) -> dict[str, Tensor]:
        positions = input_ids.new_zeros(3, *input_ids.shape)
        for row, visuals in enumerate(zip(tokens, images, strict=True)):
            seen = attention_mask[row].bool()
            positions[:, row, seen] = self._positions(input_ids[row, seen].tolist(), *visuals).to(input_ids.device)
        return {"position_ids": positions}

    def _positions(self, ids: Sequence[int], videos: Sequence[VisualTokens], images: Sequence[VisualTokens]) -> Tensor:
        """(3, L): the host's own positions for the prompt before merging, of the tokens that are kept."""
        whole: list[int] = []
        kinds: list[int] = []  # 2 for a video's tokens, 1 for an image's, 0 for words
        kept: list[int] = []
        runs = {
            token: (kind, iter([run for visual in visuals for run in visual.extra["runs"]]))
            for token, kind, visuals in ((self.image_token_id, 1, images), (self.token_id, 2, videos))
        }
        at = 0
        while at < len(ids):
            if ids[at] in runs:
                kind, left = runs[ids[at]]
                if kinds and kinds[-1] == kind:
                    what = "images" if kind == 1 else "videos"
                    raise ValueError(f"two {what} stand side by side in a prompt; the host needs a token between them")
                full, places = next(left)
                kept += [len(whole) + place for place in places]
                whole += [ids[at]] * full
                kinds += [kind] * full
                at += len(places)
            else:
                kept.append(len(whole))
                whole.append(ids[at])
                kinds.append(0)
                at += 1
        grids = [video.extra["grid"] for video in videos]
        seconds = [video.extra.get("slot_seconds", 1.0) for video in videos]
        return self._host_positions(whole, kinds, grids, seconds, [image.extra["grid"] for image in images])[:, kept]

    def _host_positions(
        self,
        ids: Sequence[int],
        kinds: Sequence[int],
        grids: Sequence[Sequence[int]],
        seconds: Sequence[float],
        image_grids: Sequence[Sequence[int]] = (),
    ) -> Tensor:
        """(3, L): of time, row and column, by the host's own function.

        Args:
            kinds: of L ids, 2 for a video's tokens, 1 for an image's, 0 for words.
            grids: temporal patches, rows and columns of patches of each video.
            seconds: from one temporal patch to the next of each video.
            image_grids: 1, rows and columns of patches of each image.
        """
        wanted = inspect.signature(self.model.model.get_rope_index).parameters
        inputs = {"mm_token_type_ids": torch.tensor([kinds])} if "mm_token_type_ids" in wanted else {}
        if grids:
            inputs["video_grid_thw"] = torch.tensor(grids)
        if image_grids:
            inputs["image_grid_thw"] = torch.tensor(image_grids)
        if grids and "second_per_grid_ts" in wanted:
            inputs["second_per_grid_ts"] = torch.tensor(seconds)
        positions, _ = self.model.model.get_rope_index(torch.tensor([ids]), **inputs)
        return positions[:, 0]

    def remember(self, inputs: Mapping[str, Any]) -> None:
        positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
        if positions is not None and mask is not None:  # else they are not from `prepare`, but of a second turn
            last = positions.masked_fill(mask == 0, 0).amax(dim=(0, 2))
            self.model.model.rope_deltas = (last + 1 - mask.sum(dim=1)).unsqueeze(1)

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
                "tokens_per_second": 2,
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
