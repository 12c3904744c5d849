"""Text grounding: which merged tokens of a video are like a phrase, and what of the video they hold.

A token is projected as the video is and compared with the text by cosine. The paper of TESTA (EMNLP Findings 2023,
figure 4) shows such similarities on regions, and says of neither features nor layer which: these are our choice.

Letters: F frames, L patches of a frame, M tokens that leave the tower, E width of an embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor
from torch import Tensor

from tempme_vl.evaluation.plot import COLORS
from tempme_vl.frontend import VisualFrontend
from tempme_vl.state import FrontendOutput
from tempme_vl.tasks.retrieval import AnyRetrievalModel
from tempme_vl.tasks.similarity.base import token_embeddings

COLUMNS, GAP = 8, 4  # frames in a row of the picture, pixels between them
STRENGTH = 0.5  # of a region's colour over the frame


@dataclass(frozen=True)
class Region:
    """What a token holds of a video.

    Attributes:
        token: its number among the M that leave the tower.
        score: its cosine with the phrase.
        patches: (frame, row, column) of each patch.
    """

    token: int
    score: float
    patches: tuple[tuple[int, int, int], ...]


@torch.inference_mode()
def find_regions(model: AnyRetrievalModel, video: Tensor, phrase: str, count: int) -> list[Region]:
    """The tokens that are most similar to a phrase, the best one first; fewer where fewer hold patches.

    Args:
        video: (F, 3, H, W), as the front end takes it.

    Raises:
        ValueError: a tower that pools by attention, whose single tokens are not in the space of texts.
    """
    frontend, device = model.frontend, video.device
    output = frontend(video.unsqueeze(0), trace_source=True)
    ids, mask = (t.unsqueeze(0).to(device) for t in model.words.tokenizer(model.input.max_words)(phrase))
    text = model({"text_ids": ids, "text_mask": mask})["text"][0]
    if text.ndim == 2:  # of a head that compares single words: their mean
        text = text[mask[0].bool()].mean(0)
    tokens = token_embeddings(frontend, output)[0]
    scores = F.normalize(tokens, dim=-1) @ F.normalize(text, dim=-1).to(tokens.dtype)
    owner = patch_owners(frontend, output)[0]
    holding = owner[owner >= 0].unique()
    best = holding[scores[holding].argsort(descending=True, stable=True)[:count]]
    return [Region(token, scores[token].item(), _patches(owner == token)) for token in best.tolist()]


def patch_owners(frontend: VisualFrontend, output: FrontendOutput) -> Tensor:
    """(B, F, L) which token holds each patch of the input, -1 for one that was dropped.

    Args:
        output: with its sources.
    """
    assert output.source is not None
    shape, frames = frontend.shape, frontend.schedule.frames
    if shape.pooling == "all":  # one prefix for the video
        return output.source[:, shape.num_prefix :].unflatten(1, (frames, -1))
    return output.source.unflatten(1, (frames, shape.tokens))[:, :, shape.num_prefix :]


def _patches(held: Tensor) -> tuple[tuple[int, int, int], ...]:
    """(F, L) bool -> frames, rows and columns of a square grid."""
    side = math.isqrt(held.shape[1])
    return tuple((frame, place // side, place % side) for frame, place in held.nonzero().tolist())


def color(number: int) -> str:
    """Of a region, by its place among those that are drawn: "#1b6ca8"."""
    return COLORS[number % len(COLORS)]


def draw_regions(frames: np.ndarray, regions: Sequence[Region], grid: int, side: int = 224) -> Image.Image:
    """Frames beside each other with the patches of regions coloured; what is in no region stays as it is.

    Args:
        frames: (F, S, S, 3) uint8, as the tower saw them.
        grid: patches in a row.
        side: least pixels of a drawn frame, which is S times a whole number.
    """
    patch = frames.shape[1] // grid
    colored = frames.astype(np.float32)
    for number, region in enumerate(regions):
        shade = np.array(ImageColor.getrgb(color(number)), np.float32)
        for frame, row, column in region.patches:
            square = colored[frame, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            square += STRENGTH * (shade - square)
    return _sheet(np.rint(colored).astype(np.uint8), max(1, -(-side // frames.shape[1])))


def _sheet(frames: np.ndarray, times: int) -> Image.Image:
    """(F, S, S, 3) -> rows of frames on white, each so many times as large."""
    side = times * frames.shape[1]
    columns, rows = min(COLUMNS, len(frames)), -(-len(frames) // COLUMNS)
    sheet = Image.new("RGB", ((side + GAP) * columns - GAP, (side + GAP) * rows - GAP), "white")
    for number, frame in enumerate(frames):
        large = Image.fromarray(frame).resize((side, side), Image.Resampling.NEAREST)
        row, column = divmod(number, columns)
        sheet.paste(large, (column * (side + GAP), row * (side + GAP)))
    return sheet
