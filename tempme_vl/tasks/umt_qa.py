"""UMT's question answering: a question that has seen the video, and a decoder that ranks answers or writes one.

Letters: B videos, Q questions, A answers, K candidates for each question, L words of any of them, D width of the text;
others as in `tempme_vl.state`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tempme_vl.backbones import split_name
from tempme_vl.backbones.umt import Mode
from tempme_vl.backbones.umt_checkpoint import KeyReport, convert, read_checkpoint
from tempme_vl.frontend import VisualFrontend, create_frontend
from tempme_vl.merging import MergeSchedule
from tempme_vl.pretrained import load_model, load_vocabulary, load_weights, save_model, save_vocabulary
from tempme_vl.state import at_least_float32
from tempme_vl.tasks.losses import gather_rows
from tempme_vl.tasks.umt_retrieval import TEXT_OF
from tempme_vl.text import (
    BertDecoder,
    BertFusion,
    BertShape,
    BertTextEncoder,
    QuestionKeys,
    VideoKeys,
    bert_from_umt,
    load_umt_decoder,
)

_log = logging.getLogger(__name__)

Rule = Literal["likelihood", "umt"]


@dataclass(frozen=True)
class Ranking:
    """The likeliest answers of Q questions, the best one first.

    Attributes:
        answers: (Q, K) int64, numbers in the answer list.
        probabilities: (Q, K), the softmax of the scores over these K.
    """

    answers: Tensor
    probabilities: Tensor


class UMTQAModel(nn.Module):
    """A question encoder with all of BERT's layers, the upper ones looking at the video, and an answer decoder (UMT).

    Args:
        frontend: the visual tower; questions attend to its normed tokens, merged or not. Its head, which pools them
            for retrieval, has no part in an answer and is frozen.
        text, fusion: BERT's lower and upper layers.
        decoder: attends to the question's words.
        vocabulary: the words that question and answer ids stand for, in order.
        config: JSON data; its "input" says how clips, questions and answers were sampled and cut in training.
    """

    def __init__(
        self,
        frontend: VisualFrontend,
        text: BertTextEncoder,
        fusion: BertFusion,
        decoder: BertDecoder,
        vocabulary: tuple[str, ...],
        config: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.frontend, self.text, self.fusion, self.decoder = frontend, text, fusion, decoder
        self.frontend.head.requires_grad_(False)
        self.vocabulary = vocabulary
        self.config: dict[str, Any] = {
            "input": {"sampling": "segment", "max_words": 25, "answer_words": 5},
            **(config or {}),
        }

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encodes questions about videos; with answers it also says how unlikely they are.

        Args:
            batch: video (B, F, 3, H, W), frame_mask (B, F), question_ids and question_mask (B, L); to train also
                answer_ids and answer_mask (A, L), answer_row (A,) int64 (the answer's question; an answer each, in
                order, without it) and valid (B,), 0 for unreadable videos.

        Returns:
            states (B, L, D); with answers answer_loss (A,), see `BertDecoder.sequence_loss`.
        """
        video = batch["video"]
        if "valid" in batch:  # whatever an unreadable video holds, even NaN, must not reach the gradients
            video = video.where(batch["valid"].bool().view(-1, 1, 1, 1, 1), 0.0)
        keys = self.keys_values(self.encode_video(video, batch["frame_mask"]))
        features = {"states": self.encode_question(batch["question_ids"], batch["question_mask"], keys)}
        if "answer_ids" in batch:
            question = self.decoder.keys_values(features["states"], batch["question_mask"])
            if "answer_row" in batch:
                question = question.select(batch["answer_row"])
            ids, mask = batch["answer_ids"].unsqueeze(1), batch["answer_mask"].unsqueeze(1)
            features["answer_loss"] = self.decoder.sequence_loss(ids, mask, question).squeeze(1)
        return features

    def loss(self, features: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """The sum of weight * answer loss over the number of questions (UMT); 0 if no video was readable.

        Args:
            features: what the model made of the batch.
            batch: answer_weight (A,), all 1 without it (UMT: how often an answer was given to its question; 1 on
                MSRVTT-QA), answer_row as above, and valid (B,). Questions of unreadable videos do not count.
        """
        losses = features["answer_loss"]
        if "answer_weight" in batch:
            losses = losses * batch["answer_weight"]
        valid = batch["valid"].bool()
        losses = losses.where(valid[batch["answer_row"]] if "answer_row" in batch else valid, 0.0)
        # per question of the global batch: DeepSpeed averages over ranks, which may hold unequal numbers of valid ones
        everywhere = gather_rows(valid.long())
        ranks = len(everywhere) // len(valid)
        return losses.sum() * ranks / everywhere.sum().clamp(min=1)

    def encode_video(self, video: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """(B, F, 3, H, W) -> (B, M, D_video), the normed tokens."""
        return self.frontend.norm(self.frontend(video, frame_mask).tokens)

    def keys_values(self, tokens: Tensor) -> VideoKeys:
        """(B, M, D_video) tokens -> what the fusion layers need of each video, once for all its questions."""
        return self.fusion.keys_values(tokens)

    def encode_question(self, ids: Tensor, mask: Tensor, keys: VideoKeys) -> Tensor:
        """Q questions (Q, L), each with its video (`VideoKeys.select` repeats them) -> (Q, L, D) states."""
        return self.fusion(self.text(ids, mask), mask, keys)

    @torch.no_grad()
    def rank(
        self,
        states: Tensor,
        mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        candidates: int = 128,
        rule: Rule = "likelihood",
        rows: int = 1024,
    ) -> Ranking:
        """Answers of a list in the order of their likelihood.

        The candidates are those whose first word is the likeliest one; among equals, such as answers with the same
        first word, the earlier ones of the list.

        Args:
            states, mask: (Q, L, D) and (Q, L) of the questions.
            answer_ids, answer_mask: (A, L), the list; [CLS], words, [SEP], then padding.
            candidates: K; the whole list where it is shorter.
            rule: the score. "likelihood": log p(answer), as BLIP and TESTA have it. "umt": log p(first word) +
                log p(answer), which counts the first word twice and is behind UMT's published accuracies.
            rows: answers that are decoded at once, at least one per question: bounds the memory.

        Raises:
            ValueError: an unknown rule, an empty list, answers that are only [CLS], or no candidates.
        """
        if rule not in get_args(Rule):
            raise ValueError(f"expected one of the rules {', '.join(get_args(Rule))}; got {rule!r}")
        if candidates < 1 or answer_ids.ndim != 2 or answer_ids.shape != answer_mask.shape or not answer_ids.numel():
            raise ValueError(
                f"expected answers (A, L) with a mask alike, at least one of them, and at least one candidate; got "
                f"{tuple(answer_ids.shape)}, {tuple(answer_mask.shape)} and {candidates} candidates"
            )
        if answer_ids.shape[1] < 2 or not answer_mask[:, 1].all():
            raise ValueError("expected answers of [CLS] and at least one word; some of these have none")
        question = self.decoder.keys_values(states, mask)
        first_words = self._first_words(question, answer_ids)
        # stable, so that ties fall alike on every machine
        first_words, order = first_words.sort(dim=1, descending=True, stable=True)
        first_words, chosen = first_words[:, :candidates], order[:, :candidates]
        losses = [
            self.decoder.sequence_loss(answer_ids[part], answer_mask[part], question)
            for part in chosen.split(max(1, rows // len(states)), dim=1)
        ]
        scores = -torch.cat(losses, dim=1)
        if rule == "umt":
            scores = scores + first_words
        probabilities, order = scores.softmax(1).sort(dim=1, descending=True, stable=True)
        return Ranking(chosen.gather(1, order), probabilities)

    def generate(self, states: Tensor, mask: Tensor, max_words: int | None = None) -> list[str]:
        """The likeliest words one after the other, as texts.

        Args:
            states, mask: (Q, L, D) and (Q, L) of the questions.
            max_words: most word pieces of an answer, the end token among them; as in training by default, where
                an answer starts with a token that is not generated.

        Raises:
            ValueError: a vocabulary that is not the decoder's, or without [CLS] and [SEP].
        """
        if len(self.vocabulary) != self.decoder.shape.vocab_size or not {"[CLS]", "[SEP]"} <= set(self.vocabulary):
            raise ValueError(
                f"expected a vocabulary of {self.decoder.shape.vocab_size} words, [CLS] and [SEP] among them; got "
                f"{len(self.vocabulary)}: create the model with the one it was trained with"
            )
        start, end = self.vocabulary.index("[CLS]"), self.vocabulary.index("[SEP]")
        most = self.config["input"]["answer_words"] - 1 if max_words is None else max_words
        ids = self.decoder.generate(self.decoder.keys_values(states, mask), start, end, most)
        return [self._text(row[: row.index(end)] if end in row else row) for row in ids.tolist()]

    def _first_words(self, question: QuestionKeys, answer_ids: Tensor) -> Tensor:
        """(Q, A): log p of every answer's first word, all answers starting with the same token."""
        start = answer_ids[:1, :1].expand(len(question), 1).unsqueeze(1)
        return at_least_float32(self.decoder(start, question)).log_softmax(-1).flatten(1)[:, answer_ids[:, 1]]

    def _text(self, ids: list[int]) -> str:
        """Word pieces joined to words: pieces that continue a word begin with ##."""
        return " ".join(self.vocabulary[number] for number in ids).replace(" ##", "")

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the blocks of all parts in the backward pass."""
        self.frontend.set_grad_checkpointing(enable)
        self.text.grad_checkpointing = self.fusion.grad_checkpointing = self.decoder.grad_checkpointing = enable

    def save_pretrained(self, directory: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Writes config.json, vocab.txt and model.safetensors.

        Args:
            state: full weights when the module's own are partitioned (ZeRO-3) or half precision; default its own.
        """
        config = {
            "kind": "umt_qa",
            "frontend": self.frontend.full_config(),
            "text": self.text.shape.to_dict(),
            "decoder_layers": len(self.decoder.layers),
            "input": self.config["input"],
        }
        save_model(directory, config, self.state_dict() if state is None else state)
        save_vocabulary(directory, self.vocabulary)

    @classmethod
    def from_umt_state_dict(
        cls,
        state: Mapping[str, Tensor],
        heads: int,
        text_heads: int,
        image_size: int,
        mode: Mode,
        schedule: MergeSchedule,
        vocabulary: tuple[str, ...] = (),
    ) -> UMTQAModel:
        """A model on UMT-named weights of the QA or the pre-training form; all other sizes follow from their shapes.

        Args:
            heads, text_heads: of the visual and the text tower.
            others: see `VisualFrontend.from_umt_state_dict`.

        Raises:
            ValueError: weights of another family, or missing or unknown keys.
        """
        converted = convert(state, "qa")
        report = converted.report
        if report.missing or report.unexplained:
            raise ValueError(
                f"not the weights of UMT's question answering: {_some(report.missing)} are missing, "
                f"{_some(report.unexplained)} unknown"
            )
        frontend = VisualFrontend.from_umt_state_dict(converted.state, heads, image_size, mode, schedule)
        text, fusion = bert_from_umt(_part(converted.state, "text_encoder."), text_heads)
        answers = _part(converted.state, "text_decoder.")
        depth = sum(key.endswith(".crossattention.self.query.weight") for key in answers)
        decoder = BertDecoder(text.shape, depth)
        load_umt_decoder(decoder, answers)
        return cls(frontend, text, fusion, decoder, vocabulary)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> UMTQAModel:
        """Reads what `save_pretrained` wrote.

        Raises:
            ValueError: a folder without the files, one of another kind of model, or weights that do not fit.
        """
        config, state = load_model(directory)
        if config["kind"] != "umt_qa":
            raise ValueError(f"expected a UMT QA model in {directory}; got one of kind {config['kind']!r}")
        shape = BertShape(**config["text"])
        model = cls(
            VisualFrontend.from_config(config["frontend"]),
            BertTextEncoder(shape),
            BertFusion(shape),
            BertDecoder(shape, config["decoder_layers"]),
            load_vocabulary(directory),
            config,
        )
        load_weights(model, state, directory)
        return model


def create_umt_qa_model(
    name: str,
    vocabulary: tuple[str, ...],
    pretrained: str | None = None,
    method: str = "tempme",
    num_frames: int = 12,
    clip_position_std: float = 0.0,
    **options: Any,
) -> UMTQAModel:
    """UMT's question answering by name ("umt:tiny", "umt:b16", "umt:l16").

    Args:
        vocabulary: words in the order of their ids (`tempme_vl.data.text.bert_vocabulary` for public weights).
        pretrained: a public UMT checkpoint in any form, or None for random weights; what it lacks starts at random.
            Without a decoder of its own, the decoder starts from the fusion layers, as UMT's does.
        others: see `tempme_vl.create_frontend`.

    Raises:
        ValueError: see `tempme_vl.create_frontend`; or a text side of other sizes than the model's.
    """
    family, model_name = split_name(name)
    if family != "umt":
        raise ValueError(f"expected one of UMT's models, such as 'umt:b16'; got {name!r}")
    frontend = create_frontend(name, pretrained, method, num_frames, clip_position_std, **options)
    shape = BertShape.named(TEXT_OF[model_name], cross_width=frontend.shape.width, vocab_size=len(vocabulary))
    decoder = BertDecoder(shape, shape.layers - shape.fusion_layer)
    model = UMTQAModel(frontend, BertTextEncoder(shape), BertFusion(shape), decoder, vocabulary)
    if pretrained is not None:
        _log.info("%s", load_umt_qa_text(model, read_checkpoint(pretrained), shape.heads))
    return model


def load_umt_qa_text(model: UMTQAModel, state: Mapping[str, Tensor], heads: int) -> KeyReport:
    """Loads question encoder and decoder from a public UMT checkpoint, as far as it has them.

    Returns:
        what became of every key of the file, the visual ones included.

    Raises:
        ValueError: a text side of other sizes than the model's.
    """
    converted = convert(state, "qa", model.text.shape.fusion_layer)
    bert = _part(converted.state, "text_encoder.")
    if bert:
        text, fusion = bert_from_umt(bert, heads)
        wanted = model.text.shape
        # weights tell sizes alone; how they start and drop out is the model's own
        found = replace(text.shape, dropout=wanted.dropout, init_std=wanted.init_std)
        if found != wanted:
            raise ValueError(f"the checkpoint's text side is {found}; the model wants {wanted}")
        model.text.load_state_dict(text.state_dict())
        model.fusion.load_state_dict(fusion.state_dict())
    load_umt_decoder(model.decoder, _part(converted.state, "text_decoder."))
    return converted.report


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _some(keys: tuple[str, ...]) -> str:
    return f"{list(keys[:4])}{f' ... ({len(keys)} in all)' if len(keys) > 4 else ''}"
