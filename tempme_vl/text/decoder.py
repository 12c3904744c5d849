"""The decoder of UMT and BLIP, made of BERT's layers: words of an answer, each from those before and from the question.

The layers have causal self-attention and cross-attention to the question's states, or to the tokens of a video where
texts describe it; the projection onto words is the table of word embeddings. A question's keys and values are computed
once and shared by all candidate answers.

Letters: B questions of Lq words, K answers to each, L words of an answer, V words in all, D width, H heads of width
Dh = D / H.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempme_vl.precision import at_least_float32
from tempme_vl.text.bert_layer import (
    NORM_EPS,
    PAD,
    BertEmbeddings,
    BertLayer,
    BertSizes,
    KeyValue,
    attention_mask,
    cross_keys_values,
    initialise,
    run_layer,
)


@dataclass(frozen=True)
class QuestionKeys:
    """What the decoder needs of B questions: keys and values (B, H, Lq, Dh) per layer, and the real words' mask."""

    layers: tuple[KeyValue, ...]
    mask: Tensor

    def __len__(self) -> int:
        return len(self.mask)

    def select(self, rows: Tensor) -> QuestionKeys:
        """Those of the questions with these numbers, (R,) int64, repeated as needed."""
        layers = tuple((key.index_select(0, rows), value.index_select(0, rows)) for key, value in self.layers)
        return QuestionKeys(layers, self.mask.index_select(0, rows))


class TiedWords(nn.Embedding):
    """One table for both ways: word numbers (int64) -> embeddings (..., D), and states (..., D) -> logits (..., V).

    One module that is called, and not a weight that two modules share: it is stored once, and ZeRO-3 gathers it.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight) if input.is_floating_point() else super().forward(input)


class LanguageHead(nn.Module):
    """BERT's masked-language head: a transformation of the states in front of the word table, and a bias behind it."""

    def __init__(self, width: int, vocab_size: int):
        super().__init__()
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width, eps=NORM_EPS)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, states: Tensor, words: TiedWords) -> Tensor:
        return words(self.norm(F.gelu(self.dense(states)))) + self.bias


class DecoderLayer(BertLayer):
    """A layer that looks at the words so far, then at the question.

    Args:
        cross_width: of the question's states.
    """

    def __init__(self, shape: BertSizes, cross_width: int):
        super().__init__(shape, cross=True)
        if cross_width != shape.width:
            self.crossattention.read_width(cross_width)

    def keys_values(self, x: Tensor, past: KeyValue | None) -> KeyValue:
        """Keys and values (B K, H, L, Dh) of the words so far: those of the words before, and of new ones."""
        own = self.attention.keys_values(x.flatten(0, 1))
        return own if past is None else (torch.cat([past[0], own[0]], dim=2), torch.cat([past[1], own[1]], dim=2))

    def forward(  # type: ignore[override]
        self, x: Tensor, question: KeyValue, mask: Tensor, own: KeyValue | None = None
    ) -> Tensor:
        """(B, K, L, D) words of K answers -> (B, K, L, D).

        Args:
            question, mask: of the B questions, see `QuestionKeys`.
            own: keys and values of the words so far, of which x is only the last, (B, K, 1, D).
        """
        assert own is None or x.shape[2] == 1, x.shape
        words = self.attention(x.flatten(0, 1), own, causal=own is None)
        # answers do not see each other here, so all words of a question's answers are one list of queries
        words = self.crossattention(words.unflatten(0, x.shape[:2]).flatten(1, 2), question, mask)
        return self.feed_forward(words).unflatten(1, x.shape[1:3])


