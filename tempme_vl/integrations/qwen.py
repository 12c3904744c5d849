"""What the hosts of the Qwen family, and those built like them, share: a tower on grids of any shape with rotary
positions, a 2x2 merger, and positions of time, row and column (M-RoPE) in the language model, which are given for the
kept tokens. The model's own memory of them (`rope_deltas`) is what it would be of these inputs, for a second turn on
the cache of the first."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import BatchFeature
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tempme_vl.compressors import Clip, FrameFeatures, KeptFeatures, by_frame
from tempme_vl.compressors.base import Grid, Reading
from tempme_vl.compressors.dtd import pixels_of_patches
from tempme_vl.integrations import in_tower
from tempme_vl.integrations.base import Costs, Host, Request, SampledVideo, VisualTokens, listed, pooled
from tempme_vl.integrations.devices import as_input, running
from tempme_vl.integrations.in_tower import InTower
from tempme_vl.integrations.parts import KeptPart, blank, frame_size, join_kept, same_size
from tempme_vl.integrations.post_encoder import PostEncoderHost, clip_seconds
from tempme_vl.integrations.qwen_parts import check_tower
from tempme_vl.integrations.qwen_readings import READINGS, last_attention, readings, watched
from tempme_vl.integrations.qwen_tower import TubeOptions, run_tower
from tempme_vl.integrations.reduction import merge_pairs


class QwenHost(PostEncoderHost):
    """A host whose prompt has one run of tokens for a video, with a tower that sees temporal patches whole, as
    Qwen2-VL.

    Raises:
        ValueError: a transformers that cannot generate from positions of three axes.
    """

    projector: ClassVar[tuple[str, ...]] = ("merger",)
    oldest: ClassVar[str] = "5.14.1"  # of transformers, among those that were tried

    def __init__(self, model: Any, processor: Any, request: Request):
        self.slot_frames = processor.video_processor.temporal_patch_size
        self.inside = self._inside(model, request)
        self._recompute = False
        behind = request if self.inside is None else Request("none", request.num_frames)
        super().__init__(model, processor, behind)
        self.method = request.method
        if not hasattr(model, "_prepare_position_ids_for_generation"):
            raise ValueError(
                "generate() of this transformers loses the positions of time, row and column that kept tokens need; "
                f"update transformers to compress {type(model).__name__} ({self.oldest} is new enough)"
            )

    # ---- inside the tower

    @classmethod
    def _inside(cls, model: Any, request: Request) -> InTower | None:
        """What merges inside the tower; None where all of it is behind."""
        if request.where == "behind" or (request.where == "auto" and request.method == "none"):
            return None
        tower: Any = running(cls.tower_of(model))
        try:
            in_tower.check_request(request, type(model).__name__)
            check_tower(tower)
        except ValueError:
            if request.where == "tower":
                raise
            return None
        return InTower(request, len(tower.blocks))

    @classmethod
    def create(cls, model: Any, processor: Any, request: Request) -> Host:
        return cls(model, processor, request)

    def config(self) -> dict[str, Any]:
        return super().config() if self.inside is None else self.inside.config()

    def set_grad_checkpointing(self, enable: bool) -> None:
        self._recompute = enable

    def encode(self, videos: Sequence[SampledVideo], prompts: Sequence[str]) -> list[VisualTokens]:
        if self.inside is None or self.frames_at_once is not None:
            return super().encode(videos, prompts)
        return [
            self._inside_tokens(video, slots, grid, kept)
            for video, (slots, grid, kept) in zip(videos, self._merged(videos), strict=True)
        ]

    def _merged(self, videos: Sequence[SampledVideo], slots: int | None = None) -> list[tuple[int, Grid, KeptFeatures]]:
        """Of videos their slots, their grids, and what merging inside the tower leaves.

        Args:
            slots: of the video that they are parts of.
        """
        assert self.inside is not None
        values, tower, inside = self._values(videos), running(self.tower), self.inside
        grids = [(t, h, w) for t, h, w in values["video_grid_thw"].tolist()]
        shapes = [(t, (h // self._side, w // self._side)) for t, h, w in grids]
        plans = [inside.plan(slots or t, grid) for t, grid in shapes]
        how = TubeOptions(inside.options.attend, inside.options.compare, self._recompute)
        left = run_tower(tower, as_input(values["pixel_values_videos"], tower), grids, plans, how)
        return [(*shape, kept) for shape, kept in zip(shapes, left, strict=True)]

    def _inside_tokens(self, video: SampledVideo, slots: int, grid: Grid, kept: KeptFeatures) -> VisualTokens:
        """What is left of a slot, the runs that begin in it, stands where the slot stood; below what runs can reach,
        pairs of any places merge."""
        assert self.inside is not None
        most = self.inside.most(slots, grid)
        fewer = kept if most is None else merge_pairs(kept, most)
        return self.visual_tokens(video, slots, grid, by_frame(replace(fewer, clips=()), math.prod(grid)))

    def _values(self, videos: Sequence[SampledVideo]) -> BatchFeature:
        """What goes into the tower; frames of a part as large as in the whole."""
        size = same_size(self.preprocess, videos[0], self.pixel_limits)
        return self.preprocess([video.frames for video in videos], **size)

    @property
    def pixel_limits(self) -> Mapping[str, int]:
        """Pixels of a whole video, the fewest and the most, between which its preprocessing keeps it."""
        return self.processor.video_processor.size

    # ---- videos part by part

    def check_stream(self) -> None:
        if self.inside is None:
            super().check_stream()

    def cut(self, frame: tuple[int, int]) -> int:
        if self.inside is None:
            return super().cut(frame)
        return self.slot_frames * max(
            (step.clip for step in self.inside.plan(self.slots, self.grid(*frame)).steps), default=1
        )

    def held(self, frames: int, cut: int) -> int:
        """A last clip inside the tower may be short."""
        return super().held(frames, cut) if self.inside is None else 0

    def encode_part(self, part: SampledVideo, first: int) -> FrameFeatures | KeptPart:
        if self.inside is None:
            return super().encode_part(part, first)
        ((slots, _, kept),) = self._merged([self.whole_slots(part)], self.slots)
        return KeptPart(kept, slots)

    def join_parts(self, parts: Sequence[Any], video: SampledVideo) -> VisualTokens:
        if self.inside is None:
            return super().join_parts(parts, video)
        grid = self.grid(*frame_size(video))
        return self._inside_tokens(video, sum(part.slots for part in parts), grid, join_kept(parts, math.prod(grid)))

    def count(self, height: int, width: int) -> tuple[int, int | None]:
        native, ours = super().count(height, width)
        return native, ours if self.inside is None else self.inside.count(self.slots, self.grid(height, width))

    def costs(self, frame: tuple[int, int] | None = None) -> Costs:
        costs = super().costs(frame)
        if self.inside is None:
            return costs
        # each block costs as its tokens do: those of a slot attend to as many as before
        grid = self.grid(*costs.frame)
        tokens = self.inside.by_layer(self.slots, grid)
        return replace(costs, tower=costs.native_tower * sum(tokens) / (len(tokens) * self.slots * math.prod(grid)))

    # ---- facts of the host

    @staticmethod
    def tower_of(model: Any) -> nn.Module:
        return model.model.visual

    @property
    def readings(self) -> tuple[Reading, ...]:
        """Of a tower that `run_tower` knows; of the attention of the last block where that sees whole frames."""
        try:
            check_tower(running(self.tower))
        except ValueError:
            return ()
        vision = self.model.config.vision_config
        whole = vision.depth - 1 in getattr(vision, "fullatt_block_indexes", [vision.depth - 1])
        return READINGS if whole else ("pixels",)

    @property
    def _side(self) -> int:
        """Patches of a token's side."""
        return self.model.config.vision_config.spatial_merge_size

    def grid(self, height: int, width: int) -> tuple[int, int]:
        _, rows, columns = self.preprocess([blank(self.num_frames, height, width)])["video_grid_thw"][0].tolist()
        return rows // self._side, columns // self._side

    def attended(self, grid: tuple[int, int]) -> tuple[int, float]:
        patches = grid[0] * grid[1] * self._side**2
        return patches, patches

    def features(self, videos: Sequence[SampledVideo]) -> list[FrameFeatures]:
        values = self._values(videos)
        pixels, grids = values["pixel_values_videos"], values["video_grid_thw"]
        tower, names = running(self.tower), self.reduction.reads
        with watched(tower, set(names) - {"pixels"}) as seen:
            output = self.model.model.get_video_features(as_input(pixels, self.tower), as_input(grids, self.tower))
        shapes = [(slots, rows, columns) for slots, rows, columns in grids.tolist()]
        attended = last_attention(tower, seen[0], shapes) if seen else [None] * len(shapes)
        patches = pixels.split([math.prod(shape) for shape in shapes])
        parts = zip(shapes, zip(*self.levels(output), strict=True), attended, patches, strict=True)
        features = []
        for (slots, rows, columns), levels, attention, own in parts:
            x, *deeper = (level.unflatten(0, (slots, -1)) for level in levels)
            grid = rows // self._side, columns // self._side
            known = {} if attention is None else readings(names, attention, x, self._side**2)
            if "pixels" in names:
                known["pixels"] = self._pixels(own, grid)
            features.append(FrameFeatures(x, grid, tuple(deeper), **known))
        return features

    def _pixels(self, patches: Tensor, grid: Grid) -> Tensor:
        """Of a video, as `FrameFeatures` has them."""
        processor = self.processor.video_processor
        return pixels_of_patches(patches, grid, processor.image_mean, processor.image_std)

    @staticmethod
    def levels(output: Any) -> list[Sequence[Tensor]]:
        """Features of each video for the first layer of the language model, and for deeper ones."""
        return [pooled(output)]

    def visual_tokens(self, video: SampledVideo, slots: int, grid: Grid, left: KeptFeatures) -> VisualTokens:
        rows, columns = grid
        # the host cuts fractions of positions off, and times out of seconds may lie a rounding below a whole one
        rounding = 1.0 if video.times is None else 1 + 1e-6
        return VisualTokens(
            left.x,
            {
                # runs of placeholders in the prompt: tokens before merging, and which of them are kept
                "runs": [(slots * rows * columns, left.source.tolist())],
                "grid": [slots, rows * self._side, columns * self._side],
                "slot_seconds": self.slot_frames * video.interval * rounding,
            },
        )

    def encoder_output(self, tokens: Sequence[VisualTokens]) -> BaseModelOutputWithPooling:
        return listed(tokens)

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
            if visuals  # some hosts have one token for both
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
        inputs = {"attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        if "mm_token_type_ids" in wanted:
            inputs["mm_token_type_ids"] = torch.tensor([kinds])
        if grids:
            inputs["video_grid_thw"] = torch.tensor(grids)
        if image_grids:
            inputs["image_grid_thw"] = torch.tensor(image_grids)
        for name in {"second_per_grid_ts", "second_per_grids"} & {*wanted} if grids else ():
            inputs[name] = torch.tensor(seconds)
        positions, _ = self.model.model.get_rope_index(torch.tensor([ids]), **inputs)
        return positions[:, 0]

    def facts(self) -> dict[str, str]:
        """Where text goes on behind a video, asked of the host's own function: versions of transformers, and servers,
        differ in it."""
        slots, side = 16, 4
        count, grid = slots * side**2, [slots, side * self._side, side * self._side]
        start = self.model.config.vision_start_token_id
        ids, kinds = [start, *[self.token_id] * count, 0], [0, *[2] * count, 0]
        positions = self._host_positions(ids, kinds, [grid], [1.0])
        video, behind = positions[:, 1:-1], int(positions[0, -1])
        ways = {
            int(video.max()) + 1: "behind the largest position of the video",
            int(video[1:].max()) + 1: "behind its rows and columns, whatever its time",
        }
        return {"text behind a video": ways.get(behind, f"at {behind} where a video's largest is {int(video.max())}")}

    def remember(self, inputs: Mapping[str, Any]) -> None:
        positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
        if positions is not None and mask is not None:  # else they are not from `prepare`, but of a second turn
            last = positions.masked_fill(mask == 0, 0).amax(dim=(0, 2))
            self.model.model.rope_deltas = (last + 1 - mask.sum(dim=1)).unsqueeze(1)


class QwenClipsHost(QwenHost):
    """One whose prompt writes a time for each temporal patch, and here for each clip, which has a run of tokens of its
    own, as Qwen3-VL."""

    uses_time = True

    def facts(self) -> dict[str, str]:
        return {}  # a temporal patch is by itself, and takes up rows and columns in all versions

    def clip_seconds(self, video: SampledVideo, slots: int, clips: Sequence[Clip]) -> list[float]:
        """The time that is written for each clip."""
        return clip_seconds(video, slots, clips)

    def visual_tokens(self, video: SampledVideo, slots: int, grid: Grid, left: KeptFeatures) -> VisualTokens:
        rows, columns = grid
        size = rows * columns
        sources = left.source.split([clip.tokens for clip in left.clips])
        return VisualTokens(
            left.x,
            {
                # a clip stands where one temporal patch stood, and its tokens keep their rows and columns
                "runs": [(size, (clip % size).tolist()) for clip in sources],
                "grid": [len(sources), rows * self._side, columns * self._side],
                "seconds": self.clip_seconds(video, slots, left.clips),
            },
        )

    def written(self, tokens: VisualTokens) -> str:
        start, end = self.processor.vision_start_token, self.processor.vision_end_token
        return "".join(
            f"<{second:.1f} seconds>{start}{self.placeholder * len(kept)}{end}"
            for second, (_, kept) in zip(tokens.extra["seconds"], tokens.extra["runs"], strict=True)
        )
