"""What a host costs beside its compressed self: tokens and GFLOPs of one video; a multiply-add is 1."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from tempme_vl.integrations.base import Costs, Host


def count_weights(module: nn.Module) -> int:
    """Weights of its matrices, without packing: of a layer in 4 bits, which holds two in a byte, each counts."""
    total = 0
    for part in module.modules():
        own = sum(weight.numel() for weight in part.parameters(recurse=False) if weight.ndim > 1)
        rows, columns = getattr(part, "out_features", None), getattr(part, "in_features", None)
        total += rows * columns if own and rows and columns else own
    return total


def decoder_layers(host: Host) -> nn.ModuleList:
    """Of the language model."""
    return max((m for m in host.language_model.modules() if isinstance(m, nn.ModuleList)), key=len)


def prefill_gflops(host: Host, tokens: float | Sequence[float]) -> float:
    """Cost of the decoder's layers for reading so many tokens, causal attention included; a multiply-add is 1.

    Args:
        tokens: in all layers, or in each.
    """
    layers = decoder_layers(host)
    width = host.model.config.get_text_config().hidden_size
    counts = [float(tokens)] * len(layers) if isinstance(tokens, (int, float)) else tokens
    each = count_weights(layers) / len(layers)
    return sum(each * count + count**2 * width for count in counts) / 1e9


def cost_table(host: Host) -> str:
    """Tokens and costs of one video in the host's own way and in ours, as text."""
    costs = host.costs()
    prefill = None if costs.tokens is None else prefill_gflops(host, costs.tokens)
    rows: list[tuple[str, float, float | None, str]] = [
        ("visual tokens", costs.native_tokens, costs.tokens, "{:.0f}"),
        ("vision tower, GFLOPs", costs.native_tower, costs.tower, "{:.4g}"),
        ("prefill of these tokens, GFLOPs", prefill_gflops(host, costs.native_tokens), prefill, "{:.4g}"),
    ]
    height, width = costs.frame
    lines = [
        f"{type(host.model).__name__}, {host.num_frames} frames of {height} x {width} pixels, method {host.method!r} "
        "(a multiply-add is 1 FLOP)",
        f"{'':32}{'host':>12}{'compressed':>12}{'ratio':>8}",
    ]
    for name, native, ours, form in rows:
        known = ("-", "-") if ours is None else (form.format(ours), f"{ours / native if native else math.nan:.3f}")
        lines.append(f"{name:32}{form.format(native):>12}{known[0]:>12}{known[1]:>8}")
    if costs.tokens is None:
        lines.append(f"How many tokens {host.method!r} leaves follows from each video: nothing is known ahead.")
    if more_tokens(costs):
        lines.append(
            f"Beware: {costs.tokens} tokens are more than the {costs.native_tokens} of the host's own way, which pools "
            "them: merge more, or the language model gets slower."
        )
    return "\n".join(lines)


def more_tokens(costs: Costs) -> bool:
    """Whether the language model reads more tokens than in the host's own way."""
    return costs.tokens is not None and costs.tokens > costs.native_tokens
