"""Which raw frames of a video are read: pure functions from a frame count to F sorted frame indices."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# (num_raw, fps, num_frames, rng or None) -> indices (num_frames,) int64, sorted, in [0, num_raw)
Sampler = Callable[[int, float, int, "np.random.Generator | None"], np.ndarray]


def sample_generator(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """The random generator of one sample in one epoch: the same on every rank, worker and resumed run."""
    return np.random.default_rng((seed, epoch, sample))


def uniform(num_raw: int, num_frames: int) -> np.ndarray:
    """`num_frames` indices from the first to the last raw frame, evenly spaced and truncated.

    Returns (num_frames,) int64, sorted; indices repeat where the video has fewer raw frames.
    """
    _check(num_raw, num_frames)
    return np.linspace(0, num_raw - 1, num_frames).astype(np.int64)


def strided(num_raw: int, num_frames: int) -> np.ndarray:
    """Frame i * N / F of N, rounded down: the last is one step before the end (TESTA's nlvl_uniform; what its code
    calls uniform cuts the step off, too, so that of 191 frames 96 are all of the first half). (num_frames,) int64.
    """
    _check(num_raw, num_frames)
    return np.arange(num_frames, dtype=np.int64) * num_raw // num_frames


def frames_per_second(num_raw: int, fps: float, num_frames: int) -> np.ndarray:
    """One frame a second, the rule of TempMe's code.

    Every `max(1, round(fps))`-th frame is a candidate. More candidates than `num_frames`: that many of them,
    uniformly. Fewer: uniform over all raw frames, so that short videos are still covered whole.
    Returns (num_frames,) int64, sorted.
    """
    _check(num_raw, num_frames)
    candidates = np.arange(0, num_raw, max(1, round(fps)))
    if len(candidates) < num_frames:
        return uniform(num_raw, num_frames)
    return candidates[uniform(len(candidates), num_frames)]


def segment_middle(num_raw: int, num_frames: int) -> np.ndarray:
    """The middle frame of each of `num_frames` equal segments (UMT's test sampling). (num_frames,) int64."""
    low, high = _segments(num_raw, num_frames)
    return (low + high) // 2


def segment_random(num_raw: int, num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """One random frame of each of `num_frames` equal segments (UMT's train sampling). (num_frames,) int64."""
    low, high = _segments(num_raw, num_frames)
    return rng.integers(low, high, endpoint=True)


def head_and_tail(num_raw: int, num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """As many random frames of the first half as of the second (TESTA's pre-training). (num_frames,) int64.

    An odd number has one more of the second. They are distinct where a half holds that many.
    """
    _check(num_raw, num_frames)
    middle, few = num_raw // 2, num_frames // 2
    halves = ((0, max(1, middle), few), (middle, num_raw, num_frames - few))
    drawn = [low + rng.choice(high - low, count, replace=count > high - low) for low, high, count in halves]
    return np.sort(np.concatenate(drawn)).astype(np.int64)


def _segments(num_raw: int, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last frame of each segment; a segment shorter than one frame still holds the one it starts in."""
    _check(num_raw, num_frames)
    edges = np.linspace(0, num_raw, num_frames + 1).astype(np.int64)
    low = np.minimum(edges[:-1], num_raw - 1)
    return low, np.maximum(low, edges[1:] - 1)


def _check(num_raw: int, num_frames: int) -> None:
    if num_raw < 1 or num_frames < 1:
        raise ValueError(f"sampling needs at least one raw frame and one wanted frame; got {num_raw} and {num_frames}")


def _fps1(num_raw: int, fps: float, num_frames: int, rng: np.random.Generator | None) -> np.ndarray:
    return frames_per_second(num_raw, fps, num_frames)


def _segment(num_raw: int, fps: float, num_frames: int, rng: np.random.Generator | None) -> np.ndarray:
    return segment_middle(num_raw, num_frames) if rng is None else segment_random(num_raw, num_frames, rng)


def _uniform(num_raw: int, fps: float, num_frames: int, rng: np.random.Generator | None) -> np.ndarray:
    return uniform(num_raw, num_frames)


def _strided(num_raw: int, fps: float, num_frames: int, rng: np.random.Generator | None) -> np.ndarray:
    return strided(num_raw, num_frames)


def _headtail(num_raw: int, fps: float, num_frames: int, rng: np.random.Generator | None) -> np.ndarray:
    return segment_middle(num_raw, num_frames) if rng is None else head_and_tail(num_raw, num_frames, rng)


SAMPLING: dict[str, Sampler] = {
    "fps1": _fps1,
    "segment": _segment,
    "uniform": _uniform,
    "strided": _strided,
    "headtail": _headtail,
}
# these have a random variant, which is taken when a generator is given (training)
RANDOM = frozenset({"segment", "headtail"})
