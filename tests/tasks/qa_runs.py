"""Tiny question answering models and batches for them, and what a rank does with them in a process of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from towers import random_video

from tempme_vl import VisualFrontend
from tempme_vl.backbones import umt
from tempme_vl.merging import make_schedule
from tempme_vl.tasks.qa import ClassifierHead, DecoderHead, QAHead, VideoQAModel
from tempme_vl.tasks.qa.question import QuestionEncoder
from tempme_vl.text import BertDecoder, BertShape
from tempme_vl.training import distributed

VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(24)), "##s")
ANSWERS = ("word3", "word14 word5", "word1", "word14", "word2s word7", "word20 word8 word8", "word9", "word11s")
START, END = 2, 3
OPTIONS: dict[str, Any] = {"r": 2, "merge_layers": (2, 4), "merge_frames": (2, 3)}
OPTIONS |= {"cross_percent": 40, "intra_percent": 20}
FRAMES = 6
METHODS: dict[str, dict[str, Any]] = {"tempme": OPTIONS, "tome": {"r": 2}, "none": {}}
SHAPE = BertShape.named("tiny", width=48, vocab_size=len(VOCABULARY))  # of another width than the video's tokens
HEADS = ("decoder", "classifier", "choice")  # a choice: a classifier without a list of answers


def tiny_tower(method: str = "tempme", mode: str = "per_frame", drop_path: float = 0.0) -> VisualFrontend:
    """ "umt:tiny", its clip positions random."""
    config = replace(umt.model_config("tiny", FRAMES, mode), drop_path=drop_path)
    schedule = make_schedule(method, config.layers, FRAMES, config.patches, 0, mode == "joint", **METHODS[method])
    frontend = VisualFrontend(umt.build(config), schedule, umt.saved_config(config))
    frontend.init_clip_positions(0.1)
    return frontend


def decoder_head(layers: int = 2, proportional: bool = True, **options: Any) -> DecoderHead:
    questions = QuestionEncoder.of_shape(SHAPE, VOCABULARY, proportional=proportional)
    return DecoderHead(questions, BertDecoder(SHAPE, layers), **options)


def classifier_head(answers: tuple[str, ...] = ANSWERS, **options: Any) -> ClassifierHead:
    return ClassifierHead(QuestionEncoder.of_shape(SHAPE, VOCABULARY, **options), answers)


def tiny_qa(
    head: str = "decoder",
    method: str = "tempme",
    mode: str = "per_frame",
    drop_path: float = 0.0,
    seed: int = 0,
    **options: Any,
) -> VideoQAModel:
    """A model with one of `HEADS`; the decoder writes, if `options` do not say otherwise."""
    torch.manual_seed(seed)
    frontend = tiny_tower(method, mode, drop_path)
    made: QAHead
    if head == "decoder":
        made = decoder_head(**options)
    else:
        made = classifier_head(**({"answers": ()} if head == "choice" else {}), **options)
    return VideoQAModel(frontend, made)


def texts(lengths: tuple[int, ...], words: int, seed: int, end: bool) -> tuple[Tensor, Tensor]:
    """Random ids and their mask; [CLS], words, [SEP] if wanted, padding."""
    ids = torch.randint(5, len(VOCABULARY), (len(lengths), words), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(words) < torch.tensor(lengths)[:, None]).long()
    ids[:, 0] = START
    if end:
        ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = END
    return ids * mask, mask


def make_questions(head: str = "decoder") -> dict[str, Tensor]:
    """What a head needs to be asked four questions; to choose among three options, where it has to."""
    if head == "choice":
        ids, mask = texts((3, 4, 5, 7, 3, 6, 4, 4, 5, 3, 6, 5), 7, 4, end=False)
        return {"option_ids": ids.view(4, 3, 7), "option_mask": mask.view(4, 3, 7)}
    ids, mask = texts((3, 7, 5, 4), 7, 2, end=False)
    return {"question_ids": ids, "question_mask": mask}


def make_batch(head: str = "decoder", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Four questions about different videos, with answers; for the decoder, two of them to the second question."""
    batch = {
        "video": random_video(FRAMES, videos=4, dtype=dtype),
        "frame_mask": torch.ones(4, FRAMES, dtype=torch.int64),
        "valid": torch.ones(4),
        **make_questions(head),
    }
    if head != "decoder":
        return batch | {"answer_class": torch.tensor([2, 0, 1, 2]), "answer_weight": torch.tensor([1.0, 0.4, 1, 0.8])}
    batch["answer_ids"], batch["answer_mask"] = texts((3, 5, 4, 3, 3), 5, 3, end=True)
    batch["answer_row"] = torch.tensor([0, 1, 1, 2, 3])
    batch["answer_weight"] = torch.tensor([1.0, 0.7, 0.3, 1.0, 1.0])
    return batch


def one_answer_each(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A decoder's batch without the second answer to a question."""
    if "answer_row" not in batch:
        return batch
    one = torch.tensor([0, 1, 3, 4])
    batch = batch | {key: batch[key][one] for key in ("answer_ids", "answer_mask", "answer_weight")}
    del batch["answer_row"]
    return batch


def loss_of(model: VideoQAModel, batch: dict[str, Tensor], seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return model.loss(model(batch), batch)


def stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of what a head's `tokenize` gave."""
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def loss_and_gradient(head: str) -> dict[str, Tensor]:
    """The loss and its gradient, averaged over ranks as DeepSpeed averages them, in float64; one video is unreadable.

    Questions with one answer each, so that they split evenly.
    """
    distributed.initialize()
    model, batch = tiny_qa(head).double().eval(), one_answer_each(make_batch(head, torch.float64))
    batch["valid"] = torch.tensor([1.0, 1.0, 1.0, 0.0])
    local = 4 // distributed.world_size()
    mine = slice(distributed.rank() * local, (distributed.rank() + 1) * local)
    batch = {key: value[mine] for key, value in batch.items()}
    loss = model.loss(model(batch), batch)
    loss.backward()
    result = {"loss": loss.detach()}
    result |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if distributed.world_size() > 1:
        for value in result.values():
            dist.all_reduce(value)
    return {name: value / distributed.world_size() for name, value in result.items()}
