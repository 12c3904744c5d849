"""What every merging method is made of: steps that map a token state to one with fewer tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from tempme_vl.matching import MergeMap
from tempme_vl.merging.schedule import LayerPlan
from tempme_vl.state import AttentionContext, TokenState


class TokenMerger(nn.Module):
    """One step of a method. The base class leaves the state as it is.

    `forward(state, context)` returns a new state, made by `apply_merge` or by the state's own `keep`, `insert`,
    `join_clips`, `pool_prefix` and `regroup`. The context gives what tokens may be compared by: before attention, and
    behind a tower, the tokens themselves; between attention and MLP the attention that has just run.

    What a step learns lies in itself or in modules of its own, and is found there by walking modules: it learns at the
    rate of new modules, is saved, and is left out of the tower's own weights. Training with ZeRO-3 wants it in modules
    of its own, which the step calls.
    """

    def forward(self, state: TokenState, context: AttentionContext) -> TokenState:
        return state


@dataclass(frozen=True)
class LayerMerge:
    """The steps of one block: before attention, between attention and MLP, and behind the MLP.

    The context of the last is that of the attention of the same block, thus of the tokens that were in it: a method
    has a step between attention and MLP, or reads attention behind the MLP.
    """

    before_attention: TokenMerger = field(default_factory=TokenMerger)
    after_attention: TokenMerger = field(default_factory=TokenMerger)
    after_mlp: TokenMerger = field(default_factory=TokenMerger)


def no_clip_step(plan: LayerPlan, method: str) -> None:
    """For methods that never join clips: a plan that wants it would make predicted counts a lie.

    Raises:
        ValueError: the plan joins clips or merges before attention.
    """
    if plan.join is not None or plan.before:
        raise ValueError(f"method {method!r} does not join clips or merge before attention; its schedule has {plan}")


def apply_merge(state: TokenState, merge: MergeMap) -> TokenState:
    """Merges a state's tokens by size-weighted mean; sizes add up, sources follow."""
    if merge.src.shape[1] == 0:
        return state
    return state.regroup(
        *merge.weighted_mean(state.x, state.size), assignment=lambda: merge.assignment, base=lambda: merge.base
    )


def attention_of_cls(state: TokenState, context: AttentionContext) -> Tensor:
    """How a frame's CLS token attends to its patches, on average over the heads: (R, N - P) float, with gradient.

    EViT and DiffRate judge patches by it. The first of several prefix tokens is the CLS token.
    """
    return context.rows(0, 1)[:, :, 0, state.num_prefix :].mean(1)


def cls_row_cost(patches: int, width: int, head_width: int) -> int:
    """Multiply-accumulates of `attention_of_cls` for so many tokens: products with the keys, and their softmax."""
    return patches * (width + width // head_width)


def is_of_merging(model: nn.Module, name: str) -> bool:
    """Whether a weight of a model is a method's own and no tower's: whether it lies in a step, wherever that sits.

    Args:
        name: among the model's parameters and buffers.
    """
    module: object = model
    for part in name.split("."):
        if isinstance(module, TokenMerger):
            return True
        module = getattr(module, part, None)
    return False


def learnt_modules(blocks: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """The modules in the steps of blocks that hold learnt weights.

    Args:
        blocks: modules with `TokenMerger`s among their children.

    Returns:
        by the number of the block, and the place in it where a block has several; TempMe's clip positions, for
        example, by the numbers of the blocks that join clips.
    """
    return {key: block.get_submodule(path) for key, block, path in _places(blocks)}


def share_learnt(blocks: Iterable[nn.Module], modules: nn.ModuleDict) -> None:
    """Puts what `learnt_modules` gave of other blocks of the same method in the place of these blocks' own."""
    for key, block, path in list(_places(blocks)):
        parent, _, name = path.rpartition(".")
        setattr(block.get_submodule(parent), name, modules[key])


@runtime_checkable
class HasParts(Protocol):
    """A learnt module with values for each clip."""

    def part(self, frames: range, of: int) -> nn.Module:
        """The same for some frames of a video alone, whole clips, without gradient.

        Args:
            frames: their numbers; behind the last of the video the numbers start over.
            of: F, frames of the video.
        """
        ...


def learnt_of_part(modules: nn.ModuleDict, frames: range, of: int) -> nn.ModuleDict:
    """What `learnt_modules` gave, for some frames of a video alone; see `HasParts`. What has no parts is the same for
    all frames."""
    parts = {
        key: module.part(frames, of) if isinstance(module, HasParts) else module for key, module in modules.items()
    }
    return nn.ModuleDict(parts)


def _places(blocks: Iterable[nn.Module]) -> Iterable[tuple[str, nn.Module, str]]:
    for number, block in enumerate(blocks):
        steps = [(name, child) for name, child in block.named_children() if isinstance(child, TokenMerger)]
        inside = [entry for name, step in steps for entry in step.named_modules(prefix=name)]
        paths = [path for path, module in inside if next(module.parameters(recurse=False), None) is not None]
        for path in paths:
            yield str(number) if len(paths) == 1 else f"{number}_{path.replace('.', '_')}", block, path
