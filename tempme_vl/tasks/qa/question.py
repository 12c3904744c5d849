"""Questions that have seen their video: BERT, its upper layers looking at the video's tokens (UMT, BLIP, ALPRO)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tempme_vl.pretrained import load_vocabulary, save_vocabulary
from tempme_vl.schema import Size
from tempme_vl.text import BertFusion, BertShape, BertTextEncoder, BlipShape, BlipTextEncoder, VideoKeys
from tempme_vl.text.tokenizers import WordPieceTokenizer


@dataclass(frozen=True)
class SavedQuestions:
    """The JSON data of a `QuestionEncoder`."""

    text: BertShape
    max_words: Size
    proportional: bool


class QuestionEncoder(nn.Module):
    """Words of questions -> states that know the video.

    Args:
        text, fusion: BERT's lower and upper layers.
        vocabulary: the words that ids stand for, in order.
        max_words: kept of a question, [CLS] among them.
        proportional: a token gets the attention of all that were merged into it (proportional attention, ToMe); UMT
            has tokens of one size only.
    """

    def __init__(
        self,
        text: BertTextEncoder,
        fusion: BertFusion,
        vocabulary: tuple[str, ...],
        max_words: int = 25,
        proportional: bool = True,
    ):
        super().__init__()
        self.text, self.fusion = text, fusion
        self.vocabulary, self.max_words, self.proportional = vocabulary, max_words, proportional

    @classmethod
    def of_shape(cls, shape: BertShape, vocabulary: tuple[str, ...], **options: Any) -> QuestionEncoder:
        """With random weights."""
        return cls(BertTextEncoder(shape), BertFusion(shape), vocabulary, **options)

    @property
    def shape(self) -> BertShape:
        return self.text.shape

    def forward(self, ids: Tensor, mask: Tensor, keys: VideoKeys) -> Tensor:
        """Q questions, ids and mask (Q, L), each with its video (`VideoKeys.select` repeats them) -> (Q, L, D)."""
        return self.fusion(self.text(ids, mask), mask, keys)

    def keys_values(self, tokens: Tensor, size: Tensor) -> VideoKeys:
        """Normed tokens (B, M, D) and their size (B, M, 1) -> what a video's questions need, computed once."""
        return self.fusion.keys_values(tokens, size if self.proportional else None)

    def tokenize(self, question: str) -> tuple[Tensor, Tensor]:
        """A question -> ids and mask, both (max_words,) int64."""
        return self._tokenizer(question)

    @cached_property
    def _tokenizer(self) -> WordPieceTokenizer:
        return WordPieceTokenizer(self.vocabulary, self.max_words)

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Recomputes the layers in the backward pass."""
        self.text.grad_checkpointing = self.fusion.grad_checkpointing = enable

    def save(self, directory: Path) -> SavedQuestions:
        """Writes vocab.txt and gives the rest; `load` is the way back."""
        save_vocabulary(directory, self.vocabulary)
        return SavedQuestions(self.shape, self.max_words, self.proportional)

    @classmethod
    def load(cls, config: SavedQuestions, directory: Path) -> QuestionEncoder:
        """What `save` described, with random weights."""
        vocabulary = load_vocabulary(directory, config.text.vocab_size)
        return cls.of_shape(config.text, vocabulary, max_words=config.max_words, proportional=config.proportional)


class BlipQuestions(nn.Module):
    """As `QuestionEncoder`, of BLIP's words.

    Args:
        text: BLIP's encoder, all of whose layers look at the video.
        vocabulary: the words that ids stand for, in order, [DEC] and [ENC] the last.
        max_words: kept of a question, [CLS] and [SEP] among them.
    """

    def __init__(self, text: BlipTextEncoder, vocabulary: tuple[str, ...], max_words: int = 35):
        super().__init__()
        self.text, self.vocabulary, self.max_words = text, vocabulary, max_words

    @property
    def shape(self) -> BlipShape:
        return self.text.shape

    def forward(self, ids: Tensor, mask: Tensor, keys: VideoKeys) -> Tensor:
        """Q questions, ids and mask (Q, L), each with its video -> (Q, L, D)."""
        return self.text.fuse(ids, mask, keys)

    def keys_values(self, tokens: Tensor, size: Tensor) -> VideoKeys:
        """Normed tokens (B, M, D) -> what a video's questions need, computed once; all tokens count alike."""
        return self.text.keys_values(tokens)

    def tokenize(self, question: str) -> tuple[Tensor, Tensor]:
        """A question -> ids and mask, both (max_words,) int64."""
        return self._tokenizer(question)

    @cached_property
    def _tokenizer(self) -> WordPieceTokenizer:
        return WordPieceTokenizer(self.vocabulary, self.max_words, end=True, blip=True, question=True)

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Recomputes the layers in the backward pass."""
        self.text.grad_checkpointing = enable
