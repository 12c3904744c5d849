"""Words chosen one after the other by a decoder: the likeliest, or the best of several beams.

The rule of beams is that of transformers 4.21, with which BLIP's and TESTA's captions and answers were written: a text
is worth the sum of its words' log-likelihoods over its length, and a row ends when no beam can do better.

Letters: B rows, K beams, L words so far, V words in all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tempme_vl.precision import at_least_float32

NextWords = Callable[[Tensor], Tensor]
"""(B, K, L) int64 words so far -> (B, K, V) logits of the next."""


@dataclass(frozen=True)
class Writing:
    """How a text is written.

    Attributes:
        end, pad: numbers of [SEP] and [PAD].
        beams: K; 1 for the likeliest word each time.
        most, least: words in all, those that it starts with among them; the end does not come before `least`.
        repetition: what log-likelihoods of words that are there already are multiplied by, 1 or more.
    """

    end: int
    pad: int = 0
    beams: int = 3
    most: int = 30
    least: int = 1
    repetition: float = 1.0

    def __post_init__(self) -> None:
        if self.beams < 1 or self.most < 1 or self.least < 0 or self.repetition < 1:
            raise ValueError(
                f"expected beams and most of 1 or more, least of 0 and repetition of 1 or more; got {self}"
            )


@torch.no_grad()
def write(next_words: NextWords, start: Tensor, writing: Writing) -> Tensor:
    """Texts that go on from the words that they start with.

    Args:
        start: (B, L) int64.

    Returns:
        (B, L') int64: with their start, and the end where it was written, then padding; L' of the longest, at most
        `most`.

    Raises:
        ValueError: a start of as many words as may be written, or more.
    """
    if start.shape[1] >= writing.most:
        raise ValueError(f"expected a start of fewer than most={writing.most} words; got {start.shape[1]}")
    return _greedy(next_words, start, writing) if writing.beams == 1 else _by_beams(next_words, start, writing)


def _processed(scores: Tensor, ids: Tensor, writing: Writing) -> Tensor:
    """(..., V) scores of the next word, what is there already penalised, and the end forbidden that comes too early."""
    if writing.repetition != 1.0:
        seen = scores.gather(-1, ids)
        seen = torch.where(seen < 0, seen * writing.repetition, seen / writing.repetition)
        scores = scores.scatter(-1, ids, seen)
    if ids.shape[-1] < writing.least:
        scores = scores.index_fill(-1, torch.tensor([writing.end], device=scores.device), -torch.inf)
    return scores


def _greedy(next_words: NextWords, ids: Tensor, writing: Writing) -> Tensor:
    done = torch.zeros_like(ids[:, 0], dtype=torch.bool)
    while ids.shape[1] < writing.most and not done.all():
        word = _processed(next_words(ids.unsqueeze(1))[:, 0], ids, writing).argmax(-1).masked_fill(done, writing.pad)
        ids = torch.cat([ids, word.unsqueeze(1)], 1)
        done = done | (word == writing.end)
    return ids


@dataclass
class _Finished:
    """The best texts of a row that have ended, at most K."""

    most: int
    texts: list[tuple[float, Tensor]] = field(default_factory=list)

    def add(self, ids: Tensor, total: float) -> None:
        score = total / len(ids)
        if len(self.texts) < self.most or score > self.worst:
            self.texts.append((score, ids))
            if len(self.texts) > self.most:
                del self.texts[min(range(len(self.texts)), key=lambda n: self.texts[n][0])]

    @property
    def worst(self) -> float:
        return min(score for score, _ in self.texts)

    def is_full(self, best: float, words: int) -> bool:
        """Whether no running text can do better, the best of which has a total of so many words."""
        return len(self.texts) == self.most and self.worst >= best / words


def _by_beams(next_words: NextWords, start: Tensor, writing: Writing) -> Tensor:
    rows, beams = len(start), writing.beams
    ids = start.unsqueeze(1).expand(-1, beams, -1)
    finished, done = [_Finished(beams) for _ in range(rows)], [False] * rows
    # all beams are alike at first: only one of them counts
    totals = torch.full((rows, beams), -1e9, device=start.device, dtype=torch.float64)
    totals[:, 0] = 0.0
    while ids.shape[2] < writing.most and not all(done):
        logits = next_words(ids)
        scores = _processed(at_least_float32(logits).log_softmax(-1), ids, writing)
        whole = (scores + totals.to(scores.dtype).unsqueeze(-1)).flatten(1)
        best, place = whole.topk(2 * beams, dim=1)
        source, word = place // scores.shape[-1], place % scores.shape[-1]
        ids, totals = _next(ids, best, source, word, finished, done, writing)
    for row, texts in enumerate(finished):
        for beam in range(0 if done[row] else beams):
            texts.add(ids[row, beam], totals[row, beam].item())
    return _padded([max(reversed(f.texts), key=lambda text: text[0])[1] for f in finished], writing)


def _next(
    ids: Tensor,
    best: Tensor,
    source: Tensor,
    word: Tensor,
    finished: list[_Finished],
    done: list[bool],
    writing: Writing,
) -> tuple[Tensor, Tensor]:
    """The K running texts of each row and their totals; those that end go to the finished ones, and rows to `done`.

    Args:
        best, source, word: (B, 2 K), of the best continuations in order: total, beam, word.
    """
    running, totals = [], []
    for row, texts in enumerate(finished):
        chosen: list[tuple[Tensor, float]] = []
        if done[row]:
            padding = ids.new_full((1,), writing.pad)
            chosen = [(torch.cat([ids[row, beam], padding]), 0.0) for beam in range(writing.beams)]
        for rank in range(0 if done[row] else best.shape[1]):
            before, total = ids[row, source[row, rank]], best[row, rank].item()
            if word[row, rank] != writing.end:
                chosen.append((torch.cat([before, word[row, rank : rank + 1]]), total))
            elif rank < writing.beams:
                texts.add(before, total)
            if len(chosen) == writing.beams:
                break
        done[row] = done[row] or texts.is_full(best[row].max().item(), ids.shape[2])
        running.append(torch.stack([text for text, _ in chosen]))
        totals.append([total for _, total in chosen])
    return torch.stack(running), torch.tensor(totals, device=ids.device, dtype=torch.float64)


def _padded(texts: list[Tensor], writing: Writing) -> Tensor:
    """Of one length, with their end where there is room for it."""
    longest = min(max(map(len, texts)) + 1, writing.most)
    padded = texts[0].new_full((len(texts), longest), writing.pad)
    for row, text in enumerate(texts):
        padded[row, : len(text)] = text
        if len(text) < longest:
            padded[row, len(text)] = writing.end
    return padded
