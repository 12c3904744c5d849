"""Answers without training for it: the text "question answer" that is nearest to the video in a retrieval model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from tempme_vl.tasks.retrieval import AnyRetrievalModel, MatchingRetrievalModel, RetrievalModel

MATCH_SHARE = 0.7  # UMT on MSRVTT-MC: 0.7 softmax(matching) + 0.3 softmax(similarity)


class ZeroShotQA(nn.Module):
    """A retrieval model that answers questions; nothing in it is trained, and it is used as `VideoQAModel`s are.

    CLIP takes the text with the highest similarity. UMT takes the largest of 0.7 softmax(logit of a match) + 0.3
    softmax(similarity / temperature) over the texts, its rule for multiple choice.

    Args:
        retrieval: the model.
        answers: what is tried where a question has no options, from a training split, the most frequent one first.
            Each costs a text to encode for every question.
        template: how question and answer make a text.
        rows: texts that are encoded at once: bounds the memory.

    Raises:
        ValueError: a retrieval model whose head compares more than an embedding of each side.
    """

    def __init__(
        self,
        retrieval: AnyRetrievalModel,
        answers: Sequence[str] = (),
        template: str = "{question} {answer}",
        rows: int = 1024,
    ):
        super().__init__()
        if isinstance(retrieval, RetrievalModel) and not retrieval.head.products:
            raise ValueError(
                f"zero-shot answers compare one embedding of a video with one of a text; this model has the head "
                f"{retrieval.head.name!r}"
            )
        self.retrieval, self.answers, self.template, self.rows = retrieval, tuple(answers), template, rows
        self.frontend = retrieval.frontend
        self.input = retrieval.input
        self.writes = False
        self.kept: tuple[str, ...] = (
            ("video", "tokens") if isinstance(retrieval, MatchingRetrievalModel) else ("video",)
        )
        max_words = retrieval.text.max_words(self.input.max_words)
        self._tokenizer = retrieval.words.tokenizer(max_words)

    def tokenize(self, question: str, answer: str | None = None, options: Sequence[str] = ()) -> dict[str, Tensor]:
        """Ids and mask (K, L) of the texts of all options, or of all answers.

        Raises:
            ValueError: neither options nor answers; or an answer to train on.
        """
        return self.tokenizer()(question, answer, options)

    def tokenizer(self) -> Callable[..., dict[str, Tensor]]:
        """`tokenize` without the model: a loader's workers need no weights."""
        return partial(_tokenize, self._tokenizer, self.template, self.answers)

    def text(self, prediction: Sequence[int]) -> str:
        """The answer with a number."""
        return self.answers[prediction[0]]

    @torch.no_grad()
    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encodes videos and answers questions, whichever a batch holds.

        Args:
            batch: video (B, F, 3, H, W) and frame_mask (B, F), or what an earlier call gave for them; to ask, what
                `tokenize` gives, stacked, and option_valid (B, K).

        Returns:
            video (B, E), as the retrieval model gives it, and for UMT tokens (B, M, D); with questions prediction
            (B, 1) int64, the number of the option or answer, and scores (B, K), shares of them that add up to 1:
            CLIP's are softmax(scale * similarity).
        """
        if "frame_mask" in batch:
            encoded = self.retrieval({name: batch[name] for name in ("video", "frame_mask")})
            features = {name: encoded[name] for name in self.kept}
        else:
            features = {name: batch[name] for name in self.kept}
        if "option_ids" in batch:
            scores = self._scores(features, batch)
            features |= {"scores": scores, "prediction": scores.argmax(dim=1, keepdim=True)}
        return features

    def _scores(self, features: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        videos, options, _ = batch["option_ids"].shape
        ids, mask = batch["option_ids"].flatten(0, 1), batch["option_mask"].flatten(0, 1)
        rows = torch.arange(videos, device=ids.device).repeat_interleave(options)
        parts = [
            self._encode(ids[part], mask[part], rows[part], features)
            for part in torch.arange(len(ids), device=ids.device).split(self.rows)
        ]
        similarity, match = (torch.cat(part).view(videos, options) for part in zip(*parts, strict=True))
        if "option_valid" in batch:
            there = batch["option_valid"].bool()
            similarity, match = (t.masked_fill(~there, -torch.inf) for t in (similarity, match))
        if not isinstance(self.retrieval, MatchingRetrievalModel):
            return (self.retrieval.logit_scale() * similarity).softmax(1)
        temperature = self.retrieval.temperature()
        return MATCH_SHARE * match.softmax(1) + (1 - MATCH_SHARE) * (similarity / temperature).softmax(1)

    def _encode(self, ids: Tensor, mask: Tensor, rows: Tensor, features: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(R,) similarities of R texts with their videos, and logits of a match (UMT; else the same again)."""
        encoded = self.retrieval({"text_ids": ids, "text_mask": mask})
        similarity = (encoded["text"] * features["video"][rows]).sum(dim=1)
        if not isinstance(self.retrieval, MatchingRetrievalModel):
            return similarity, similarity
        keys = self.retrieval.keys_values(features["tokens"]).select(rows)
        return similarity, self.retrieval.match_logits(encoded[self.retrieval.fine_text_parts[0]], mask, keys)


def _tokenize(
    tokenizer: Callable[[str], tuple[Tensor, Tensor]],
    template: str,
    answers: Sequence[str],
    question: str,
    answer: str | None = None,
    options: Sequence[str] = (),
) -> dict[str, Tensor]:
    if answer is not None:
        raise ValueError("a zero-shot model is not trained; expected a question without its answer")
    if not (options or answers):
        raise ValueError(f"expected options, or a model with a list of answers, for the question {question!r}")
    texts = [template.format(question=question, answer=text) for text in options or answers]
    ids, masks = zip(*map(tokenizer, texts), strict=True)
    return {"option_ids": torch.stack(ids), "option_mask": torch.stack(masks)}
