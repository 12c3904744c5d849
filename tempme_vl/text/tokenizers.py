"""Tokenizers with padding masks: CLIP's byte pairs, BERT's word pieces, and those of transformers.

A model keeps its `Words`: what makes its tokenizers, and goes into its folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from torch import Tensor

from tempme_vl.hub import hub_file
from tempme_vl.pretrained import VOCABULARY_FILE, save_vocabulary

TOKENIZER = "tokenizer"  # the folder of a saved one
PAD, UNKNOWN, START, END, _ = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass
class CLIPTokenizer:
    """A caption -> ids and mask, both (max_words,) int64: start token, words, end token, then padding.

    Longer captions are cut so that the end token stays (TempMe, section 4: 32 words; 64 for paragraphs).
    """

    max_words: int = 32

    def __post_init__(self) -> None:
        if self.max_words < 2:
            raise ValueError(f"max_words counts the start and end token, so it is at least 2; got {self.max_words}")
        from open_clip import SimpleTokenizer

        self._tokenizer = SimpleTokenizer(context_length=self.max_words)

    def __call__(self, text: str) -> tuple[Tensor, Tensor]:
        ids = self._tokenizer(text)[0]
        # the end token has the highest number; id 0 is both padding and a word, so it cannot tell
        end = int(ids.argmax())
        return ids, (torch.arange(self.max_words) <= end).long()


@dataclass
class WordPieceTokenizer:
    """A text -> ids and mask, both (max_words,) int64: [CLS], word pieces, then padding, as UMT feeds BERT.

    UMT gives captions (32 words) and questions (25) no [SEP], unlike BERT's own tokenizer; answers (5) end with it.
    Longer texts are cut at the end, which takes an answer's [SEP] too: a cut answer does not look complete. BLIP's
    texts all end with [SEP], cut ones too, and keep full stops and commas.

    Args:
        vocab: all pieces; a piece's place is its number. From `bert_vocabulary` or `word_vocabulary`.
        max_words: pieces kept, [CLS] among them.
        end: append [SEP].
        blip: keep that [SEP], and clean texts as `clean_caption`, or of questions as `clean_question`.
        question: texts are questions.

    Raises:
        ValueError: max_words below 2, or a vocabulary with a piece twice, without a special token or [PAD] in front.
    """

    vocab: tuple[str, ...] = field(repr=False)
    max_words: int = 32
    end: bool = False
    blip: bool = False
    question: bool = False

    def __post_init__(self) -> None:
        if self.max_words < 2:
            raise ValueError(f"max_words counts [CLS] too, so it is at least 2; got {self.max_words}")
        numbers = {piece: number for number, piece in enumerate(self.vocab)}
        missing = [token for token in (PAD, UNKNOWN, START, END) if token not in numbers]
        if missing or numbers[PAD] != 0 or len(numbers) != len(self.vocab):
            raise ValueError(
                f"expected distinct pieces with {PAD} first and {UNKNOWN}, {START}, {END} among them; got "
                f"{len(self.vocab)} pieces, {len(numbers)} distinct, first {self.vocab[:1]}, missing {missing}"
            )
        self._tokenizer = Tokenizer(WordPiece(numbers, unk_token=UNKNOWN))
        self._tokenizer.normalizer, self._tokenizer.pre_tokenizer = BertNormalizer(), BertPreTokenizer()
        self._start, self._end = numbers[START], numbers[END]

    def __call__(self, text: str) -> tuple[Tensor, Tensor]:
        of_blip = clean_question if self.question else clean_caption
        pieces = self._tokenizer.encode((of_blip if self.blip else clean_text)(text), add_special_tokens=False).ids
        if self.blip:
            pieces = pieces[: self.max_words - 1 - self.end]
        words = [self._start, *pieces, *([self._end] if self.end else [])][: self.max_words]
        ids = torch.zeros(self.max_words, dtype=torch.int64)
        ids[: len(words)] = torch.tensor(words)
        return ids, (torch.arange(self.max_words) < len(words)).long()


@dataclass
class PaddedTokenizer:
    """A text -> ids and mask, both (max_words,) int64, by a tokenizer of transformers, cut and padded as it does.

    Args:
        encode: transformers' tokenizer.
        lower: write texts in lower case first, as SigLIP 2 was trained.
    """

    encode: Any
    max_words: int
    lower: bool = False

    def __call__(self, text: str) -> tuple[Tensor, Tensor]:
        text = text.lower() if self.lower else text
        options = {"padding": "max_length", "truncation": True, "max_length": self.max_words}
        made = self.encode(text, **options, return_attention_mask=True)
        return torch.tensor(made["input_ids"]), torch.tensor(made["attention_mask"])


Tokenizing = Callable[[str], tuple[Tensor, Tensor]]


class Words(Protocol):
    """The words of a model."""

    def tokenizer(self, max_words: int) -> Tokenizing:
        """What makes a text ids and mask, both (max_words,) int64."""

    def save(self, directory: Path) -> None:
        """Writes them into a model's folder."""


