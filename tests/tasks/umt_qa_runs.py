"""A tiny UMT QA model and a batch for it, and what a rank does with them in a process of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from towers import random_video

from tempme_vl import VisualFrontend
from tempme_vl.backbones import umt
from tempme_vl.frontend import make_schedule
from tempme_vl.tasks.umt_qa import UMTQAModel
from tempme_vl.text import BertDecoder, BertFusion, BertShape, BertTextEncoder
from tempme_vl.training import distributed

VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(24)), "##s")
START, END = 2, 3
OPTIONS: dict[str, Any] = {"r": 2, "merge_layers": (2, 4), "merge_frames": (2, 3)}
OPTIONS |= {"cross_percent": 40, "intra_percent": 20}
FRAMES = 6


def tiny(
    method: str = "tempme", mode: str = "clip", drop_path: float = 0.0, seed: int = 0, layers: int = 2
) -> UMTQAModel:
    """ "umt:tiny" with a text side of another width than the video's; its clip positions random."""
    torch.manual_seed(seed)
    config = replace(umt.model_config("tiny", FRAMES, mode), drop_path=drop_path)
    options = {"tempme": OPTIONS, "tome": {"r": 2}, "none": {}}[method]
    schedule = make_schedule(method, config.layers, FRAMES, config.patches, 0, mode == "joint", **options)
    frontend = VisualFrontend(umt.build(config), schedule, umt.json_config(config))
    frontend.init_clip_positions(0.1)
    shape = BertShape.named("tiny", width=48, vocab_size=len(VOCABULARY))
    parts = BertTextEncoder(shape), BertFusion(shape), BertDecoder(shape, layers)
    return UMTQAModel(frontend, *parts, VOCABULARY)


def texts(lengths: tuple[int, ...], words: int, seed: int, end: bool) -> tuple[Tensor, Tensor]:
    """Random ids and their mask; [CLS], words, [SEP] if wanted, padding."""
    ids = torch.randint(5, len(VOCABULARY), (len(lengths), words), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(words) < torch.tensor(lengths)[:, None]).long()
    ids[:, 0] = START
    if end:
        ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = END
    return ids * mask, mask


def make_batch(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Four questions about different videos, the second of them with two answers."""
    question_ids, question_mask = texts((3, 7, 5, 4), 7, 2, end=False)
    answer_ids, answer_mask = texts((3, 5, 4, 3, 3), 5, 3, end=True)
    return {
        "video": random_video(FRAMES, videos=4, dtype=dtype),
        "frame_mask": torch.ones(4, FRAMES, dtype=torch.int64),
        "question_ids": question_ids,
        "question_mask": question_mask,
        "answer_ids": answer_ids,
        "answer_mask": answer_mask,
        "answer_row": torch.tensor([0, 1, 1, 2, 3]),
        "answer_weight": torch.tensor([1.0, 0.7, 0.3, 1.0, 1.0]),
        "valid": torch.ones(4),
    }


def loss_and_gradient() -> dict[str, Tensor]:
    """The loss and its gradient, averaged over ranks as DeepSpeed averages them, in float64; one video is unreadable.

    Questions with one answer each, so that they split evenly.
    """
    distributed.initialize()
    model, batch = tiny().double().eval(), make_batch(torch.float64)
    one = torch.tensor([0, 1, 3, 4])
    batch |= {key: batch[key][one] for key in ("answer_ids", "answer_mask", "answer_weight")}
    del batch["answer_row"]
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
