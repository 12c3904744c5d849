"""Hosts whose towers need a whole grid (windows, rotary positions, pixel shuffle): the tower runs as it is, and what it
gives the language model becomes fewer behind it, by a `Reduction`.

A merging method does here what it does inside a tower: TempMe joins neighbouring clips and merges across and inside
them, ToMe merges inside each frame; all clips keep the same number of tokens, known ahead. A kept token stands where
the token stood that it continues.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from torch import Tensor, nn

from tempme_vl.compressors import Clip, FrameFeatures, KeptFeatures
from tempme_vl.compressors.base import Grid, Reading
from tempme_vl.integrations.base import Costs, Host, Request, SampledVideo, VisualTokens
from tempme_vl.integrations.costs import count_weights
from tempme_vl.integrations.parts import (
    KeptPart,
    check_reduces_parts,
    encode_by_parts,
    frame_size,
    join_features,
    join_kept,
)
from tempme_vl.integrations.places import in_frame
from tempme_vl.integrations.reduction import Place, reduction, saved_behind, saved_request

_TYPICAL = (360, 640)  # height and width of the frames that costs are told for


class PostEncoderHost(Host):
    """A host whose own tower runs, with merging behind it.

    A subclass says `features`, `grid`, `attended`, and how its prompts tell clips apart in `written`.

    Raises:
        ValueError: what `reduction` refuses, such as a number of frames that the options do not divide.
    """

    def __init__(self, model: Any, processor: Any, request: Request):
        super().__init__(model, processor, request.method, request.num_frames)
        place = Place(type(model).__name__, self.slots, model.config.get_text_config().hidden_size, self.readings)
        try:
            self.reduction = reduction(request, place)
        except ValueError as error:
            if self.slot_frames == 1:
                raise
            frames = f"{request.num_frames} frames are {self.slots} temporal patches to this host"
            raise ValueError(f"{frames}: {error}") from error
        self.merging, self.inner = self.reduction.merging, self.reduction.inner

    # ---- facts of a host

    @property
    def readings(self) -> tuple[Reading, ...]:
        """What `features` can give beside the features."""
        return ()

    slot_frames = 1  # frames that the tower joins by itself

    @property
    def tower_width(self) -> int:
        """D of the tower's tokens."""
        vision = self.model.config.vision_config
        return getattr(vision, "embed_dim", vision.hidden_size)  # Qwen2-VL's hidden_size is the language model's

    @abstractmethod
    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the tokens that the host's own way gives for a frame of a size in pixels."""

    @abstractmethod
    def features(self, videos: Sequence[SampledVideo]) -> list[FrameFeatures]:
        """What the host's own tower and projector give, and what else `self.reduction.reads`."""

    @abstractmethod
    def attended(self, grid: tuple[int, int]) -> tuple[int, float]:
        """Tokens in the tower's blocks for one slot, and those that each attends to, over all blocks on average."""

    # ---- the protocol

    @classmethod
    def create(cls, model: Any, processor: Any, request: Request) -> Host:
        if request.where == "tower":
            raise ValueError(
                f"nothing merges inside the tower of {type(model).__name__} here: expected where='behind' or 'auto'"
            )
        return cls(model, processor, request)

    @classmethod
    def restore(cls, model: Any, processor: Any, config: Mapping[str, Any]) -> Host:
        return cls(model, processor, saved_request(config))

    def config(self) -> dict[str, Any]:
        return saved_behind(self.reduction, self.num_frames)

    def encode(self, videos: Sequence[SampledVideo], prompts: Sequence[str]) -> list[VisualTokens]:
        if self.frames_at_once is not None:
            return encode_by_parts(self, videos)
        return [
            self._placed(video, len(frames.x), frames.grid, self.reduction.reduce(frames))
            for video, frames in zip(videos, self.features(videos), strict=True)
        ]

    def frames_of(self, x: Tensor, videos: Sequence[SampledVideo]) -> list[FrameFeatures]:
        """The features of each video out of (V * F, S, D) of all frames, where the tower sees frames one by one."""
        grids = [self.grid(*video.frames.shape[1:3]) for video in videos]
        return [FrameFeatures(*pair) for pair in zip(x.unflatten(0, (len(videos), -1)), grids, strict=True)]

    def _placed(self, video: SampledVideo, slots: int, grid: Grid, left: KeptFeatures) -> VisualTokens:
        """With the places that a method inside the language model reads."""
        tokens = self.visual_tokens(video, slots, grid, left)
        if self.inner is None:
            return tokens
        return VisualTokens(tokens.features, {**tokens.extra, "places": in_frame(left.source, prod(grid)).tolist()})

    def visual_tokens(self, video: SampledVideo, slots: int, grid: Grid, left: KeptFeatures) -> VisualTokens:
        """Adds what `written` wants to know: of every clip its tokens, and its time in seconds.

        Args:
            slots, grid: of the video before anything merged.
        """
        seconds = clip_seconds(video, slots, left.clips)
        return VisualTokens(left.x, {"clip_tokens": [clip.tokens for clip in left.clips], "seconds": seconds})

    def costs(self, frame: tuple[int, int] | None = None) -> Costs:
        frame = frame or _TYPICAL
        grid = self.grid(*frame)
        native, ours = self.count(*frame)
        blocks = max((m for m in self.tower.modules() if isinstance(m, nn.ModuleList)), key=len)
        tokens, attended = self.attended(grid)
        each = count_weights(blocks) + 2 * len(blocks) * attended * self.tower_width
        tower = self.slots * tokens * each / 1e9
        return Costs(native, ours, tower, tower, frame)

    # ---- videos part by part

    def check_cut(self) -> None:
        """The tower sees slots apart, and what becomes of their features, all methods say."""

    def check_stream(self) -> None:
        check_reduces_parts(self.reduction)

    def cut(self, frame: tuple[int, int]) -> int:
        return self.slot_frames * (self.reduction.cut(self.slots, self.grid(*frame)) or 1)

    def held(self, frames: int, cut: int) -> int:
        """A slot that is short needs no help."""
        return -self._slots_of(frames) % (cut // self.slot_frames) * self.slot_frames

    def _slots_of(self, frames: int) -> int:
        return -(-frames // self.slot_frames)

    def encode_part(self, part: SampledVideo, first: int) -> FrameFeatures | KeptPart:
        (frames,) = self.features([self.whole_slots(part)])
        if self.reduction.cut(self.slots, frames.grid) is None:
            return frames
        return KeptPart(self.reduction.reduce(frames, self.slots), len(frames.x))

    def whole_slots(self, part: SampledVideo) -> SampledVideo:
        """With the last frame as often as the tower's own preprocessing repeats it."""
        return part.held(-len(part.frames) % self.slot_frames)

    def join_parts(self, parts: Sequence[Any], video: SampledVideo) -> VisualTokens:
        grid, slots = self.grid(*frame_size(video)), self._slots_of(len(video.indices))
        if isinstance(parts[0], FrameFeatures):
            left = self.reduction.reduce(join_features(parts))
        else:
            left = join_kept(parts, prod(grid))
        return self._placed(video, slots, grid, left)

    # ---- counts

    @property
    def slots(self) -> int:
        """T, frames or temporal patches that the tower gives."""
        return self._slots_of(self.num_frames)

    def count(self, height: int, width: int) -> tuple[int, int | None]:
        """Visual tokens of a video with frames of this size: the host's own, and ours, None where the data decide.
        Computed, without the model."""
        grid = self.grid(height, width)
        return self.slots * prod(grid), self.reduction.count(self.slots, grid)


def slot_seconds(video: SampledVideo, slots: int) -> list[float]:
    """The times of a video's slots: of a frame, or the middle between the first and the last frame that it joins."""
    size = -(-len(video.indices) // slots)
    times = [*video.seconds, *[video.seconds[-1]] * (slots * size - len(video.indices))]
    return [(times[i] + times[i + size - 1]) / 2 for i in range(0, len(times), size)]


def clip_seconds(video: SampledVideo, slots: int, clips: Sequence[Clip]) -> list[float]:
    """The times of clips: the mean over the slots that they joined."""
    return clip_means(slot_seconds(video, slots), clips)


def clip_means(times: Sequence[float], clips: Sequence[Clip]) -> list[float]:
    """The mean over the slots of each clip, of one number for each slot."""
    return [sum(times[clip.first : clip.last + 1]) / (clip.last + 1 - clip.first) for clip in clips]
