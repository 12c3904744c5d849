"""Hosts whose towers need a whole grid (windows, rotary positions, pixel shuffle): the tower runs as it is, and what it
gives the language model merges across neighbouring frames.

The plan of a method is the one it has inside a tower, a step here for a block there: TempMe joins neighbouring clips
and merges across and inside them, ToMe merges inside each frame. Features that merge weigh as many as they hold. A
kept token stands where the token stood that it continues, and all clips keep the same number of tokens, known ahead.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from tempme_vl.integrations.base import Costs, Host, SampledVideo, VisualTokens, count_weights
from tempme_vl.matching import MergeMap, bipartite_match
from tempme_vl.merging import MergeSchedule
from tempme_vl.schema import Count, Layers, Range, Size, read

_TYPICAL = (360, 640)  # height and width of the frames that costs are told for

# the options of a method, and their defaults
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "tome": {"r": 16, "steps": 2},
    "tempme": {"merge_frames": [2, 2], "cross_percent": 40, "intra_percent": 10},
}


@dataclass(frozen=True)
class _Saved:
    """tempme.json."""

    model: str
    method: str
    num_frames: Annotated[int, Range(1, 100_000)]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class _Options:
    """All options of all methods; a method has some of them."""

    r: Count = 0
    steps: Layers = 1
    merge_frames: list[Size] = field(default_factory=list)
    cross_percent: Annotated[int, Range(0, 100)] = 0
    intra_percent: Annotated[int, Range(0, 100)] = 0


def make_plan(method: str, frames: int, tokens: int, options: Mapping[str, Any]) -> MergeSchedule:
    """The merging of one video.

    Args:
        frames: T, frames or temporal patches.
        tokens: S, tokens of each.
        options: all those of `OPTIONS[method]`.

    Raises:
        ValueError: options that do not fit.
    """
    if method == "tempme":
        joins = tuple(options["merge_frames"])
        if not joins:
            raise ValueError("merge_frames says how many clips each step joins, such as (2, 2); got none")
        percents = {key: options[key] for key in ("cross_percent", "intra_percent")}
        steps = {"merge_layers": tuple(range(len(joins))), "merge_frames": joins, **percents}
        return MergeSchedule.tempme(len(joins), frames, tokens, r=0, prefix=0, **steps)
    if method == "tome":
        return MergeSchedule.tome(options["steps"], frames, tokens, options["r"], prefix=0)
    return MergeSchedule.identity(1, frames, tokens, prefix=0)


@dataclass(frozen=True)
class FrameFeatures:
    """What a host's tower gives for one video.

    Attributes:
        x: (T, S, D) of T frames or temporal patches.
        grid: rows and columns of the S tokens.
        deeper: (T, S, D) each, for deeper layers of the language model.
    """

    x: Tensor
    grid: tuple[int, int]
    deeper: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class ClipFeatures:
    """C clips of K tokens.

    Attributes:
        x: (C, K, D).
        source: (C, K) int64, the token t * S + s that each continues, ascending.
        deeper: (C, K, D) each.
    """

    x: Tensor
    source: Tensor
    deeper: tuple[Tensor, ...] = ()


def merge(frames: FrameFeatures, schedule: MergeSchedule) -> ClipFeatures:
    """Merges features by a schedule without CLS tokens, compared by themselves."""
    source = torch.arange(frames.x.shape[0] * frames.x.shape[1], device=frames.x.device)
    size = torch.ones_like(source, dtype=torch.promote_types(frames.x.dtype, torch.float32))
    state = [*frames.deeper, frames.x]
    source, size = source.view(frames.x.shape[:2]), size.view(*frames.x.shape[:2], 1)
    for plan in schedule.plan:
        if plan.join is not None:
            # clips alternate, so that the two sets of a match of two clips are the two clips
            state = [_interleave(x, plan.join) for x in state]
            source, size = _interleave(source, plan.join), _interleave(size, plan.join)
        for pairs in (plan.before, plan.after):
            if pairs:
                state, source, size = _apply(bipartite_match(state[-1], pairs, num_prefix=0), state, source, size)
    return ClipFeatures(state[-1], source, tuple(state[:-1]))


def _interleave(x: Tensor, join: int) -> Tensor:
    """(C, N, ...) -> (C / join, N * join, ...), the clips' first tokens, then their second ones, and so on."""
    return x.unflatten(0, (-1, join)).transpose(1, 2).flatten(1, 2)


