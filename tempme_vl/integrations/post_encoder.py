"""Hosts whose towers need a whole grid (windows, rotary positions, pixel shuffle): the tower runs as it is, and what it
gives the language model merges across neighbouring frames.

A method does here what it does inside a tower, by the same modules, a step here for a block there: TempMe joins
neighbouring clips and merges across and inside them, ToMe merges inside each frame. Features that merge weigh as many
as they hold. A kept token stands where the token stood that it continues, and all clips keep the same number of
tokens, known ahead.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from tempme_vl.integrations.base import Costs, Host, SampledVideo, VisualTokens
from tempme_vl.integrations.costs import count_weights
from tempme_vl.merging import METHODS, LayerMerge, MergeSchedule, learnt_modules, merge_layers, share_learnt
from tempme_vl.registry import UnknownName
from tempme_vl.schema import Range, read
from tempme_vl.state import AttentionContext, TokenState, at_least_float32

_TYPICAL = (360, 640)  # height and width of the frames that costs are told for
_GRID = (16, 16)  # tokens of a frame, where a plan is made that no video has asked for


@dataclass(frozen=True)
class _Saved:
    """tempme.json."""

    model: str
    method: str
    num_frames: Annotated[int, Range(1, 100_000)]
    options: Mapping[str, Any]


def options_of(method: str, given: Mapping[str, Any], place: str) -> Any:
    """The options of a method behind a tower (`tempme_vl.merging.Behind`), the defaults filled in.

    Args:
        place: to name in errors.

    Raises:
        ValueError: a method that does not work there; options that are unknown, missing or no such values.
    """
    try:
        kind = METHODS[method].behind_tower().options
    except UnknownName:
        raise
    except ValueError as error:
        raise ValueError(f"method {method!r} does not work behind a tower: {error}") from error
    names = [field.name for field in fields(kind)]
    if unknown := set(given) - set(names):
        raise ValueError(
            f"{place} merges behind its tower, where {method!r} takes {', '.join(names) or 'no options'}; "
            f"got {', '.join(sorted(unknown))}"
        )
    return read(kind, given, f"{place}, method {method!r}")


def make_plan(method: str, frames: int, tokens: int, options: Any) -> MergeSchedule:
    """The merging of one video.

    Args:
        frames: T, frames or temporal patches.
        tokens: S, tokens of each.
        options: what `options_of` gave, or a mapping of some of them.

    Raises:
        ValueError: options that do not fit.
    """
    if isinstance(options, Mapping):
        options = options_of(method, options, "a host")
    schedule = METHODS[method].behind_tower().schedule(frames, tokens, options)
    if any(plan.insert for plan in schedule.plan):
        raise ValueError(f"method {method!r} inserts tokens, which have no place among those of a host")
    return schedule


class MergedStep(nn.Module):
    """The steps of one block of a tower, where there is no block."""

    def __init__(self, merge: LayerMerge):
        super().__init__()
        self.before_attention, self.after_attention = merge.before_attention, merge.after_attention
        self.after_mlp = merge.after_mlp

    def forward(self, state: TokenState) -> TokenState:
        """After each step that merges, the tokens of a clip stand in the order of their places."""
        for step in (self.before_attention, self.after_attention, self.after_mlp):
            clips, (_, tokens, _) = state.num_clips, state.x.shape
            state = step(state, AttentionContext.of_tokens(state.x))
            if clips * tokens != state.num_clips * state.x.shape[1]:
                state = in_order(state)
        return state


def in_order(state: TokenState) -> TokenState:
    """The tokens of each clip by the places of those that they continue."""
    assert state.origin is not None
    return state.keep(state.origin.argsort(dim=1))


def merge_steps(schedule: MergeSchedule, width: int) -> nn.ModuleList:
    """The modules of a schedule, for features of a width."""
    return nn.ModuleList(MergedStep(merge) for merge in merge_layers(schedule, width))


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


def merge(frames: FrameFeatures, schedule: MergeSchedule, steps: Iterable[nn.Module] | None = None) -> ClipFeatures:
    """Merges features by a schedule without CLS tokens, compared by themselves.

    Features for deeper layers follow the same matches: the mean of those of the input tokens that a token holds.

    Args:
        steps: what `merge_steps` gave; default: new ones.

    Raises:
        ValueError: tokens that continue none, and so have no place.
    """
    state = TokenState.start(frames.x, len(frames.x), 0, trace_source=True)
    for step in merge_steps(schedule, frames.x.shape[-1]) if steps is None else steps:
        state = step(state)
    state = in_order(state)
    assert state.source is not None and state.origin is not None
    if (state.origin < 0).any():
        raise ValueError(f"method {schedule.method!r} makes tokens that have no place among those of a host")
    inputs = state.source.shape[1]
    first = inputs * torch.arange(len(state.x), device=state.x.device).unsqueeze(1)
    deeper = tuple(_mean_by_source(x.reshape(-1, inputs, x.shape[-1]), state) for x in frames.deeper)
    return ClipFeatures(state.x, state.origin + first, deeper)


def _mean_by_source(x: Tensor, state: TokenState) -> Tensor:
    """(C, S, D) of input tokens -> (C, K, D), the mean over those that each token holds."""
    source = state.source
    assert source is not None
    held = (source >= 0).unsqueeze(-1)
    wide = at_least_float32(x).where(held, 0)
    index = source.clamp(min=0).unsqueeze(-1)
    counts, sums = (t.new_zeros(*state.x.shape[:2], t.shape[-1]) for t in (wide[..., :1], wide))
    counts = counts.scatter_add(1, index, held.to(wide.dtype))
    sums = sums.scatter_add(1, index.expand_as(wide), wide)
    return (sums / counts).to(x.dtype)


class PostEncoderHost(Host):
    """A host whose own tower runs, with merging behind it.

    A subclass says `features`, `grid`, `attended`, and how its prompts tell clips apart in `written`.

    Args:
        options: those of the method behind a tower; see `options_of`.

    Raises:
        ValueError: unknown or missing ones, or a number of frames that they do not divide.
    """

    def __init__(self, model: Any, processor: Any, method: str, num_frames: int, options: Mapping[str, Any]):
        super().__init__(model, processor, method, num_frames)
        self.options = options_of(method, options, type(model).__name__)
        try:
            plan = self.plan((self.slots, *_GRID))
        except ValueError as error:
            if self.slot_frames == 1:
                raise
            raise ValueError(f"{num_frames} frames are {self.slots} temporal patches to this host: {error}") from error
        steps = merge_steps(plan, model.config.get_text_config().hidden_size)
        self.merging = nn.ModuleDict(learnt_modules(steps))

    # ---- facts of a host

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
        if saved.method not in METHODS:
            raise ValueError(f"'method': expected one of {', '.join(METHODS)}; got {saved.method!r}")
        names = [field.name for field in fields(METHODS[saved.method].behind_tower().options)]
        if missing := set(names) - saved.options.keys():
            raise ValueError(f"'options': expected {', '.join(names)}; missing {sorted(missing)}")
        return cls(model, processor, saved.method, saved.num_frames, saved.options)

    def config(self) -> dict[str, Any]:
        return {"method": self.method, "num_frames": self.num_frames, "options": asdict(self.options)}

    def encode(self, videos: Sequence[SampledVideo], prompts: Sequence[str]) -> list[VisualTokens]:
        return [
            self.visual_tokens(video, frames, self.merge(frames))
            for video, frames in zip(videos, self.features(videos), strict=True)
        ]

    def frames_of(self, x: Tensor, videos: Sequence[SampledVideo]) -> list[FrameFeatures]:
        """The features of each video out of (V * F, S, D) of all frames, where the tower sees frames one by one."""
        grids = [self.grid(*video.frames.shape[1:3]) for video in videos]
        return [FrameFeatures(*pair) for pair in zip(x.unflatten(0, (len(videos), -1)), grids, strict=True)]

    def merge(self, frames: FrameFeatures) -> ClipFeatures:
        """The features of a video, merged with what the method has learnt."""
        schedule = self.plan((len(frames.x), *frames.grid))
        steps = merge_steps(schedule, frames.x.shape[-1])
        share_learnt(steps, self.merging)
        return merge(frames, schedule, steps.to(frames.x.device))  # the model may have moved since

    def visual_tokens(self, video: SampledVideo, frames: FrameFeatures, clips: ClipFeatures) -> VisualTokens:
        """Adds what `written` wants to know: tokens of every clip, and its time in seconds."""
        seconds = clip_seconds(video, len(frames.x), len(clips.x))
        return VisualTokens(clips.x.flatten(0, 1), {"clip_tokens": clips.x.shape[1], "seconds": seconds})

    def costs(self, frame: tuple[int, int] | None = None) -> Costs:
        frame = frame or _TYPICAL
        grid = self.grid(*frame)
        native, ours = self.count(*frame)
        blocks = max((m for m in self.tower.modules() if isinstance(m, nn.ModuleList)), key=len)
        tokens, attended = self.attended(grid)
        each = count_weights(blocks) + 2 * len(blocks) * attended * self.tower_width
        tower = self.slots * tokens * each / 1e9
        return Costs(native, ours, tower, tower, frame)

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
