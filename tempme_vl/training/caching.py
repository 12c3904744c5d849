"""Gradient caching: an exact large contrastive batch in the memory of a small one (GradCache, RepL4NLP 2021).

The batch is encoded in chunks without a graph; the loss over all features gives each feature's gradient; a second
pass encodes every chunk again with a graph and sends its features' gradients down.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def cached_update(
    engine: Any,
    batch: Mapping[str, Any],
    loss_fn: Callable[[Mapping[str, Tensor], Mapping[str, Any]], Tensor],
    chunks: int,
    check: Callable[[Tensor], None],
) -> Tensor:
    """One optimizer step whose gradient is that of the whole batch.

    Args:
        engine: a DeepSpeed engine with gradient_accumulation_steps = chunks; its output maps names to features
            (B, ...) or to scalars that do not depend on the batch.
        check: called with the loss before any gradient is computed.

    Returns:
        the loss of the whole batch.
    """
    parts = _split(batch, chunks)
    random_states, outputs = [], []
    with torch.no_grad():
        for part in parts:
            random_states.append(_random_state())
            outputs.append(engine(part))

    features = {
        name: (value if value.ndim == 0 else torch.cat([output[name] for output in outputs])).requires_grad_()
        for name, value in outputs[0].items()
    }
    loss = loss_fn(features, batch)
    check(loss)
    names = list(features)
    gradients = dict(zip(names, torch.autograd.grad(loss, [features[n] for n in names]), strict=True))

    for index, (part, state) in enumerate(zip(parts, random_states, strict=True)):
        _set_random_state(state)
        output = engine(part)
        surrogate = torch.zeros((), device=loss.device)
        for name in names:
            gradient = gradients[name]
            if gradient.ndim:
                gradient = gradient.chunk(chunks)[index]
            else:
                # a scalar's gradient counts once, not once a chunk
                gradient = gradient / chunks
            surrogate = surrogate + (output[name] * gradient).sum()
        # DeepSpeed averages over accumulation steps; these chunks are to be summed
        engine.backward(surrogate * chunks)
        engine.step()
    return loss.detach()


def _split(batch: Mapping[str, Any], chunks: int) -> list[dict[str, Tensor]]:
    tensors = {key: value.chunk(chunks) for key, value in batch.items() if isinstance(value, Tensor)}
    return [{key: value[index] for key, value in tensors.items()} for index in range(chunks)]


def _random_state() -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def _set_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