def _apply(
    match: MergeMap, state: Sequence[Tensor], source: Tensor, size: Tensor
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Merges, and puts the tokens of each clip in the order of their positions."""
    source, order = source.gather(1, match.base).sort(dim=1)
    rows = torch.arange(len(source), device=source.device).unsqueeze(1)
    merged = [match.weighted_mean(x, size)[0][rows, order] for x in state]
    return merged, source, match.sum(size)[rows, order]


class PostEncoderHost(Host):
    """A host whose own tower runs, with merging behind it.

    A subclass says `tower`, `features`, `grid`, and how its prompts tell clips apart in `written`.

    Args:
        options: those of the method; see `OPTIONS`.

    Raises:
        ValueError: unknown or missing ones, or a number of frames that they do not divide.
    """

    def __init__(self, model: Any, processor: Any, method: str, num_frames: int, options: Mapping[str, Any]):
        super().__init__(model, processor, num_frames)
        if method not in OPTIONS:
            raise ValueError(f"unknown method {method!r}; expected one of {', '.join(OPTIONS)}")
        unknown = set(options) - set(OPTIONS[method])
        if unknown:
            raise ValueError(
                f"{type(model).__name__} merges behind its tower, where {method!r} takes "
                f"{', '.join(OPTIONS[method]) or 'no options'}; got {', '.join(sorted(unknown))}"
            )
        self.method, self.options = method, {**OPTIONS[method], **options}
        if "merge_frames" in self.options:
            self.options["merge_frames"] = list(self.options["merge_frames"])
        try:
            self.plan((self.slots, 2, 2))
        except ValueError as error:
            if self.slot_frames == 1:
                raise
            raise ValueError(f"{num_frames} frames are {self.slots} temporal patches to this host: {error}") from error

    # ---- facts of a host

    slot_frames = 1  # frames that the tower joins by itself

    @property
    def tower(self) -> Any:
        """The vision tower."""
        return self.model.model.vision_tower

    @property
    def image_tower(self) -> Any:
        return self.tower

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
        """What the host's own tower and projector give."""

    @abstractmethod
    def attended(self, grid: tuple[int, int]) -> tuple[int, float]:
        """Tokens in the tower's blocks for one slot, and those that each attends to, over all blocks on average."""

    # ---- the protocol

    @classmethod
    def create(cls, model: Any, processor: Any, method: str, num_frames: int, options: Mapping[str, Any]) -> Host:
        return cls(model, processor, method, num_frames, options)

    @classmethod
    def restore(cls, model: Any, processor: Any, config: Mapping[str, Any]) -> Host:
        saved = read(_Saved, config, "the compression")
        if saved.method not in OPTIONS:
            raise ValueError(f"'method': expected one of {', '.join(OPTIONS)}; got {saved.method!r}")
        given = asdict(read(_Options, saved.options, "'options'"))
        options = {name: given[name] for name in saved.options}
        if missing := OPTIONS[saved.method].keys() - options.keys():
            raise ValueError(f"'options': expected {', '.join(OPTIONS[saved.method])}; missing {sorted(missing)}")
        return cls(model, processor, saved.method, saved.num_frames, options)

    def config(self) -> dict[str, Any]:
        return {"method": self.method, "num_frames": self.num_frames, "options": self.options}

    def encode(self, videos: Sequence[SampledVideo], prompts: Sequence[str]) -> list[VisualTokens]:
        return [
            self.visual_tokens(video, frames, merge(frames, self.plan((len(frames.x), *frames.grid))))
            for video, frames in zip(videos, self.features(videos), strict=True)
        ]

    def visual_tokens(self, video: SampledVideo, frames: FrameFeatures, clips: ClipFeatures) -> VisualTokens:
        """Adds what `written` wants to know: tokens of every clip, and its time in seconds."""
        seconds = clip_seconds(video, len(frames.x), len(clips.x))
        return VisualTokens(clips.x.flatten(0, 1), {"clip_tokens": clips.x.shape[1], "seconds": seconds})

    def costs(self) -> Costs:
        grid = self.grid(*_TYPICAL)
        native, ours = self.count(*_TYPICAL)
        blocks = max((m for m in self.tower.modules() if isinstance(m, nn.ModuleList)), key=len)
        tokens, attended = self.attended(grid)
        each = count_weights(blocks) + 2 * len(blocks) * attended * self.tower_width
        tower = self.slots * tokens * each / 1e9
        return Costs(native, ours, tower, tower, _TYPICAL)

    # ---- counts

    @property
    def slots(self) -> int:
        """T, frames or temporal patches that the tower gives."""
        return -(-self.num_frames // self.slot_frames)

    def plan(self, grid: tuple[int, int, int]) -> MergeSchedule:
        """The merging of a video of T slots of rows x columns of tokens."""
        return make_plan(self.method, grid[0], grid[1] * grid[2], self.options)

    def count(self, height: int, width: int) -> tuple[int, int]:
        """Visual tokens of a video with frames of this size: the host's own, and ours. Computed, without the model."""
        rows, columns = self.grid(height, width)
        return self.slots * rows * columns, self.plan((self.slots, rows, columns)).output_tokens


def slot_seconds(video: SampledVideo, slots: int) -> list[float]:
    """The times of a video's slots: of a frame, or the middle between the first and the last frame that it joins."""
    size = -(-len(video.indices) // slots)
    times = [*video.seconds, *[video.seconds[-1]] * (slots * size - len(video.indices))]
    return [(times[i] + times[i + size - 1]) / 2 for i in range(0, len(times), size)]


def clip_seconds(video: SampledVideo, slots: int, clips: int) -> list[float]:
    """The times of clips: the mean over the slots that they joined."""
    times, size = slot_seconds(video, slots), slots // clips
    return [sum(times[i : i + size]) / size for i in range(0, slots, size)]
