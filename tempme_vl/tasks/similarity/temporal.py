"""Small transformers of heads that start as CLIP's text tower: its first blocks, and its positions (CLIP4Clip)."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempme_vl.backbones.base import BlockAdapter
from tempme_vl.frontend import VisualFrontend
from tempme_vl.precision import at_least_float32
from tempme_vl.tasks.similarity.base import PairContext, Seen
from tempme_vl.text.base import TextState
from tempme_vl.text.clip import CLIPTextEncoder

_EPS = 1e-12  # of the norms, as in the authors' code
_NOWHERE = -1e6  # on the logits of what is not to be seen: finite, for a video without a real frame


class TextLike(nn.Module):
    """Blocks like the text tower's, in which all see each other: (R, N, E) -> (R, N, E).

    Args:
        context: of the head.
        layers: copies of the text tower's first blocks; those beyond its last start at random.
        places: at least so many positions; beyond the text tower's own they are spread over its.

    Raises:
        ValueError: a text tower of another kind than open_clip's, or of another width than the embedding's.
    """

    def __init__(self, context: PairContext, layers: int, places: int):
        super().__init__()
        self.positions = positions_of(context, places)
        theirs = _text_of(context).adapters()
        self.blocks = nn.ModuleList(copy.deepcopy(theirs[min(layer, len(theirs) - 1)]) for layer in range(layers))
        for part in self.blocks.modules():
            if isinstance(part, nn.LayerNorm):
                part.eps = _EPS
        for part in self.blocks[len(theirs) :].modules():
            if isinstance(part, nn.LayerNorm | nn.Linear):
                part.reset_parameters()

    def forward(self, x: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
        """Args:
        x: (R, N, E), without positions.
        mask: (R, N), nonzero for what is to be seen; default: all.
        dropout: rate on the input with its positions, in training.
        """
        dtype = self.positions.weight.dtype  # of a model in half precision, whose features are float32
        x = x.to(dtype) + self.positions(torch.arange(x.shape[1], device=x.device))
        x = F.dropout(x, dropout, self.training)
        bias = None if mask is None else torch.where(mask.bool(), 0.0, _NOWHERE).to(dtype)[:, None, None]
        state = TextState(x, bias)
        for block in self.blocks:
            assert isinstance(block, BlockAdapter)
            state = block.mlp_step(block.attention_step(state)[0])
        return state.x

    def added(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """What it makes of x added to x, at least float32."""
        return x + at_least_float32(self(x, mask))


def positions_of(context: PairContext, places: int = 0) -> nn.Embedding:
    """The text tower's positions, spread over as many places as are asked for where it has fewer.

    Raises:
        ValueError: see `TextLike`.
    """
    given = _text_of(context).embed.positional_embedding.detach().float()
    if places > len(given):
        given = F.interpolate(given.T[None], size=places, mode="linear", align_corners=True)[0].T
    return nn.Embedding.from_pretrained(given.clone(), freeze=False)


def count_of(frontend: VisualFrontend, of: Seen) -> int:
    """How many tokens a video has, or frames at most."""
    return frontend.schedule.output_tokens if of == "tokens" else frontend.schedule.frames


def _text_of(context: PairContext) -> CLIPTextEncoder:
    text, width = context.text, context.frontend.shape.embed_dim
    if isinstance(text, CLIPTextEncoder) and text.width == width:
        return text
    found = f"{type(text).__name__}{f' of {text.width}' if isinstance(text, CLIPTextEncoder) else ''}"
    raise ValueError(
        "expected a text tower of open_clip that is as wide as the embedding, as whose first blocks and positions this "
        f"head starts: {width}; got {found}: choose another head, such as xpool"
    )
