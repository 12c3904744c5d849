"""Blocks of transformers' vision towers as `BlockAdapter`s, and why a tower's blocks are refused.

An adapter holds the library's own layer and looks its children up when called, so that LoRA added to the host is seen.
A child or parameter that an adapter does not know is refused, because it would be left out of the arithmetic.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from tempme_vl.backbones.attention import attend
from tempme_vl.backbones.base import BlockAdapter
from tempme_vl.libraries import describe
from tempme_vl.state import AttentionContext

VERSION = describe("transformers")


def check_children(module: nn.Module, children: set[str], parameters: Collection[str] = ()) -> None:
    """Raises:
    ValueError: a module with other children, or other parameters of its own, than these.
    """
    found = {name for name, _ in module.named_children()}
    own = {name for name, _ in module.named_parameters(recurse=False)}
    if found != children or own != set(parameters):
        raise ValueError(
            f"expected a {type(module).__name__} of {sorted({*children, *parameters})}; got {sorted(found | own)} "
            f"({VERSION}): a change of the library, or a modified tower, which needs an adapter of its own"
        )


@dataclass(frozen=True)
class _Names:
    """Names of an attention's children: q, k and v (or one for all three), what follows attention, qk-norms."""

    qkv: tuple[str, ...]
    out: tuple[str, ...]
    norms: tuple[str, ...] = ()

    def children(self) -> set[str]:
        """Those of the attention itself, whose projections may lie one level deeper."""
        return {name.split(".")[0] for name in (*self.qkv, *self.out, *self.norms)}


_ATTENTIONS = (
    _Names(("q_proj", "k_proj", "v_proj"), ("out_proj",)),  # CLIP, SigLIP
    _Names(("q_proj", "k_proj", "v_proj"), ("o_proj",)),  # DINOv2 of transformers 5
    _Names(("attention.query", "attention.key", "attention.value"), ("output.dense", "output.dropout")),  # and of 4
    _Names(
        ("q_proj", "k_proj", "v_proj"), ("projection_layer", "projection_dropout"), ("q_norm", "k_norm")
    ),  # InternVL
    _Names(("qkv",), ("projection",)),  # InstructBLIP
)


class HFLayer(BlockAdapter):
    """A layer of transformers, held as it is.

    Raises:
        ValueError: a layer or an attention that is not built of known children.
    """

    children_: ClassVar[set[str]]
    parameters_: ClassVar[set[str]] = set()
    attention: ClassVar[str] = "attention"
    layer: Any

    def __init__(self, layer: nn.Module, config: Any):
        super().__init__()
        check_children(layer, self.children_, self.parameters_)
        attention: Any = layer.get_submodule(self.attention)
        found = {name for name, _ in attention.named_children()}
        known = [names for names in _ATTENTIONS if names.children() == found]
        if not known:
            raise ValueError(f"unknown {type(attention).__name__} of {sorted(found)} ({VERSION})")
        self.layer, self.names, self.heads = layer, known[0], config.num_attention_heads
        inner = getattr(attention, "attention", attention)
        self.scale: float | None = getattr(inner, "scale", getattr(inner, "scaling", None))
        self.dropout: float = getattr(config, "attention_dropout", getattr(config, "attention_probs_dropout_prob", 0.0))

    def attend(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, AttentionContext]:
        """(R, N, D) normed tokens -> attention's output (R, N, D), and its queries and keys after their norms."""
        attention, names = self.layer.get_submodule(self.attention), self.names
        projected = [attention.get_submodule(name)(x) for name in names.qkv]
        q, k, v = projected if len(projected) == 3 else projected[0].chunk(3, dim=-1)
        if names.norms:
            q, k = attention.get_submodule(names.norms[0])(q), attention.get_submodule(names.norms[1])(k)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        x = attend(q, k, v, bias, self.dropout if attention.training else 0.0, self.scale)
        for name in names.out:
            x = attention.get_submodule(name)(x)
        return x, AttentionContext(k, q, bias, self.scale)


class CLIPLayer(HFLayer):
    """CLIP, SigLIP, SigLIP 2, InstructBLIP: nothing but norms, attention and MLP."""

    children_: ClassVar = {"layer_norm1", "self_attn", "layer_norm2", "mlp"}
    attention = "self_attn"

    def attention_branch(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, AttentionContext]:
        return self.attend(self.layer.layer_norm1(x), bias)

    def mlp_branch(self, x: Tensor) -> Tensor:
        return self.layer.mlp(self.layer.layer_norm2(x))


class Dinov2Layer(HFLayer):
    """DINOv2, with or without registers: LayerScale and DropPath as modules."""

    children_: ClassVar = {"norm1", "attention", "layer_scale1", "drop_path", "norm2", "mlp", "layer_scale2"}

    def attention_branch(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, AttentionContext]:
        delta, context = self.attend(self.layer.norm1(x), bias)
        return self.layer.drop_path(self.layer.layer_scale1(delta)), context

    def mlp_branch(self, x: Tensor) -> Tensor:
        return self.layer.drop_path(self.layer.layer_scale2(self.layer.mlp(self.layer.norm2(x))))


class Scale(nn.Module):
    """LayerScale on a parameter that exists: (..., D) -> (..., D)."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


class InternVLLayer(HFLayer):
    """InternVL's ViT: LayerScale as raw parameters of the layer, qk-norm over all heads together."""

    children_: ClassVar = {"attention", "mlp", "layernorm_before", "layernorm_after", "dropout"}
    parameters_: ClassVar = {"lambda_1", "lambda_2"}

    def __init__(self, layer: nn.Module, config: Any):
        super().__init__(layer, config)
        self.layer = nn.ModuleDict(dict(layer.named_children()))
        scales: Any = layer
        self.scale_1, self.scale_2 = Scale(scales.lambda_1), Scale(scales.lambda_2)

    def attention_branch(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, AttentionContext]:
        delta, context = self.attend(self.layer.layernorm_before(x), bias)
        return self.scale_1(delta), context

    def mlp_branch(self, x: Tensor) -> Tensor:
        return self.scale_2(self.layer.dropout(self.layer.mlp(self.layer.layernorm_after(x))))


def refusal(tower: nn.Module, known: Iterable[str]) -> str:
    """Why a tower is refused whose class is none of the `known`, and what to use instead."""
    name = type(tower).__name__
    words = {word.lower() for key, module in tower.named_modules() for word in (key, type(module).__name__)}
    rotary = any("rotary" in word or "rope" in word for word in words)
    windows = any("window" in word or "swin" in word for word in words)
    windows = windows or getattr(getattr(tower, "config", None), "window_size", None) is not None
    if rotary or windows:
        why = "rotates queries and keys by position" if rotary else "attends within windows"
        why += (
            ", and a merged token has no single position" if rotary else " of neighbouring tokens, which merging breaks"
        )
        instead = "keep this tower whole and merge the tokens that it gives, behind it"
    else:
        why = "is no family that is known here"
        instead = (
            "pass the vision tower itself (such as model.video_tower), or add its blocks as docs/add_a_backbone.md says"
        )
    return (
        f"{name} ({VERSION}) {why}: {instead}; towers that can merge inside: {', '.join(known)}, "
        "and timm's VisionTransformer"
    )
