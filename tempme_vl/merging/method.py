"""The record of a merging method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, make_dataclass
from math import prod
from typing import Any, Literal

from tempme_vl.merging.base import LayerMerge
from tempme_vl.merging.budget import Knob, LimitKind
from tempme_vl.merging.schedule import Encoder, LayerCount, LayerPlan, MergeSchedule
from tempme_vl.schema import Layers, read

# Of a step's context: the tokens or keys, or what attention made of them
Reading = Literal["tokens", "keys", "cls_rows", "column_sums"]


def checked(method: str, options: Any) -> Any:
    """The same options, once each is of its annotated type and within its bounds.

    Raises:
        ConfigError: one that is not; names it.
    """
    return read(type(options), asdict(options), f"method {method!r}")


def pair_matching(plan: LayerPlan, count: LayerCount, width: int, head_width: int) -> int:
    """Multiply-accumulates of bipartite matching in one block, all clips: every token of one half is compared with
    every one of the other, by its features before attention and by head-mean keys after it.

    Args:
        width, head_width: of those features.
    """
    before = _pairs_compared(count.joined - count.prefix) * width if plan.before else 0
    after = _pairs_compared(count.attention - count.prefix) * head_width if plan.after else 0
    return count.clips * (before + after)


def _pairs_compared(patches: int) -> int:
    return (patches // 2) * (patches - patches // 2)


@dataclass(frozen=True)
class Behind:
    """A method on the features that a tower gives, where it cannot merge inside: frames or temporal patches without CLS
    tokens, and no attention.

    Attributes:
        options: a frozen dataclass, with the defaults for such hosts.
        schedule: (frames, rows and columns of a frame's tokens, options) -> its schedule, a step for a block.
        knobs: (frames, rows and columns) -> what is solved for to leave so many tokens at most, as in `Method`.
    """

    options: type
    schedule: Callable[[int, tuple[int, int], Any], MergeSchedule]
    knobs: Callable[[int, tuple[int, int]], Sequence[Sequence[Knob]]] | None = None


@dataclass(frozen=True)
class Method:
    """A merging method.

    Attributes:
        options: a frozen dataclass; those with a default need not be given.
        schedule: (encoder, options) -> its schedule.
        layer_merge: (schedule, number of a block, width) -> the modules of this block. What they need to know of the
            options beside the plan, `MergeSchedule.settings` says.
        published: options, by name, that its paper gives for an encoder; {} where it gives none.
        shaped: options that follow from the numbers of layers and frames, whatever a video may cost.
        knobs: what is solved for to stay below a limit: ways to do so, the preferred ones first, each a sequence of
            knobs in the order in which they are set.
        joint: whether it works on frames that attend jointly.
        divided: whether it works on towers of divided attention (`MergeSchedule.divided`), where its step before
            attention is told of the attention that frames have paid each other; with `joint`, also on joint towers with
            a CLS token of the video, whose tokens are in order of their places, the frames of each together.
        also: other names of options that are taken as well, as a paper or its code has them.
        matching: (plan, count, width, width of a head) -> multiply-accumulates in one block, beside the tower's own.
        divided_matching: the same on a tower of divided attention, where it is another number.
        reads: what its modules read of their context: refused where there is none of it.
        behind: how it works behind a tower, or why it does not; None for the schedule of a tower of `steps` blocks, an
            option more.
        apart: whether what becomes of the frames of a clip of the last block follows from these frames alone, so that a
            video can be encoded part by part. Modules with learnt values for each clip then have a `part`
            (`tempme_vl.merging.base.learnt_of_part`).
    """

    options: type
    schedule: Callable[[Encoder, Any], MergeSchedule]
    layer_merge: Callable[[MergeSchedule, int, int], LayerMerge]
    published: Callable[[Encoder], dict[str, Any]] = lambda encoder: {}
    shaped: Callable[[Encoder], dict[str, Any]] = lambda encoder: {}
    knobs: Callable[[Encoder, LimitKind], Sequence[Sequence[Knob]]] = lambda encoder, kind: ()
    joint: bool = True
    divided: bool = False
    also: Mapping[str, str] = field(default_factory=dict)
    matching: Callable[[LayerPlan, LayerCount, int, int], int] = pair_matching
    divided_matching: Callable[[LayerPlan, LayerCount, int, int], int] | None = None
    reads: tuple[Reading, ...] = ("keys",)
    behind: Behind | str | None = None
    apart: bool = False

    def usual(self, encoder: Encoder) -> dict[str, Any]:
        """Options that need not be given for an encoder: its class's defaults, and what shape and paper say."""
        defaults = {field.name: field.default for field in fields(self.options) if field.default is not MISSING}
        return {**defaults, **self.shaped(encoder), **self.published(encoder)}

    @property
    def option_names(self) -> tuple[str, ...]:
        return tuple(field.name for field in fields(self.options))

    def own_names(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options under the names that its class has.

        Raises:
            ValueError: one given under two names.
        """
        if twice := [f"{name} and {self.also[name]}" for name in options if self.also.get(name) in options]:
            raise ValueError(f"one option under two names: {', '.join(twice)}; give one of them")
        return {self.also.get(name, name): value for name, value in options.items()}

    def behind_tower(self) -> Behind:
        """How it works behind a tower.

        Raises:
            ValueError: it reads attention, and there is none; or it says itself why not.
        """
        if attention := [read for read in self.reads if read in ("cls_rows", "column_sums")]:
            raise ValueError(
                f"it reads attention ({', '.join(attention)}), and behind a tower none has run: choose a method that "
                "compares tokens, or a host that merges inside its tower"
            )
        if isinstance(self.behind, str):
            raise ValueError(self.behind)
        if self.behind is not None:
            return self.behind
        options = make_dataclass(
            "Options", [("steps", Layers, field(default=1))], bases=(self.options,), frozen=True, kw_only=True
        )
        return Behind(
            options, lambda frames, grid, given: self.schedule(Encoder(given.steps, frames, prod(grid), 0), given)
        )
