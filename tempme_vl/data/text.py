"""CLIP's byte-pair tokenizer with a padding mask."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor


@dataclass
class ClipTokenizer:
    """A caption -> ids and mask, both (max_words,) int64: start token, words, end token, then padding.

    Longer captions are cut so that the end token stays (TempMe, section 4: 32 words; 64 for paragraphs).
    """

    max_words: int = 32

    def __post_init__(self) -> None:
        if self.max_words < 2:
            raise ValueError(f"max_words counts the start and end token, so it is at least 2; got {self.max_words}")
        self._tokenizer = SimpleTokenizer(context_length=self.max_words)

    def __call__(self, text: str) -> tuple[Tensor, Tensor]:
        ids = self._tokenizer(text)[0]
        # the end token has the highest number; id 0 is both padding and a word, so it cannot tell
        end = int(ids.argmax())
        return ids, (torch.arange(self.max_words) <= end).long()


def caption_id(text: str) -> int:
    """A number that is equal for equal captions (case and outer blanks aside), the same in every process."""
    digest = hashlib.blake2b(text.strip().lower().encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
