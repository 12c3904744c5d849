"""CLIP's weights in the layouts that people have them in, under OpenAI's names, which are open_clip's too.

Names and tensors only: no model is built. A new layout is a function and a line in `LAYOUTS`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from tempme_vl.backbones.base import Preprocessing
from tempme_vl.weights.exports import Export, find_export, part_of, read_config
from tempme_vl.weights.files import read_weights

State = Mapping[str, Tensor]

VISUAL = "visual."
# What a CLIP has beside its visual tower, by the beginning of a name.
_TEXT = (
    "transformer.",
    "token_embedding.",
    "positional_embedding",
    "ln_final.",
    "text_projection",
    "logit_scale",
    "logit_bias",
)
# Numbers and masks that files hold beside weights, and that follow from the architecture.
_SIZES = ("input_resolution", "context_length", "vocab_size")
_CONSTANT = re.compile(r"(.*\.)?(attn_mask|position_ids)|" + "|".join(_SIZES))


@dataclass(frozen=True)
class CLIPWeights:
    """What a file holds of a CLIP.

    Attributes:
        source: the file, and what sort it is, in words.
        layout: which one was recognised.
        tower: the visual tower under OpenAI's names, without their prefix "visual.".
        text: everything else of the model: text tower, logit scale; empty for a visual tower alone.
        clip_positions: TempMe's, by layer: (clips before the join, D).
        unused: names of the file that are no part of a CLIP.
        beside: what lies beside CLIP in the file of a model that is made of one, such as a head's weights.
        quick_gelu: which activation the weights were trained with; None where the file does not tell.
        preprocess: how pixels became input; None where the file does not tell.
        heads: attention heads of the visual tower and of the text tower, as far as the file tells; no shape does.
    """

    source: str
    layout: str
    tower: dict[str, Tensor]
    text: dict[str, Tensor]
    clip_positions: dict[str, Tensor] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    quick_gelu: bool | None = None
    preprocess: Preprocessing | None = None
    heads: tuple[int | None, int | None] = (None, None)
    beside: dict[str, Tensor] = field(default_factory=dict)

    def describe(self, with_text: bool = True) -> str:
        """What was recognised and what stays unused, in one line.

        Args:
            with_text: the text side is used too.
        """
        text = {"the text side": len(self.text)} if self.text else {}
        parts = [f"{len(self.tower)} weights of the visual tower"]
        parts += [f"{count} of {side}" for side, count in text.items() if with_text]
        if self.clip_positions:
            parts.append(f"clip positions of the layers {', '.join(sorted(self.clip_positions, key=int))}")
        heads = Counter(name.split(".")[0] for name in self.unused) + Counter({} if with_text else text)
        unused = ", ".join(f"{head} ({count})" for head, count in heads.items()) or "nothing"
        return f"{self.source}: {self.layout}, {', '.join(parts)}; unused: {unused}"


@dataclass(frozen=True)
class _Named:
    """Weights under OpenAI's names, and what a layout tells beside."""

    state: dict[str, Tensor]
    clip_positions: dict[str, Tensor] = field(default_factory=dict)
    foreign: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """One way of naming CLIP's weights.

    Attributes:
        name: whose it is, in words.
        mark: some key of the layout, and of none that comes after it in `LAYOUTS`, matches it from the beginning.
        rename: gives the weights OpenAI's names.
        quick_gelu: which activation all its weights were trained with, where that is certain.
    """

    name: str
    mark: str
    rename: Callable[[State], _Named]
    quick_gelu: bool | None = None


def _plain(state: State) -> _Named:
    return _Named(dict(state))


def _visual_alone(state: State) -> _Named:
    return _Named({f"{VISUAL}{key}": value for key, value in state.items()})


def _below_clip(state: State) -> _Named:
    return _Named(part_of(state, "clip."), foreign=tuple(key for key in state if not key.startswith("clip.")))


