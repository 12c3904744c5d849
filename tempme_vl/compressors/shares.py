"""How many tokens a share of a video is."""

from __future__ import annotations

from math import prod

from tempme_vl.compressors.base import Grid

_ROUNDING = 1e-9  # of a share that was computed from a number of tokens


def tokens_within(share: float, frames: int, grid: Grid, least: int, why: str) -> int:
    """The share of a video's T * S tokens, rounded down.

    Args:
        least: as few as the method can leave.
        why: it does not leave fewer.

    Raises:
        ValueError: a share of fewer, or of more than all.
    """
    tokens = frames * prod(grid)
    limit = int(share * tokens + _ROUNDING)
    if not least <= limit <= tokens:
        raise ValueError(
            f"expected a share from {least}/{tokens} to 1 for {frames} frames of {prod(grid)} tokens, since {why}; "
            f"got {share}: give a larger share, or take another method"
        )
    return limit


def retention_of(count: int, tokens: int) -> float:
    """A share of so many tokens that, rounded down, is a number of them: in the middle between this and the next, so
    that a share that is no exact number of the machine's does not become the number below."""
    return min((count + 0.5) / tokens, 1.0)


def frame_tokens(retention: float, tokens: int) -> int:
    """The tokens of a frame that a share of its S is, rounded down.

    Raises:
        ValueError: none.
    """
    if count := int(retention * tokens):
        return count
    raise ValueError(
        f"expected a retention that leaves each frame at least one of its {tokens} tokens, 1/{tokens} and more; got "
        f"{retention}"
    )
