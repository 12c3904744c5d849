"""Public UMT checkpoints: reading a file, telling its form, and its keys under the names of the fine-tuning forms.

Names and tensors only: no model is built and no tensor copied. The names are those of UMT's released files (Unmasked
Teacher, ICCV 2023): stage 1 holds the vision encoder, pre-training adds BERT with its language head and the
distillation parts, retrieval and question answering are the forms that fine-tuning saves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from tempme_vl.messages import few
from tempme_vl.weights.files import read_weights

Form = Literal["stage1", "pretraining", "retrieval", "qa"]
Target = Literal["retrieval", "qa", "vision"]

# What only this form has beside the vision encoder; the first that fits names the form.
_FORM_MARKS: tuple[tuple[Form, str], ...] = (
    ("qa", "text_decoder.bert."),
    ("pretraining", "text_encoder.bert."),
    ("retrieval", "text_encoder.encoder."),
    ("stage1", ""),
)

_OTHER_FAMILIES = (
    (r"module\.", "a state saved from a parallel wrapper (remove the prefix 'module.' from every key)"),
    (r"(clip\.)?visual\.(conv1|transformer\.resblocks)\.", "an OpenAI CLIP or open_clip model"),
    (r"visual\.(trunk|blocks)\.", "an open_clip model with a timm or EVA tower"),
    (r"(vision_model|text_model)\.", "a Hugging Face CLIP or SigLIP model"),
    (r"(encoder_to_decoder|decoder\.blocks)\.", "a VideoMAE pre-training file"),
    (r"blocks\.0\.attn\.q_bias", "a bare ViT without its 'encoder.' prefix, such as an action classifier or BEiT"),
    (r"(cls_token|patch_embed\.proj\.|blocks\.0\.)", "a timm ViT"),
    (r"vision_encoder\.(blocks|clip_projector)\.", "an InternVideo2 model"),
    (r"visual_encoder\.", "a BLIP or ALBEF model"),
    (r"(vit\.)?embeddings\.patch_embeddings\.", "a Hugging Face ViT"),
    (r"(bert\.)?(embeddings\.word_embeddings|encoder\.layer)\.", "a BERT text model"),
)

# Why a key may have no place in a target. Only the parts named here are explained: an unknown key of a part that the
# target does have stays unexplained.
_REASONS: tuple[tuple[str, str, tuple[Target, ...]], ...] = (
    (r"clip_teacher\.", "distillation teacher", ("retrieval", "qa", "vision")),
    (r"(vision_encoder\.)?clip_decoder\.", "distillation decoder", ("retrieval", "qa", "vision")),
    (r"text_encoder\.cls\.predictions\.", "masked-language-modelling head", ("retrieval", "vision")),
    (r"text_(en|de)coder\.(bert\.)?embeddings\.position_ids$", "position indices, a constant", ("retrieval", "qa")),
    (r"text_decoder\.", "answer decoder", ("retrieval", "vision")),
    (r"text_encoder\.", "text encoder", ("vision",)),
    (r"(temp|vision_proj\.(weight|bias)|text_proj\.(weight|bias))$", "contrastive head", ("qa", "vision")),
    (r"itm_head\.(weight|bias)$", "matching head", ("qa", "vision")),
    (r"(vision_encoder\.)?pool_norm\.(weight|bias)$", "norm of the contrastive head", ("qa",)),
)


@dataclass(frozen=True)
class KeyReport:
    """What became of every key of a file.

    Attributes:
        form, target: what the file was and what it was converted to.
        used: keys of the file that have a place, in the target's order; the answer decoder is filled from keys that
            the text encoder uses too.
        unexpected: keys of the file without a place.
        missing: keys of the target that the file cannot fill; "text_encoder.*" where not even their number is known.
        explained: unexpected key -> why it has no place.
    """

    form: Form
    target: Target
    used: tuple[str, ...]
    unexpected: tuple[str, ...]
    missing: tuple[str, ...]
    explained: Mapping[str, str]

    @property
    def unexplained(self) -> tuple[str, ...]:
        """Unexpected keys without a reason: this code does not know them, and weights of worth may be lost."""
        return tuple(key for key in self.unexpected if key not in self.explained)

    @property
    def trouble(self) -> str:
        """What keeps the file from being a whole model of the target, in one line; empty where nothing does."""
        groups = {"missing": self.missing, "unknown": self.unexplained}
        return "; ".join(f"{len(keys)} {what}: {few(keys)}" for what, keys in groups.items() if keys)

    def __str__(self) -> str:
        lines = [
            f"UMT checkpoint of the {self.form} form, converted to {self.target}: {len(self.used)} keys used, "
            f"{len(self.unexpected)} unexpected ({len(self.unexplained)} unexplained), {len(self.missing)} missing"
        ]
        groups = [
            (f"unexpected, {reason}", [key for key in self.unexpected if self.explained.get(key) == reason])
            for reason in dict.fromkeys(self.explained.values())
        ]
        for title, keys in [*groups, ("unexpected, unexplained", self.unexplained), ("missing", self.missing)]:
            if keys:
                lines += [f"{title} ({len(keys)}):", *(f"  {line}" for line in _folded(keys))]
        return "\n".join(lines)


@dataclass(frozen=True)
class Converted:
    """Weights under the target's names, the very tensors of the file, and what became of its keys."""

    state: dict[str, Tensor]
    report: KeyReport


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a file on the CPU; see `tempme_vl.weights.files.read_weights`, with its errors."""
    return read_weights(path).state


def detect_form(state: Mapping[str, Any]) -> Form:
    """Which of UMT's forms a state dict has, by its keys; only the vision encoder, with or without prefix, is stage 1.

    Raises:
        ValueError: another family; the message names it where it is known.
    """

    def has(prefix: str) -> bool:
        return any(key.startswith(prefix) for key in state)

    # VideoMAE's pre-training files have the same bare encoder, with a decoder beside it.
    if has("vision_encoder.encoder.blocks.") or (has("encoder.blocks.") and not has("decoder.")):
        return next(form for form, mark in _FORM_MARKS if has(mark))
    for pattern, family in _OTHER_FAMILIES:
        if any(re.match(pattern, key) for key in state):
            found = f"these keys look like {family}"
            break
    else:
        found = "these keys belong to no family known here"
    raise ValueError(
        "expected a UMT checkpoint, with keys such as vision_encoder.encoder.blocks.0.attn.qkv.weight (or "
        f"encoder.blocks.0.... in stage 1); {found}: {few(list(state))}"
    )


def convert(state: Mapping[str, Tensor], target: Target, fusion_layer: int | None = None) -> Converted:
    """A state dict under the names of a fine-tuning form; whatever it cannot fill or place stands in the report.

    The answer decoder of "qa" starts from the text encoder's layers from the fusion layer on, its embeddings and its
    language head, as in UMT; the tied output projection comes from the word embeddings if the file leaves it out.

    Args:
        state: any of the four forms, as from `read_checkpoint`.
        target: "retrieval" or "qa", or "vision" for the vision encoder alone without prefix (encoder.*, pool_norm.*).
        fusion_layer: the first text layer with cross-attention, counted from 0; read from the keys by default.

    Raises:
        ValueError: another family, an unknown target, or a fusion layer that is unknown or not that of the keys.
    """
    if target not in get_args(Target):
        raise ValueError(f"expected one of the targets {', '.join(get_args(Target))}; got {target!r}")
    form = detect_form(state)
    # Position indices are counted anew by every BERT of today, and no target asks for them.
    expected = _vision_keys(state, pool_norm=target != "qa")
    shift = None
    if target != "vision":
        depth = _count(state, r"text_encoder\.(?:bert\.)?encoder\.layer")
        fusion = _fusion_layer(state, depth, fusion_layer)
        expected += _bert_keys("text_encoder.", depth, fusion)
        if target == "retrieval":
            expected += ["temp", *_pairs("", "vision_proj", "text_proj", "itm_head")]
        else:
            answer_depth = depth - fusion
            if form == "qa":
                answer_depth = _count(state, r"text_decoder\.bert\.encoder\.layer")
            else:
                shift = fusion
            expected += [*_bert_keys("text_decoder.bert.", answer_depth, 0), *_language_head_keys("text_decoder.")]
    source = {key: next((name for name in _source_names(key, shift) if name in state), None) for key in expected}
    found = {key: name for key, name in source.items() if name is not None}
    used = dict.fromkeys(found.values())
    unexpected = tuple(key for key in state if key not in used)
    explained = {key: reason for key in unexpected if (reason := _reason(key, target))}
    prefix = "vision_encoder." if target == "vision" else ""
    return Converted(
        {key.removeprefix(prefix): state[name] for key, name in found.items()},
        KeyReport(
            form=form,
            target=target,
            used=tuple(used),
            unexpected=unexpected,
            missing=tuple(key.removeprefix(prefix) for key in expected if key not in found),
            explained=explained,
        ),
    )


def _source_names(key: str, shift: int | None) -> list[str]:
    """Names under which a file may hold the tensor of a target's key, its own name first.

    `shift` is the text encoder's layer that the answer decoder's first one starts from, None for a file with an answer
    decoder of its own: its gaps are not filled from the encoder.
    """
    names = [key]
    if key.startswith("vision_encoder."):
        names.append(key.removeprefix("vision_encoder."))
    elif key.startswith("text_encoder."):
        names.append(key.replace("text_encoder.", "text_encoder.bert.", 1))
    elif key.startswith("text_decoder."):
        if shift is not None:
            moved = re.sub(r"(?<=\.layer\.)\d+", lambda match: str(int(match[0]) + shift), key)
            names += _source_names(re.sub(r"^text_decoder\.(bert\.)?", "text_encoder.", moved), shift)
        tied = {"weight": "bert.embeddings.word_embeddings.weight", "bias": "cls.predictions.bias"}
        if match := re.fullmatch(r"text_decoder\.cls\.predictions\.decoder\.(weight|bias)", key):
            names += _source_names(f"text_decoder.{tied[match[1]]}", shift)
    return names


def _fusion_layer(state: Mapping[str, Any], depth: int, given: int | None) -> int:
    """The first text layer with cross-attention; a file without text layers has none to fuse in."""
    if depth == 0:
        return 0
    pattern = re.compile(r"text_encoder\.(?:bert\.)?encoder\.layer\.(\d+)\.crossattention\.")
    found = min((int(m[1]) for key in state if (m := pattern.match(key))), default=None)
    if found is None and given is None:
        raise ValueError(f"none of the {depth} text layers has cross-attention: give the fusion_layer to start it at")
    if found is not None and given not in (None, found):
        raise ValueError(
            f"expected fusion_layer={found}, where the cross-attention of these {depth} text layers starts (or None to "
            f"read it from the keys); got {given}"
        )
    fusion = found if given is None else given
    assert fusion is not None
    if not 0 <= fusion < depth:
        raise ValueError(f"expected a fusion_layer between 0 and {depth - 1} for {depth} text layers; got {fusion}")
    return fusion


def _count(state: Mapping[str, Any], stem: str) -> int:
    """Numbered modules under a stem: the highest number + 1, so that a gap shows as missing keys."""
    return max((int(m[1]) + 1 for key in state if (m := re.match(rf"{stem}\.(\d+)\.", key))), default=0)


def _pairs(prefix: str, *modules: str) -> list[str]:
    return [f"{prefix}{module}.{part}" for module in modules for part in ("weight", "bias")]


def _vision_keys(state: Mapping[str, Any], pool_norm: bool) -> list[str]:
    encoder = "vision_encoder.encoder."
    keys = _pairs(encoder, "patch_embed.proj")
    for i in range(_count(state, r"(?:vision_encoder\.)?encoder\.blocks")):
        block = f"{encoder}blocks.{i}."
        # UMT's attention has no bias of the keys.
        keys += [f"{block}attn.q_bias", f"{block}attn.v_bias", f"{block}attn.qkv.weight"]
        keys += _pairs(block, "norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    return keys + _pairs(encoder, "norm") + (_pairs("vision_encoder.", "pool_norm") if pool_norm else [])


def _bert_keys(prefix: str, depth: int, fusion: int) -> list[str]:
    """Of `depth` layers, those from `fusion` on have cross-attention."""
    if depth == 0:
        return [f"{prefix}*"]
    embeddings = f"{prefix}embeddings."
    keys = [f"{embeddings}{name}_embeddings.weight" for name in ("word", "position", "token_type")]
    keys += _pairs(embeddings, "LayerNorm")
    for i in range(depth):
        layer = f"{prefix}encoder.layer.{i}."
        for attention in ("attention.", "crossattention.")[: 1 if i < fusion else 2]:
            keys += _pairs(layer + attention, "self.query", "self.key", "self.value")
            keys += _pairs(layer + attention, "output.dense", "output.LayerNorm")
        keys += _pairs(layer, "intermediate.dense", "output.dense", "output.LayerNorm")
    return keys


def _language_head_keys(prefix: str) -> list[str]:
    head = f"{prefix}cls.predictions."
    return [f"{head}bias", *_pairs(head, "transform.dense", "transform.LayerNorm", "decoder")]


def _reason(key: str, target: Target) -> str | None:
    return next((reason for pattern, reason, targets in _REASONS if target in targets and re.match(pattern, key)), None)


def _folded(keys: Sequence[str]) -> list[str]:
    """Keys as lines, those that differ only in their first number as one: blocks.{0-11}.norm1.weight."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for key in keys:
        match = re.fullmatch(r"(.*?\.)(\d+)(\..*)", key)
        head, tail = (match[1], match[3]) if match else (key, "")
        numbers.setdefault((head, tail), []).extend([int(match[2])] if match else [])
    return [f"{head}{_braced(found)}{tail}" for (head, tail), found in numbers.items()]


def _braced(numbers: Sequence[int]) -> str:
    if len(numbers) < 2:
        return "".join(map(str, numbers))
    runs = len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1))
    return "{" + (f"{numbers[0]}-{numbers[-1]}" if runs else ",".join(map(str, numbers))) + "}"