_LORA = re.compile(r"(.*\.attn\.)TVPt_LoRA_([ab])")
_POSITION = re.compile(r"visual\.transformer\.resblocks\.(\d+)\.TVPt_Video_Positional_embedding")


def _tempme(state: State) -> _Named:
    """LoRA's B A is added to the fused weight of queries, keys and values, scale 1; the positions are set apart.

    Where nothing is merged across clips, the authors' code leaves the position out; it is zero in their files then.
    """
    below = _below_clip(state)
    factors, positions, named = {}, {}, {}
    for key, value in below.state.items():
        if match := _LORA.fullmatch(key):
            factors[match[1], match[2]] = value
        elif match := _POSITION.fullmatch(key):
            if value.ndim != 4 or value.shape[0] != 1 or value.shape[2] != 1:
                raise ValueError(f"expected {key} of shape (1, clips, 1, width); got {tuple(value.shape)}")
            positions[match[1]] = value[0, :, 0]
        else:
            named[key] = value
    for attention in dict.fromkeys(attention for attention, _ in factors):
        name = f"{attention}in_proj_weight"
        parts = [named.get(name), factors.get((attention, "a")), factors.get((attention, "b"))]
        shapes = [None if part is None else tuple(part.shape) for part in parts]
        weight, a, b = (torch.empty(0, 0) if part is None else part for part in parts)
        if None in shapes or (b.shape[0], a.shape[1]) != weight.shape or b.shape[1] != a.shape[0]:
            raise ValueError(f"expected {name} (3 D, D) with LoRA's factors (r, D) and (3 D, r); got {shapes}")
        named[name] = (weight.double() + b.double() @ a.double()).to(torch.float32)
    return _Named(named, positions, below.foreign)


