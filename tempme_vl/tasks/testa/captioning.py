"""Captions of videos as BLIP and TESTA write them: a decoder that looks at the tokens of a video.

No training on captions alone was published for TESTA; its pre-training has this loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from tempme_vl.frontend import VisualFrontend
from tempme_vl.tasks.losses import readable_video
from tempme_vl.text import BertDecoder, BlipShape
from tempme_vl.text.beams import Writing, write
from tempme_vl.text.blip import ADDED, started
from tempme_vl.text.tokenizers import END, SPECIAL_TOKENS, WordPieceTokenizer
from tempme_vl.tuning.model import TunableModel

SMOOTHING = 0.1  # of every target of BLIP's decoder
PROMPT = "a picture of "


def caption_loss(decoder: BertDecoder, tokens: Tensor, ids: Tensor, counted: Tensor) -> Tensor:
    """The mean loss of the words of captions, 0 where there is none.

    Args:
        decoder: whose words end with [DEC] and [ENC] (`BlipShape`).
        tokens: (B, M, D) of videos.
        ids: (B, L); the first word becomes [DEC].
        counted: (B, L), nonzero for words whose loss counts.
    """
    keys = decoder.keys_values(tokens, tokens.new_ones(tokens.shape[:2]))
    given = started(ids, decoder.shape.vocab_size - 2).unsqueeze(1)
    losses = decoder.sequence_loss(given, counted.unsqueeze(1), keys, SMOOTHING)
    return losses.sum() / counted[:, 1:].sum().clamp(min=1)


class TestaCaptioner(TunableModel):
    """A front end and a decoder that describes what it sees.

    Args:
        frontend: its normed tokens are described.
        shape: of the decoder.
        vocabulary: words in the order of their ids, [DEC] and [ENC] the last.
        prompt: what every caption begins with, which is no part of it.
        decoder: default: one with random weights.
    """

    __test__ = False
    lora_parts = ("frontend", "decoder")

    def __init__(
        self,
        frontend: VisualFrontend,
        shape: BlipShape,
        vocabulary: tuple[str, ...],
        prompt: str = PROMPT,
        decoder: BertDecoder | None = None,
    ):
        super().__init__()
        self.frontend, self.vocabulary, self.prompt = frontend, vocabulary, prompt
        self.decoder = decoder or BertDecoder(shape, shape.layers, shape.cross_width)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tokens (B, M, D) of the videos, and with text_ids and text_mask (B, L) of captions that begin with the prompt
        caption, their loss."""
        tokens = self.frontend.norm(self.frontend(readable_video(batch), batch.get("frame_mask")).tokens)
        features = {"tokens": tokens}
        if "text_ids" in batch:
            counted = batch["text_mask"].bool()
            if "valid" in batch:
                counted = counted & batch["valid"].bool().unsqueeze(1)
            after = torch.arange(counted.shape[1], device=counted.device) >= len(self.start)
            features["caption"] = caption_loss(self.decoder, tokens, batch["text_ids"], counted & after)
        return features

    def loss(self, features: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """What `forward` found."""
        return features["caption"]

    @cached_property
    def start(self) -> list[int]:
        """The ids of the prompt, [DEC] in front."""
        ids, mask = WordPieceTokenizer(self.vocabulary, max_words=64, blip=True)(self.prompt)
        return started(ids[: int(mask.sum())], self.decoder.shape.vocab_size - 2).tolist()

    def generate(self, tokens: Tensor, writing: Writing | None = None) -> Tensor:
        """Captions as ids (B, L), the prompt and [DEC] in front.

        Args:
            tokens: (B, M, D).
            writing: default: 3 beams, 10 to 30 words, the prompt's among them.
        """
        writing = writing or Writing(self.vocabulary.index(END), beams=3, most=30, least=10)
        keys = self.decoder.keys_values(tokens, tokens.new_ones(tokens.shape[:2]))
        start = torch.tensor(self.start, device=tokens.device).expand(len(tokens), -1)
        return write(lambda ids: self.decoder(ids, keys)[:, :, -1], start, writing)

    def caption(self, tokens: Tensor, writing: Writing | None = None) -> list[str]:
        """Captions in words, without the prompt."""
        return [self._in_words(row[len(self.start) :]) for row in self.generate(tokens, writing).tolist()]

    def as_written(self, text: str) -> str:
        """A caption as it would be written: in the vocabulary's words, a blank between each two. Unknown ones, which
        are never written, are "[UNK]"."""
        ids, mask = WordPieceTokenizer(self.vocabulary, self.decoder.shape.positions, blip=True)(text)
        return self._joined(ids[1 : int(mask.sum())].tolist())

    def _in_words(self, ids: list[int]) -> str:
        special = {self.vocabulary.index(word) for word in (*SPECIAL_TOKENS, *ADDED)}
        return self._joined([n for n in ids if n not in special])

    def _joined(self, ids: list[int]) -> str:
        return " ".join(self.vocabulary[n] for n in ids).replace(" ##", "")
