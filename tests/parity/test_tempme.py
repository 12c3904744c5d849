"""TempMe equals the original implementation on seeded weights: every match, size, token, embedding and gradient."""

from __future__ import annotations

import pytest
import torch
from parity.cases import Case, assert_close, find
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from tempme_vl import MergeSchedule, VisualFrontend
from tempme_vl.merging.tempme import CrossClipMerge
from tempme_vl.state import TokenState
from tempme_vl.tasks.losses import contrastive_loss
from tempme_vl.tasks.retrieval import RetrievalModel

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
CASES = [case for case in find("tempme") if "merge_layers" in case.config]
STRUCTURES = [case for case in find("tempme") if "per_layer_after_block" in case.config]


def schedule_of(case: Case) -> MergeSchedule:
    c = case.config
    return MergeSchedule.tempme(
        layers=c["layers"],
        frames=c["frames"],
        tokens=(c["image"] // c["patch"]) ** 2 + 1,
        r=c["r"],
        merge_layers=tuple(c["merge_layers"]),
        merge_frames=tuple(c["merge_frames"]),
        cross_percent=round(100 * c["merge_prop_cross"]),
        intra_percent=round(100 * c["merge_prop_intra"]),
    )


def skipped_layers(case: Case) -> list[int]:
    """Merge layers where the original merges nothing across clips, and then forgets the clip position too."""
    trace = case.config["trace"]
    return [layer for layer in case.config["merge_layers"] if trace[layer]["cross"] is None]


def add_lora(tower: nn.Module, weights: dict[str, Tensor], case: Case) -> None:
    """peft's LoRA on every qkv of a tower, with the case's weights."""
    rank = case.config["lora_rank"]
    config = LoraConfig(r=rank, lora_alpha=rank * case.config["lora_scale"], target_modules=["qkv"])
    inject_adapter_in_model(config, tower)
    for layer, block in enumerate(tower.blocks):
        qkv = getattr(block, "block", block).attn.qkv
        qkv.lora_A["default"].weight.data.copy_(weights[f"{layer}.a"])
        qkv.lora_B["default"].weight.data.copy_(weights[f"{layer}.b"])


def frontend_of(case: Case, dtype: torch.dtype) -> VisualFrontend:
    c = case.config
    quick_gelu = c["act"].startswith("quick")
    frontend = VisualFrontend.from_openai_state_dict(
        case.group("w."), heads=c["heads"], schedule=schedule_of(case), quick_gelu=quick_gelu
    ).to(dtype)
    for layer, position in frontend.clip_positions.items():
        if int(layer) not in skipped_layers(case):
            position.data.copy_(case.tensors[f"clip_pos.{layer}"])
    add_lora(frontend, case.group("lora.visual."), case)
    return frontend.to(dtype).requires_grad_()


def named_gradients(frontend: VisualFrontend, prefix: str) -> dict[str, Tensor]:
    """Gradients of a front end under the names that the reference files use."""
    gradients = {}
    for name, parameter in frontend.named_parameters():
        if parameter.grad is None:
            continue
        name = name.replace(".base_layer", "")
        if "lora_" in name:
            layer, letter = name.split(".")[1], "a" if "lora_A" in name else "b"
            gradients[f"{prefix}lora.visual.{layer}.{letter}"] = parameter.grad
        elif "clip_position" in name:
            gradients[f"{prefix}clip_pos.{name.split('.')[1]}"] = parameter.grad
        else:
            gradients[name] = parameter.grad
    embed = frontend.embed
    gradients[f"{prefix}visual.class_embedding"] = embed.class_embedding.grad
    gradients[f"{prefix}visual.positional_embedding"] = embed.positional_embedding.grad
    gradients[f"{prefix}visual.conv1.weight"] = embed.conv1.weight.grad
    return gradients


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients(case: Case, dtype: torch.dtype) -> None:
    frontend, t = frontend_of(case, dtype), case.tensors
    output = frontend(t["in.video"].to(dtype), t["in.frame_mask"])

    assert_close(output.tokens, t["out.tokens"], "tokens", TOLERANCE[dtype])
    assert_close(output.frames, t["out.cls"], "projected CLS tokens", TOLERANCE[dtype])
    unit = torch.nn.functional.normalize(output.frames, dim=-1)
    assert_close(unit, t["out.frame_emb"], "frame embeddings", TOLERANCE[dtype])
    assert_close(output.pooled, t["out.video_emb"], "video embeddings", TOLERANCE[dtype])

    loss = (output.pooled * t["in.cotangent"].to(dtype)).sum()
    assert loss.item() == pytest.approx(case.config["loss"], rel=TOLERANCE[dtype])
    loss.backward()
    gradients = named_gradients(frontend, "grad.")
    expected = {f"grad.{name}": value for name, value in case.group("grad.").items()}
    assert len(expected) >= 4
    for name, value in expected.items():
        assert_close(gradients[name], value, name, TOLERANCE[dtype])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_match_and_size(case: Case) -> None:
    """Hooks on the merging steps see each state with its source, from which the step's assignment follows."""
    frontend, t = frontend_of(case, torch.float64), case.tensors
    seen: dict[str, Tensor] = {}

    def watch(name: str):
        def hook(module: nn.Module, inputs: tuple[TokenState, Tensor], output: TokenState) -> None:
            state = inputs[0]
            if isinstance(module, CrossClipMerge):
                state = state.join_clips(module.join)
            assignment = torch.full(state.x.shape[:2], -1)
            assignment.scatter_(1, state.source, output.source)
            seen[name] = assignment

        return hook

    for layer, block in enumerate(frontend.blocks):
        block.before_attention.register_forward_hook(watch(f"cross.{layer}"))
        block.after_attention.register_forward_hook(watch(f"intra.{layer}"))
        block.register_forward_hook(lambda _, __, out, layer=layer: seen.update({f"size.{layer}": out.size}))
    frontend(t["in.video"].double(), t["in.frame_mask"], trace_source=True)

    sizes = case.group("out.size.")
    assert sizes
    for layer, size in sizes.items():
        assert torch.equal(seen[f"size.{layer}"].squeeze(-1).long(), size.long()), f"sizes after layer {layer}"
    for name, assignment in case.group("out.assign_").items():
        assert torch.equal(seen[name], assignment.long()), f"assignment {name}"


@pytest.mark.parametrize("case", [case for case in CASES if "text" in case.config], ids=str)
def test_text_and_contrastive_loss(case: Case) -> None:
    c, t = case.config, case.tensors
    frontend = frontend_of(case, torch.float64)
    model = RetrievalModel.from_openai_state_dict(
        case.group("w."), c["heads"], schedule_of(case), c["text"]["heads"], c["act"].startswith("quick")
    ).double()
    model.frontend = frontend
    model.logit_scale.log_scale.data.copy_(t["w.logit_scale"])
    add_lora(model.text, case.group("lora.text."), case)
    model.double().requires_grad_()

    raw = model.text(t["in.text_ids"], t["in.text_mask"])
    assert_close(raw, t["out.text_feat_raw"], "text features", TOLERANCE[torch.float64])
    batch = {
        "video": t["in.video"].double(),
        "frame_mask": t["in.frame_mask"],
        "text_ids": t["in.text_ids"],
        "text_mask": t["in.text_mask"],
    }
    features = model(batch)
    logits = features["scale"] * features["text"] @ features["video"].T
    assert_close(logits, t["out.logits_text_by_video"], "logits", TOLERANCE[torch.float64])
    loss = contrastive_loss(features["video"], features["text"], features["scale"])
    assert loss.item() == pytest.approx(c["contrastive_loss"], rel=1e-9)

    loss.backward()
    gradients = named_gradients(frontend, "grad_contrastive.")
    for layer, block in enumerate(model.text.blocks):
        for letter, part in (("a", block.attn.qkv.lora_A), ("b", block.attn.qkv.lora_B)):
            gradients[f"grad_contrastive.lora.text.{layer}.{letter}"] = part["default"].weight.grad
    expected = {f"grad_contrastive.{name}": value for name, value in case.group("grad_contrastive.").items()}
    assert expected
    for name, value in expected.items():
        assert_close(gradients[name], value, name, TOLERANCE[torch.float64])


@pytest.mark.parametrize("case", [case for case in CASES if skipped_layers(case)], ids=str)
def test_without_reduction_the_clip_position_is_still_added(case: Case) -> None:
    """The original skips it where nothing merges across clips; that and nothing else is the difference."""
    video = case.tensors["in.video"].double()
    plain = frontend_of(case, torch.float64)  # as the original: no positions in the skipped layers
    placed = frontend_of(case, torch.float64)
    for layer in skipped_layers(case):
        placed.clip_positions[str(layer)].data.copy_(case.tensors[f"clip_pos.{layer}"])

        def add(_: nn.Module, inputs: tuple[TokenState, Tensor], layer: int = layer):
            state, metric = inputs
            position = case.tensors[f"clip_pos.{layer}"].double()
            x = state.x.unflatten(0, (-1, len(position))) + position.unsqueeze(1)
            return TokenState(x.flatten(0, 1), state.size, state.num_clips, state.num_prefix), metric

        plain.blocks[layer].before_attention.register_forward_pre_hook(add)
    expected, actual = plain(video), placed(video)
    assert (actual.tokens - expected.tokens).abs().max() <= 1e-12
    assert (actual.tokens - case.tensors["out.tokens"]).abs().max() > 1e-3


@pytest.mark.parametrize("case", STRUCTURES, ids=str)
def test_token_counts_of_real_sizes(case: Case) -> None:
    c = case.config
    cross, intra = (int(part) for part in c["prop"].split("-"))
    patch = int(c["model"].split("/")[1])
    schedule = MergeSchedule.tempme(
        frames=c["frames"], tokens=(224 // patch) ** 2 + 1, r=c["r"], cross_percent=cross, intra_percent=intra
    )
    expected = [(layer["clips"], layer["tokens"]) for layer in c["per_layer_after_block"]]
    assert schedule.token_counts == expected
    assert [count.prefix for count in schedule.layer_counts] == [layer["cls"] for layer in c["per_layer_after_block"]]
