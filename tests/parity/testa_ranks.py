"""What a rank does in the test of several ranks."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from parity.cases import Case
from parity.testa import batch_of, retrieval_of, with_drawn
from torch import Tensor

from tempme_vl.tasks.losses import matching_loss
from tempme_vl.tasks.testa.public import public_names


def step(reference: Path, weights: Path, per_rank: int) -> dict[str, Tensor]:
    """One step of this rank with the recorded negatives: losses, weights of negatives, queue, and gradients as their
    mean over ranks ("grad." and public names)."""
    dist.init_process_group("gloo")
    case, recorded, rank = Case(weights), Case(reference), dist.get_rank()
    model, batch = retrieval_of(case), batch_of(case, slice(rank * per_rank, (rank + 1) * per_rank))
    if place := re.search(r"pointer set to (\d+)", recorded.config["weights_and_inputs"]):
        model.queue.place.fill_(int(place[1]))
    if "negative_all_rank" in recorded.config:
        model.options = replace(model.options, all_ranks=recorded.config["negative_all_rank"])
    features = model(batch)
    found = dict(zip(("weights_t2v", "weights_v2t"), model.negatives(features, batch)[:2], strict=True))
    drawn = recorded.group(f"out.rank{rank}.")
    logits = with_drawn(model, features, batch, drawn)
    found["loss_vtc"] = model.contrast(features, batch).loss()
    found["loss_vtm"] = matching_loss(logits)
    (found["loss_vtc"] + found["loss_vtm"]).backward()
    model.enqueue(features, batch)
    found |= {"queue": model.queue.video, "ids": model.queue.ids, "place": model.queue.place}
    names = public_names(model)
    for name, weight in model.named_parameters():
        if f"grad.{names[name]}" in recorded.tensors:
            assert weight.grad is not None
            dist.all_reduce(weight.grad)
            found[f"grad.{names[name]}"] = weight.grad / dist.get_world_size()
    dist.destroy_process_group()
    return {name: value.detach() for name, value in found.items()}