_HF = (
    (r"(vision|text)_model\.encoder\.layers\.", r"\1_model.transformer.resblocks."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"vision_model\.pre_layrnorm\.", "visual.ln_pre."),  # so spelled there
    (r"vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"vision_model\.", VISUAL),
    (r"text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"text_model\.final_layer_norm\.", "ln_final."),
    (r"text_model\.", ""),
)
_PROJECTIONS = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}


def _transformers(state: State) -> _Named:
    """transformers' CLIPModel: queries, keys and values apart, projections transposed."""
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        if key in _PROJECTIONS:
            named[_PROJECTIONS[key]] = value.T
            continue
        renamed = key
        for theirs, openai in _HF:
            renamed = re.sub(theirs, openai, renamed)
        if match := re.fullmatch(r"(.*)\.self_attn\.q_proj\.(weight|bias)", renamed):
            parts = [state.get(key.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
            named[f"{match[1]}.attn.in_proj_{match[2]}"] = torch.cat([part for part in parts if part is not None])
        elif not re.search(r"\.self_attn\.[kv]_proj\.", renamed):
            named[renamed] = value
    return _Named(named)


TRANSFORMERS = "transformers' CLIP"

# The first whose mark is there is the one; before them, `tempme_vl.weights.exports` finds the package's own folders.
LAYOUTS = (
    Layout("TempMe's checkpoint, LoRA folded in", r"clip\..*TVPt_", _tempme, quick_gelu=True),
    Layout("CLIP4Clip's checkpoint", r"clip\.visual\.", _below_clip, quick_gelu=True),
    Layout(TRANSFORMERS, r"vision_model\.", _transformers),
    Layout("OpenAI's CLIP", "|".join(_SIZES), _plain, quick_gelu=True),
    Layout("CLIP in open_clip's names", r"visual\.conv1\.", _plain),
    Layout("a visual tower in open_clip's names", r"conv1\.weight", _visual_alone),
)


def read_clip(path: str | Path) -> CLIPWeights:
    """The weights of a CLIP ViT from a file or folder in any layout of `LAYOUTS`, or from a folder of the package.

    Raises:
        ValueError: see `read_weights` and `find_export`; or a layout that is not known.
    """
    if export := find_export(path):
        return _of_export(export)
    file = read_weights(path)
    weights = name_clip(file.state, f"{path} ({file.kind})")
    if weights.layout != TRANSFORMERS or (config := read_config(file.path.parent)) is None:
        return weights
    vision, text = (config.get(f"{tower}_config") or {} for tower in ("vision", "text"))
    activation = (vision or config).get("hidden_act", "quick_gelu")
    if activation not in ("quick_gelu", "gelu"):
        raise ValueError(f"a CLIP ViT has the activation quick_gelu or gelu; {path} says {activation!r}")
    heads = (vision or config).get("num_attention_heads"), text.get("num_attention_heads")
    return replace(weights, quick_gelu=activation == "quick_gelu", heads=heads)


def name_clip(state: State, source: str = "the state") -> CLIPWeights:
    """Weights in any layout of `LAYOUTS` under OpenAI's names.

    Args:
        source: where they come from, in words.

    Raises:
        ValueError: a layout that is not known, or one that is damaged.
    """
    layout = next((layout for layout in LAYOUTS if any(re.match(layout.mark, key) for key in state)), None)
    if layout is None:
        names = sorted(state)
        raise ValueError(
            f"{source} holds no CLIP ViT in a layout that is known ({', '.join(entry.name for entry in LAYOUTS)}, a "
            f"folder of this package); its {len(names)} names are like {', '.join(names[:4])}"
        )
    try:
        named = layout.rename(state)
    except (ValueError, RuntimeError, IndexError) as error:  # of torch, where shapes are no matrices
        raise ValueError(f"{source}, {layout.name}, is damaged: {error}") from error
    weights = {key: value for key, value in named.state.items() if not _CONSTANT.fullmatch(key)}
    return CLIPWeights(
        source,
        layout.name,
        part_of(weights, VISUAL),
        {key: value for key, value in weights.items() if key.startswith(_TEXT)},
        named.clip_positions,
        (*named.foreign, *(key for key in weights if not key.startswith((VISUAL, *_TEXT)))),
        layout.quick_gelu,
        beside={key: state[key] for key in named.foreign},
    )


def _of_export(export: Export) -> CLIPWeights:
    export.require_family("open_clip")
    text = {**part_of(export.state, "text."), **part_of(export.state, "logit_scale.")}
    text = text if export.kind == "retrieval" else {}
    if "log_scale" in text:
        text["logit_scale"] = text.pop("log_scale")
    config = export.config["frontend"]
    vision_cfg, text_cfg = config["vision_cfg"], export.config.get("text_cfg", {})
    heads = vision_cfg["width"] // vision_cfg.get("head_width", 64), text_cfg.get("heads")
    kept = () if export.kind in ("frontend", "retrieval") else ("frontend.",)
    return CLIPWeights(
        str(export.folder),
        f"this package's {export.kind} model",
        to_openai_names(export.tower()),
        to_openai_names(text),
        export.clip_positions(),
        tuple(key for key in export.state if kept and not key.startswith(kept)),
        config.get("quick_gelu", False),
        export.frontend_setting("preprocess", Preprocessing),
        heads,
    )


_RENAMED = {
    "attn.in_proj_weight": "attn.qkv.weight",
    "attn.in_proj_bias": "attn.qkv.bias",
    "attn.out_proj.weight": "attn.proj.weight",
    "attn.out_proj.bias": "attn.proj.bias",
}


def to_openai_names(state: State) -> dict[str, Tensor]:
    """A converted tower's parameters (`embed`, `blocks.N[.block]`, `norm`, `head`, ...) under open_clip's names."""
    parts = {"embed.": "", "norm.": "ln_post.", "head.": "", "blocks.": "transformer.resblocks."}
    exported = {}
    for key, value in state.items():
        for part, theirs in parts.items():
            if key.startswith(part):
                key = theirs + key[len(part) :].replace(".block.", ".", 1)
                break
        for theirs, ours in _RENAMED.items():
            if key.endswith(ours):
                key = key[: -len(ours)] + theirs
        exported[key] = value
    return exported
