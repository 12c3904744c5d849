"""The record of a head that compares videos with texts.

Letters: V videos, T texts, M tokens of a video, L words of a text, E embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tempme_vl.frontend import VisualFrontend
from tempme_vl.precision import at_least_float32
from tempme_vl.state import FrontendOutput
from tempme_vl.tasks.heads import Head, NoOptions, Task
from tempme_vl.tasks.losses import PAIRS, Pairs, contrastive_loss_of

if TYPE_CHECKING:  # which imports open_clip
    from tempme_vl.text.base import TextEncoder

Parts = Mapping[str, Tensor]
Seen = Literal["tokens", "frames"]


@dataclass(frozen=True)
class PairContext:
    """What a head is created for: the two towers of a model, of which it may take sizes and initial weights."""

    frontend: VisualFrontend
    text: TextEncoder


class SimilarityHead(Head, nn.Module):
    """What compares videos with texts, and what of both it needs for that.

    Its weights, if it has any, lie in the model's file under "head.", its options in the configuration.

    Attributes:
        video_parts, text_parts: names of the tensors that are compared, a row a video or a text: what `encode_video`
            and `encode_text` give, or what a batch holds itself, such as "frame_mask" and "text_mask". An evaluation
            keeps these alone.
        products: similarity is the product of "text" (T, E) and "video" (V, E), which is all that is compared.
        candidates: of each query, which a second stage ranks anew by `fine` where nothing else is asked for; 0 for a
            head without one.
        fine_video_parts, fine_text_parts: what the second stage compares, and the loss reads beside the first one's.
        public: how names begin that lie beside CLIP's in the authors' files, and how here.
        told: its options.
    """

    task: ClassVar[Task] = "retrieval"
    video_parts: ClassVar[tuple[str, ...]] = ("video",)
    text_parts: ClassVar[tuple[str, ...]] = ("text",)
    products: ClassVar[bool] = False
    candidates: ClassVar[int] = 0
    fine_video_parts: ClassVar[tuple[str, ...]] = ()
    fine_text_parts: ClassVar[tuple[str, ...]] = ()
    public: ClassVar[tuple[tuple[str, str], ...]] = ()
    told: Any

    def __init__(self, told: Any = None):
        super().__init__()
        self.told = NoOptions() if told is None else told

    @classmethod
    def create(cls, context: PairContext, options: Any) -> SimilarityHead:
        """A head to train, or whose weights are still to be loaded.

        Args:
            options: an instance of `options`.

        Raises:
            ValueError: towers that do not give what it compares.
        """
        return cls(options)

    def encode_video(self, frontend: VisualFrontend, output: FrontendOutput) -> dict[str, Tensor]:
        """Tensors (V, ...) of videos, "video" among them, at least float32."""
        raise NotImplementedError

    def encode_text(self, text: TextEncoder, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Tensors (T, ...) of texts, "text" among them, at least float32; ids and mask (T, L)."""
        raise NotImplementedError

    def similarity(self, text: Parts, video: Parts) -> Tensor:
        """(T, V), by which evaluation ranks; of a head with two stages the first one's."""
        raise NotImplementedError

    def fine(self, text: Parts, video: Parts) -> Tensor:
        """(T, V) of both stages' parts, by which the second ranks the candidates of the first."""
        raise NotImplementedError

    def logits(self, text: Parts, video: Parts, scale: Tensor) -> Tensor:
        """(T, V), what the loss reads.

        Args:
            scale: exp(logit scale), a scalar.
        """
        return scale * self.similarity(text, video)

    def loss(self, text: Parts, video: Parts, scale: Tensor, pairs: Pairs = PAIRS) -> Tensor:
        """The loss of all ranks' pairs, T = V, row i of both belonging together: by default the contrast of `logits`.

        Args:
            text, video: the parts of both stages.
        """
        return contrastive_loss_of(self.logits(text, video, scale), *pairs)

    @classmethod
    def from_public(cls, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A head's weights among those that lie beside CLIP's in a file of its authors, under the names that they have
        here; empty where there are none."""
        named: dict[str, Tensor] = {}
        for name, value in given.items():
            for theirs, ours in cls.public:
                if name.startswith(theirs):
                    own = ours + name.removeprefix(theirs)
                    own = own.replace(".attn.in_proj_", ".attn.qkv.").replace(".attn.out_proj.", ".attn.proj.")
                    named[own] = value.float()
        return named

    @property
    def learns(self) -> bool:
        """Whether it has weights of its own: they see all pairs of a batch at once, so that it has no chunks."""
        return next(self.parameters(), None) is not None


def token_embeddings(frontend: VisualFrontend, output: FrontendOutput, of: Seen = "tokens") -> Tensor:
    """(B, M, E) of a video's merged tokens, or (B, F, E) of its frames, in the space of texts, not normalised.

    Raises:
        ValueError: tokens of a tower that pools by attention, where single ones have no place in that space.
    """
    if of == "frames":
        return at_least_float32(output.frames)
    if frontend.shape.pooling == "attention":
        raise ValueError(
            "this tower pools its tokens by attention: single ones are not in the space of texts; compare frames "
            "(--head-options of=frames)"
        )
    return at_least_float32(frontend.head(frontend.norm(output.tokens)))


@torch.no_grad()
def in_blocks(
    similarity: Callable[[Parts, Parts], Tensor], text: Parts, video: Parts, device: torch.device, block: int = 64
) -> Tensor:
    """(T, V) on the CPU of many texts and videos, so many of both at once on a device: single tokens take memory."""
    texts, videos = (len(next(iter(parts.values()))) for parts in (text, video))
    if not texts or not videos:
        return torch.empty(texts, videos)
    rows = []
    for first in range(0, texts, block):
        some = _rows(text, first, block, device)
        row = [similarity(some, _rows(video, start, block, device)).cpu() for start in range(0, videos, block)]
        rows.append(torch.cat(row, dim=1))
    return torch.cat(rows)


def _rows(parts: Parts, first: int, count: int, device: torch.device) -> dict[str, Tensor]:
    return {name: part[first : first + count].to(device) for name, part in parts.items()}
