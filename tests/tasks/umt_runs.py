"""A tiny UMT retrieval model and a batch for it, and what a rank does with them in a process of its own."""

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
from tempme_vl.tasks.losses import matching_loss
from tempme_vl.tasks.umt_retrieval import UMTRetrievalModel
from tempme_vl.text import BertFusion, BertShape, BertTextEncoder
from tempme_vl.training import distributed

VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(45)))
OPTIONS: dict[str, Any] = {"r": 2, "merge_layers": (2, 4), "merge_frames": (2, 3)}
OPTIONS |= {"cross_percent": 40, "intra_percent": 20}
FRAMES = 6


def tiny(method: str = "tempme", mode: str = "per_frame", drop_path: float = 0.0, seed: int = 0) -> UMTRetrievalModel:
    """ "umt:tiny" with dropped paths as wanted, its clip positions random."""
    torch.manual_seed(seed)
    config = replace(umt.model_config("tiny", FRAMES, mode), drop_path=drop_path)
    options = {"tempme": OPTIONS, "tome": {"r": 2}, "none": {}}[method]
    schedule = make_schedule(method, config.layers, FRAMES, config.patches, 0, mode == "joint", **options)
    frontend = VisualFrontend(umt.build(config), schedule, umt.saved_config(config))
    frontend.init_clip_positions(0.1)
    shape = BertShape.named("tiny", vocab_size=len(VOCABULARY))
    return UMTRetrievalModel(frontend, BertTextEncoder(shape), BertFusion(shape), VOCABULARY)


def make_batch(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Four different pairs, the captions of different lengths."""
    ids = torch.randint(5, len(VOCABULARY), (4, 7), generator=torch.Generator().manual_seed(2))
    ids[:, 0] = 2
    mask = (torch.arange(7) < torch.tensor([[3], [7], [5], [4]])).long()
    return {
        "video": random_video(FRAMES, videos=4, dtype=dtype),
        "frame_mask": torch.ones(4, FRAMES, dtype=torch.int64),
        "text_ids": ids * mask,
        "text_mask": mask,
        "video_id": torch.arange(4),
        "text_id": torch.arange(4),
        "valid": torch.ones(4),
    }


def contrast() -> dict[str, Tensor]:
    """The contrastive part of the loss and its gradient, averaged over ranks as DeepSpeed averages it, in float64.

    Two pairs on different ranks share their video, and one video could not be read.
    """
    distributed.initialize()
    model, batch = tiny().double().eval(), make_batch(torch.float64)
    batch["video_id"], batch["valid"] = torch.tensor([0, 1, 0, 3]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    local = 4 // distributed.world_size()
    mine = slice(distributed.rank() * local, (distributed.rank() + 1) * local)
    batch = {key: value[mine] for key, value in batch.items()}
    features = model(batch)
    loss = model.loss(features, batch) - matching_loss(features["match"], features["match_valid"])
    loss.backward()
    result = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            if distributed.world_size() > 1:
                dist.all_reduce(parameter.grad)
            result[name] = parameter.grad / distributed.world_size()
    return result