@dataclass(frozen=True)
class CLIPWords:
    """CLIP's byte pairs, which come with open_clip."""

    def tokenizer(self, max_words: int) -> Tokenizing:
        return CLIPTokenizer(max_words)

    def save(self, directory: Path) -> None:
        """Nothing."""


@dataclass(frozen=True)
class BertWords:
    """Word pieces; see `WordPieceTokenizer`."""

    vocabulary: tuple[str, ...] = field(repr=False)

    def tokenizer(self, max_words: int) -> Tokenizing:
        return WordPieceTokenizer(self.vocabulary, max_words)

    def save(self, directory: Path) -> None:
        """vocab.txt."""
        save_vocabulary(directory, self.vocabulary)


@dataclass(frozen=True)
class BlipWords(BertWords):
    """BERT's word pieces, and the two that BLIP adds; texts end with [SEP]."""

    def tokenizer(self, max_words: int) -> Tokenizing:
        return WordPieceTokenizer(self.vocabulary, max_words, end=True, blip=True)


@dataclass(frozen=True)
class PretrainedWords:
    """A tokenizer of transformers; see `PaddedTokenizer`."""

    encode: Any = field(repr=False)
    lower: bool = False

    def tokenizer(self, max_words: int) -> Tokenizing:
        return PaddedTokenizer(self.encode, max_words, self.lower)

    def save(self, directory: Path) -> None:
        """A folder `TOKENIZER`, in transformers' format."""
        self.encode.save_pretrained(str(directory / TOKENIZER))


def clean_text(text: str) -> str:
    """UMT's form of captions, questions and answers: lower case, punctuation deleted, hyphens and slashes as blanks."""
    text = text.lower().translate(_CLEANING).replace("<person>", "person")
    return " ".join(text.split())


def clean_caption(text: str) -> str:
    """TESTA's form of captions: lower case, some punctuation as blanks."""
    return " ".join(text.lower().translate(_BLANKS).split())


def clean_question(text: str) -> str:
    """TESTA's form of questions: lower case, some punctuation deleted."""
    return " ".join(text.lower().translate(_OF_QUESTIONS).split())


_OF_QUESTIONS = str.maketrans("", "", '.!"()*#:;~')
_BLANKS = str.maketrans('!"()*#~', "       ")
_CLEANING = str.maketrans("-/", "  ", ",.'!?\"()*#:;~")


def bert_vocabulary(source: str | Path) -> tuple[str, ...]:
    """The word pieces of a BERT model, in the order of their numbers.

    Args:
        source: a folder with vocab.txt, or the name of a model on the Hugging Face hub ("bert-base-uncased").

    Raises:
        ValueError: neither has the file, or the hub cannot be reached.
    """
    path = hub_file(source, VOCABULARY_FILE)
    # not splitlines: some pieces are line separators of Unicode
    return tuple(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"))


def word_vocabulary(texts: Iterable[str], blip: bool = False) -> tuple[str, ...]:
    """Special tokens, then all distinct words of the texts in order: for small models trained from scratch.

    Args:
        blip: as BLIP's texts have them, captions or questions: with full stops and commas, and what a hyphen or an
            apostrophe parts by itself.
    """
    normalizer, splitter = BertNormalizer(), BertPreTokenizer()
    forms = (clean_caption, clean_question) if blip else (clean_text,)
    words: set[str] = set()
    for text in texts:
        for clean in forms:
            words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(clean(text))))
    return (*SPECIAL_TOKENS, *sorted(words))
