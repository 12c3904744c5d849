"""Which token of a prompt each feature takes the place of: by modality, and in the order of the prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tempme_vl.integrations.base import Host, VisualTokens


@dataclass(frozen=True)
class Visuals:
    """The videos or the images of a batch of prompts.

    Attributes:
        token_id: of the token that each of their features takes the place of.
        groups: for each prompt its visuals, in the order that they stand in.
    """

    token_id: int
    groups: Sequence[Sequence[VisualTokens]]

    @property
    def flat(self) -> list[VisualTokens]:
        """Those of all prompts."""
        return [visual for group in self.groups for visual in group]


def with_images(prompt: str, placeholder: str | None, images: Sequence[VisualTokens]) -> str:
    """The prompt with what the host's processor writes for its images in their places."""
    if not images:
        return prompt
    first, *rest = prompt.split(placeholder)
    return first + "".join(image.extra["written"] + part for image, part in zip(images, rest, strict=True))


def by_modality(
    host: Host,
    prompts: Sequence[str],
    videos: Sequence[Sequence[VisualTokens]],
    images: Sequence[Sequence[VisualTokens]],
) -> dict[str, Visuals]:
    """What the model gets, by the keys of mm_encoder_outputs. Where frames are images to a model, videos stand among
    the images."""
    if not any(images):
        return {host.modality: Visuals(host.token_id, videos)}
    assert host.image_placeholder is not None and host.image_token_id is not None
    if host.modality == "video":
        return {"video": Visuals(host.token_id, videos), "image": Visuals(host.image_token_id, images)}
    either = f"{re.escape(host.placeholder)}|{re.escape(host.image_placeholder)}"
    mixed = []
    for prompt, own_videos, own_images in zip(prompts, videos, images, strict=True):
        left = {host.placeholder: iter(own_videos), host.image_placeholder: iter(own_images)}
        mixed.append([next(left[place]) for place in re.findall(either, prompt)])
    return {"image": Visuals(host.token_id, mixed)}


def check_places(host: Host, prompts: Sequence[str], rows: Sequence[Sequence[int]], visuals: Visuals) -> None:
    """Raises:
    ValueError: a prompt whose ids, a row, have more or fewer places than its visuals have features.
    """
    for prompt, row, group in zip(prompts, rows, visuals.groups, strict=True):
        wanted, found = sum(len(visual.features) for visual in group), list(row).count(visuals.token_id)
        if wanted != found:
            token = host.placeholder if visuals.token_id == host.token_id else host.image_placeholder
            raise ValueError(
                f"the prompt {prompt[:80]!r} has {found} places for {wanted} visual tokens after tokenizing: check "
                f"that {token!r} is one token of the tokenizer and that nothing is truncated"
            )


def in_frame(source: Tensor, tokens: int) -> Tensor:
    """(M,) int64, the place in its frame of each token that is left of a video; -1 for a separator.

    Args:
        source: (M,) int64, the numbers of the tokens in whose places they stand.
        tokens: S, of a frame.
    """
    return torch.where(source < 0, source, source % tokens)


def check_placed(host: Host, videos: Sequence[Sequence[VisualTokens]]) -> None:
    """Raises:
    ValueError: videos whose host does not say where their tokens stood in their frames.
    """
    if any("places" not in video.extra for group in videos for video in group):
        raise ValueError(
            f"method {host.method!r} works inside the language model, and {type(host).__name__} does not say where a "
            "video's tokens stood: expected `extra` of its VisualTokens with 'places', as `Host.inner` describes them"
        )


def video_places(host: Host, input_ids: Tensor, visuals: Visuals) -> Tensor:
    """(B, L) int64, `tempme_vl.compressors.inner.Left.place` of each prompt: those of each video are its own.

    Args:
        input_ids: (B, L), padded.
        visuals: whose tokens the videos are among.
    """
    places = torch.full_like(input_ids, -1)
    for row, group in enumerate(visuals.groups):
        found: list[int] = []
        first = 0
        for visual in group:
            own = visual.extra.get("places", [-1] * len(visual.features))  # an image has none
            found += [place if place < 0 else place + first for place in own]
            first += max(own, default=-1) + 1
        places[row, input_ids[row] == host.token_id] = torch.tensor(found, device=input_ids.device, dtype=torch.int64)
    return places