class BertDecoder(nn.Module):
    """Embeddings, causal layers and the language head; random weights as `BertShape.init_std` says.

    Args:
        shape: of the text encoder whose states are the questions; width, heads, words and positions are the decoder's
            too (its layers, fusion_layer and cross_width are not).
        layers: of the decoder. UMT: as many as the encoder has fusion layers, 3 (B) or 5 (L). BLIP: as many as it has.
        cross_width: of what it describes, by default of the questions' states.
    """

    def __init__(self, shape: BertSizes, layers: int, cross_width: int | None = None):
        super().__init__()
        self.shape, self.cross_width = shape, shape.width if cross_width is None else cross_width
        self.embeddings = BertEmbeddings(shape)
        self.embeddings.word_embeddings = TiedWords(shape.vocab_size, shape.width, padding_idx=PAD)
        self.layers = nn.ModuleList(DecoderLayer(shape, self.cross_width) for _ in range(layers))
        self.head = LanguageHead(shape.width, shape.vocab_size)
        self.grad_checkpointing = False
        self.apply(partial(initialise, std=shape.init_std))

    def keys_values(self, states: Tensor, mask: Tensor) -> QuestionKeys:
        """Keys and values of questions, once for all their answers.

        Args:
            states: (B, Lq, D) of questions that have seen their video.
            mask: (B, Lq), nonzero for real words; each row has one ([CLS]).

        Raises:
            ValueError: states of another width, or a mask of another shape.
        """
        if states.ndim != 3 or states.shape[-1] != self.cross_width or states.shape[:2] != mask.shape:
            raise ValueError(
                f"expected question states (B, L, {self.cross_width}) and a mask (B, L); "
                f"got {tuple(states.shape)} and {tuple(mask.shape)}"
            )
        return QuestionKeys(cross_keys_values(self.layers, states), attention_mask(mask))

    def forward(self, ids: Tensor, question: QuestionKeys) -> Tensor:
        """What every word of K answers to each question makes likely as the next one.

        Args:
            ids: (B, K, L) int64; [CLS], words, then padding. Words see only those before them, so padding at the end
                needs no mask.
            question: of the B questions.

        Returns:
            (B, K, L, V) logits.

        Raises:
            ValueError: answers to another number of questions, or with more words than there are positions.
        """
        positions = self.shape.positions
        if ids.ndim != 3 or len(ids) != len(question) or ids.shape[-1] > positions:
            raise ValueError(
                f"expected answers (B, K, L) to B = {len(question)} questions (QuestionKeys.select repeats them) with "
                f"L <= {positions}; got {tuple(ids.shape)}"
            )
        x = self._embed(ids, first=0)
        for layer, seen in zip(self.layers, question.layers, strict=True):
            x = run_layer(layer, self.grad_checkpointing, x, seen, question.mask)
        return self._logits(x)

    def sequence_loss(self, ids: Tensor, mask: Tensor, question: QuestionKeys, smoothing: float = 0.0) -> Tensor:
        """Cross-entropy of whole answers, summed over their words (UMT, BLIP).

        Args:
            ids, mask: (B, K, L), as for `forward`; mask is nonzero for words that count: real ones, and none of a
                prompt that they follow.
            smoothing: the share of each target that is spread evenly over all words (BLIP: 0.1).

        Returns:
            (B, K) float32 (float64 for such states): -log p(answer | question, video), or what smoothing makes of it.

        Raises:
            ValueError: see `forward`; or a mask of another shape, or answers without a word behind [CLS].
        """
        if ids.shape != mask.shape or ids.ndim != 3 or ids.shape[-1] < 2:
            raise ValueError(
                f"expected answers and their mask (B, K, L), L of at least 2; got {tuple(ids.shape)} and "
                f"{tuple(mask.shape)}"
            )
        logits, words = self(ids[..., :-1], question), ids[..., 1:]
        logits = at_least_float32(logits)
        given = logits.flatten(0, 2), words.flatten()
        losses = F.cross_entropy(*given, reduction="none", label_smoothing=smoothing).view(words.shape)
        return losses.masked_fill(~mask[..., 1:].bool(), 0.0).sum(-1)

    @torch.no_grad()
    def generate(self, question: QuestionKeys, start: int, end: int, max_words: int) -> Tensor:
        """The likeliest word again and again, until the end token.

        Args:
            start, end: numbers of [CLS] and [SEP].
            max_words: generated at most, the end token among them.

        Returns:
            (B, max_words) int64: words without the start, the end token included, then padding.

        Raises:
            ValueError: more words than there are positions, or none.
        """
        if not 1 <= max_words <= self.shape.positions:
            raise ValueError(f"expected max_words of 1 to {self.shape.positions}; got {max_words}")
        word = torch.full((len(question), 1, 1), start, device=question.mask.device)
        words: list[Tensor] = []
        past: list[KeyValue | None] = [None] * len(self.layers)
        done = torch.zeros_like(word, dtype=torch.bool)
        # always to max_words: under ZeRO-3 every rank must call the same modules, whatever its answers' lengths
        for position in range(max_words):
            x = self._embed(word, first=position)
            for number, (layer, seen) in enumerate(zip(self.layers, question.layers, strict=True)):
                past[number] = cast(DecoderLayer, layer).keys_values(x, past[number])
                x = layer(x, seen, question.mask, past[number])
            word = self._logits(x).argmax(-1).masked_fill(done, PAD)
            done = done | (word == end)
            words.append(word)
        return torch.cat(words, dim=-1).squeeze(1)

    def _embed(self, ids: Tensor, first: int) -> Tensor:
        """(B, K, L) words, the first of them at a position -> (B, K, L, D)."""
        return self.embeddings(ids.flatten(0, 1), first).unflatten(0, ids.shape[:2])

    def _logits(self, x: Tensor) -> Tensor:
        return self.head(x, self.embeddings.word_embeddings)


def load_umt_decoder(decoder: BertDecoder, state: Mapping[str, Tensor]) -> None:
    """Loads weights under UMT's names, as many of the decoder's as there are.

    Args:
        state: `bert.*` and `cls.predictions.*`, without "text_decoder." in front.

    Raises:
        ValueError: unexpected weights, other shapes, or a projection that is not the table of word embeddings.
    """
    own = {decoder_name(name): name for name in decoder.state_dict()}
    tied = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    apart = [a for a, b in tied.items() if a in state and b in state and not torch.equal(state[a], state[b])]
    if apart:
        raise ValueError(f"the decoder's projection is its table of word embeddings; these weights are others: {apart}")
    constant = "bert.embeddings.position_ids"
    unexpected = sorted(state.keys() - own.keys() - tied.keys() - {constant})
    if unexpected:
        raise ValueError(
            f"a decoder of {len(decoder.layers)} layers has no such weights: {unexpected[:4]}, {len(unexpected)} in all"
        )
    try:
        decoder.load_state_dict({own[name]: v for name, v in state.items() if name in own}, strict=False)
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit the decoder of {decoder.shape}: {error}") from error


def decoder_to_umt(decoder: BertDecoder) -> dict[str, Tensor]:
    """The weights under UMT's names, the tied projection left out, as `load_umt_decoder` reads them."""
    return {decoder_name(name): value for name, value in decoder.state_dict().items()}


def decoder_name(name: str) -> str:
    """One of a decoder's weights under UMT's name, which is BLIP's, too."""
    for ours, theirs in (
        (r"^embeddings\.", "bert.embeddings."),
        (r"^layers\.", "bert.encoder.layer."),
        (r"^head\.dense\.", "cls.predictions.transform.dense."),
        (r"^head\.norm\.", "cls.predictions.transform.LayerNorm."),
        (r"^head\.bias$", "cls.predictions.bias"),
    ):
        name = re.sub(ours, theirs, name)
    return name
