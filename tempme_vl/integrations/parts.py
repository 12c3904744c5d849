"""Videos part by part, so that a tower sees few frames at a time: where they are cut, and how parts are joined.

Frames know nothing of each other until their clips are joined, and the clips of the last block never do. A video that
is cut between these clips gives the same tokens, whatever its length, in the memory of one part.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from tempme_vl.compressors import FrameFeatures, KeptFeatures
from tempme_vl.integrations.base import Host, VisualTokens
from tempme_vl.integrations.reduction import Reduction
from tempme_vl.integrations.videos import SampledVideo
from tempme_vl.registries import METHODS

_Preprocess = Callable[..., Mapping[str, Any]]


def methods_apart() -> str:
    """The names of the methods by which a video can be cut."""
    return ", ".join(name for name, method in METHODS.items() if method.apart)


def check_apart(method: str) -> None:
    """Raises:
    ValueError: a method that looks at all frames of a video.
    """
    if not METHODS[method].apart:
        raise ValueError(
            f"what {method!r} makes of a frame depends on frames of other clips, or on its number: give the whole "
            f"video to prepare, without frames_at_once, or compress by one of {methods_apart()}"
        )


def check_reduces_parts(reduction: Reduction) -> None:
    """Raises:
    ValueError: a method that needs the features of all frames before any token is known.
    """
    if reduction.method not in METHODS:
        raise ValueError(
            f"{reduction.method!r} looks at the features of all frames before it keeps any: a stream has none of its "
            "tokens before its end. Give the whole video to prepare, with frames_at_once to save memory, or compress "
            f"by one of {methods_apart()}"
        )
    check_apart(reduction.method)


def frames_of_parts(host: Host, frame: tuple[int, int]) -> int:
    """Frames of each part but the last: as many as `Host.frames_at_once` allows, whole clips.

    Args:
        frame: height and width in pixels.
    """
    most, cut = host.frames_at_once, host.cut(frame)
    assert most is not None
    if cut > most:
        warnings.warn(
            f"a clip of the last block holds {cut} frames, which can only be encoded together: the tower sees {cut} "
            f"frames at a time, and not frames_at_once={most}. Join fewer frames, or ask for frames_at_once={cut}",
            stacklevel=2,
        )
    return max(cut, most // cut * cut)


def cut_up(video: SampledVideo, size: int, whole: int | None = None) -> Iterator[tuple[int, SampledVideo]]:
    """Parts of so many frames, and a last one of the rest; each with the number of its first frame.

    Args:
        whole: frames of the video that all of this is a part of.
    """
    frames = len(video.frames)
    for first in range(0, frames, size):
        yield first, video.part(first, min(size, frames - first), whole or frames)


def encode_by_parts(host: Host, videos: Sequence[SampledVideo]) -> list[VisualTokens]:
    """What `Host.encode` gives of videos, in the memory of one part of each.

    Raises:
        ValueError: gradients are wanted.
    """
    check_no_gradient(host)
    found = []
    for video in videos:
        size = frames_of_parts(host, frame_size(video))
        parts = [host.encode_part(part, first) for first, part in cut_up(video, size)]
        found.append(host.join_parts(parts, video))
    return found


def check_no_gradient(host: Host) -> None:
    """Raises:
    ValueError: gradients are wanted, for which all parts would have to stay in memory.
    """
    weights = chain(host.model.parameters(), host.merging.parameters())
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
        raise ValueError(
            f"frames_at_once={host.frames_at_once} encodes part by part to save memory, and gradients keep all of it: "
            "prepare under torch.no_grad() to answer, or compress without frames_at_once to train"
        )


def frame_size(video: SampledVideo) -> tuple[int, int]:
    """Height and width in pixels."""
    height, width = video.frames.shape[1:3]
    return height, width


@dataclass(frozen=True)
class KeptPart:
    """What is left of the slots of a part, counted from its first."""

    kept: KeptFeatures
    slots: int


def join_kept(parts: Sequence[KeptPart], places: int) -> KeptFeatures:
    """What is left of a video.

    Args:
        places: S.
    """
    source, clips, slots = [], [], 0
    for part in parts:
        source.append(torch.where(part.kept.source < 0, part.kept.source, part.kept.source + slots * places))
        clips += [clip._replace(first=clip.first + slots, last=clip.last + slots) for clip in part.kept.clips]
        slots += part.slots
    deeper = tuple(map(torch.cat, zip(*(part.kept.deeper for part in parts), strict=True)))
    sizes = [part.kept.size for part in parts if part.kept.size is not None]
    x, size = torch.cat([part.kept.x for part in parts]), torch.cat(sizes) if sizes else None
    return KeptFeatures(x, torch.cat(source), deeper, tuple(clips), size)


def join_features(parts: Sequence[FrameFeatures]) -> FrameFeatures:
    """The features of all frames."""

    def joined(of: Callable[[FrameFeatures], Tensor | None]) -> Tensor | None:
        found = [value for value in map(of, parts) if value is not None]
        return torch.cat(found) if found else None

    deeper = tuple(map(torch.cat, zip(*(part.deeper for part in parts), strict=True)))
    summaries = [part.summary for part in parts if part.summary is not None]
    vectors, weights = (torch.cat(each) for each in zip(*summaries, strict=True)) if summaries else (None, None)
    return FrameFeatures(
        torch.cat([part.x for part in parts]),
        parts[0].grid,
        deeper,
        joined(lambda part: part.received),
        None if vectors is None or weights is None else (vectors, weights),
        joined(lambda part: part.keys),
        joined(lambda part: part.pixels),
        parts[0].separator,
    )


def blank(frames: int, height: int, width: int) -> Tensor:
    """Frames that take no memory, for what preprocessing says of sizes."""
    return torch.zeros(frames, 3, height, width, dtype=torch.uint8, device="meta")


def same_size(preprocess: _Preprocess, video: SampledVideo, limits: Mapping[str, int]) -> dict[str, Any]:
    """Options by which a preprocessing that keeps the pixels of a video within limits makes a part's frames as large as
    those of the whole. The host's own function is asked for both.

    Args:
        preprocess: (frames, **options) -> "video_grid_thw" among others.
        limits: its `size`, the shortest and the longest edge, which count pixels.

    Raises:
        ValueError: no limits do.
    """
    frames, whole = len(video.frames), video.whole
    if whole is None or whole == frames:
        return {}

    def grid(count: int, **options: Any) -> list[int]:
        found: list[int] = preprocess([blank(count, *frame_size(video))], **options)["video_grid_thw"][0].tolist()
        return found[1:]

    low, high = limits["shortest_edge"], limits["longest_edge"]
    fewer, less = (max(1, limit * frames // whole) for limit in (low, high))
    wanted = grid(whole)
    # of each frame; of the whole; the lower one of each frame, the higher one of the whole
    for lowest, highest in ((low, high), (fewer, less), (low, less)):
        options = {"size": {"shortest_edge": lowest, "longest_edge": highest}}
        if grid(frames, **options) == wanted:
            return options
    raise ValueError(
        f"{whole} frames of this video become {wanted[0]} x {wanted[1]} patches each, and {frames} of them alone do "
        "not, by any limits of pixels that were tried: encode it without frames_at_once"
    )
