"""timm's vision transformers as front ends, bare and inside open_clip and transformers: parity, merging, refusals."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
from open_clip.timm_model import TimmModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from towers import random_video

from tempme_vl import FrontendOutput, MergeSchedule, VisualFrontend, create_frontend
from tempme_vl.backbones import hf
from tempme_vl.backbones.base import Preprocessing
from tempme_vl.backbones.timm import backbone_of
from tempme_vl.configs import FrontendConfig

F, LAYERS, D = 6, 4, 32
NAME = "vit_tiny_patch16_224"
SIZE: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": D, "depth": LAYERS, "num_heads": 4}
FIELDS = ("tokens", "pooled", "size", "frames", "source")
NO_CLASS = {"class_token": False, "global_pool": "avg"}

# name: options of timm.create_model, tokens that never merge, pooling
TOWERS: dict[str, tuple[dict[str, Any], int, str]] = {
    "cls": ({}, 1, "cls"),
    "no head": ({"num_classes": 0}, 1, "cls"),
    "no pool": ({"num_classes": 0, "global_pool": ""}, 1, "cls"),
    "no class token": (NO_CLASS, 0, "mean"),
    "registers and cls": ({"reg_tokens": 3}, 4, "cls"),
    "registers only": ({**NO_CLASS, "reg_tokens": 4}, 4, "mean"),
    "positions for patches only": ({"reg_tokens": 3, "no_embed_class": True}, 4, "cls"),
    "no positions": ({"pos_embed": "none"}, 1, "cls"),
    "norm after pooling": ({"global_pool": "avg", "fc_norm": True}, 1, "mean"),
    "norm before pooling": ({"global_pool": "avg", "fc_norm": False}, 1, "mean"),
    "as in CLIP": ({"pre_norm": True, "act_layer": "quick_gelu"}, 1, "cls"),
    "qk-norm and LayerScale": ({"qk_norm": True, "scale_attn_norm": True, "init_values": 0.3}, 1, "cls"),
    "any size": ({"dynamic_img_size": True}, 1, "cls"),
    "attention pooling": ({"class_token": False, "global_pool": "map"}, 0, "attention"),
    "attention pooling beside cls": ({"global_pool": "map"}, 1, "attention"),
}
FEW = ["registers and cls", "registers only", "qk-norm and LayerScale", "attention pooling beside cls"]
every_tower = pytest.mark.parametrize("name", TOWERS)
few_towers = pytest.mark.parametrize("name", FEW)


def shaken(model: Any) -> Any:
    """The model in evaluation mode, none of its parameters zero or one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def host(name: str, **changes: Any) -> Any:
    return shaken(timm.create_model(NAME, **{**SIZE, "num_classes": 7, **TOWERS[name][0], **changes}))


def front(tower: nn.Module, method: str = "none", layer: int = -1) -> VisualFrontend:
    """A front end in evaluation mode over a host's modules."""
    backbone, config = backbone_of(tower, layer)
    shape = {"layers": len(backbone.blocks), "frames": F, "tokens": backbone.shape.tokens}
    shape["prefix"] = backbone.shape.num_prefix
    plan = MergeSchedule.identity(**shape)
    if method == "tome":
        plan = MergeSchedule.tome(**shape, r=2)
    elif method == "tempme":
        plan = MergeSchedule.tempme(
            **shape, r=2, merge_layers=(1, 2), merge_frames=(2, 3), cross_percent=30, intra_percent=20
        )
    frontend = VisualFrontend(backbone, plan, config)
    torch.manual_seed(1)
    frontend.init_clip_positions(0.1)
    return frontend.eval()


def assert_equal(actual: FrontendOutput, expected: FrontendOutput) -> None:
    for field in FIELDS:
        a, b = getattr(actual, field), getattr(expected, field)
        assert (a is None and b is None) or torch.equal(a, b), field


# ---- equal to the host


@pytest.mark.parametrize(("name", "layer"), [*((name, -1) for name in TOWERS), *((name, -2) for name in FEW)])
def test_tokens_are_the_hosts(name: str, layer: int) -> None:
    tower, video = host(name), random_video(F)
    with torch.no_grad():
        frontend = front(tower, layer=layer)
        tokens, states = frontend(video).tokens, []
        hook = tower.blocks[layer].register_forward_hook(lambda _, __, x: states.append(x))
        normed = tower.forward_features(video.flatten(0, 1))
        hook.remove()
    assert (frontend.shape.num_prefix, frontend.shape.tokens) == (TOWERS[name][1], normed.shape[1])
    torch.testing.assert_close(tokens.reshape(normed.shape), states[0], rtol=0, atol=1e-6)
    if layer == -1:
        assert frontend.shape.pooling == TOWERS[name][2]
        torch.testing.assert_close(frontend.norm(tokens).reshape(normed.shape), normed, rtol=0, atol=1e-6)
    else:
        assert not [*frontend.norm.parameters(), *frontend.head.parameters()] and frontend.shape.embed_dim == D


@every_tower
def test_frames_are_what_the_host_returns(name: str) -> None:
    tower, video = host(name), random_video(F)
    with torch.no_grad():
        expected, frontend = tower(video.flatten(0, 1)), front(tower)
        output = frontend(video)
    if name == "no pool":  # then it returns all tokens; the front end takes the CLS token
        expected = expected[:, 0]
    torch.testing.assert_close(output.frames.flatten(0, 1), expected, rtol=0, atol=1e-6)
    assert (
        frontend.shape.embed_dim
        == expected.shape[-1]
        == (D if name.startswith("no ") and "class" not in name and "positions" not in name else 7)
    )


@pytest.mark.parametrize("fused", [True, False])
def test_hosts_without_fused_attention_are_equalled_too(fused: bool) -> None:
    tower, video = host("cls").double(), random_video(F, dtype=torch.float64)
    for block in tower.blocks:
        block.attn.fused_attn = fused
    with torch.no_grad():
        expected = tower(video.flatten(0, 1))
        torch.testing.assert_close(front(tower)(video).frames.flatten(0, 1), expected, rtol=0, atol=1e-12)


MAP = {"class_token": False, "global_pool": "map"}


@pytest.mark.parametrize(
    ("trunk", "head", "width"),
    [
        ({**MAP, "num_classes": 0}, [], D),  # SigLIP's form
        ({**MAP, "num_classes": 24}, [], 24),
        ({**NO_CLASS, "num_classes": 0}, [nn.Dropout(0.1), nn.Linear(D, 24, bias=False)], 24),
        ({"num_classes": 0}, [nn.Linear(D, 48), nn.GELU(), nn.Linear(48, 24)], 24),
    ],
)
def test_towers_inside_open_clip(trunk: dict, head: list[nn.Module], width: int, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = TimmModel(NAME, embed_dim=24, pool="avg", proj="linear")
    model.trunk, model.head = timm.create_model(NAME, **{**SIZE, **trunk}), nn.Sequential(*head)
    shaken(model)
    video = random_video(F)
    with torch.no_grad():
        expected, frontend = model(video.flatten(0, 1)), front(model)
        actual = frontend(video).frames.flatten(0, 1)
    assert frontend.shape.embed_dim == width
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    if head:
        with pytest.raises(ValueError, match=r"to save a front end, give VisualFrontend the `config`"):
            frontend.save_pretrained(tmp_path)
    else:
        frontend.save_pretrained(tmp_path)
        assert_equal(VisualFrontend.from_pretrained(tmp_path).eval()(video), frontend(video))


def test_an_open_clip_siglip_by_its_name() -> None:
    """open_clip's own small SigLIP configuration, its tower as it builds it."""
    config = open_clip.get_model_config("ViT-B-16-SigLIP")["vision_cfg"]
    assert config["timm_model_name"] == "vit_base_patch16_siglip_224" and config["timm_pool"] == "map"
    with torch.device("meta"):
        model = TimmModel(config["timm_model_name"], 768, 224, pool="map", proj=config["timm_proj"])
    backbone, data = backbone_of(model)
    assert (len(backbone.blocks), backbone.shape.tokens, backbone.shape.pooling) == (12, 196, "attention")
    assert data.name == "vit_base_patch16_siglip_224" and data.preprocess.mean == (0.5,) * 3


def test_towers_inside_transformers() -> None:
    config = transformers.TimmWrapperConfig(architecture=NAME, model_args={**SIZE, "global_pool": ""})
    tower, video = shaken(transformers.TimmWrapperModel(config)), random_video(F)
    backbone, data = hf.backbone_of(tower, layer=-1)
    frontend = VisualFrontend(backbone, MergeSchedule.identity(LAYERS, F, 17), data).eval()
    with torch.no_grad():
        expected = tower(video.flatten(0, 1)).last_hidden_state
        actual = frontend.norm(frontend(video).tokens).reshape(expected.shape)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    assert data.family == "timm" and data.options["depth"] == LAYERS
    with pytest.raises(ValueError, match=r"image size is fixed when it is built; leave image_size out"):
        hf.backbone_of(tower, image_size=48)


def test_numbers_of_a_tower() -> None:
    shape = backbone_of(host("as in CLIP", mlp_ratio=2.0))[0].shape
    assert (shape.image_size, shape.patch_size, shape.width, shape.heads, shape.embed_dim) == (32, 8, D, 4, 7)
    assert (shape.mlp_ratio, shape.quick_gelu, shape.norm_pre, shape.tokens) == (2.0, True, True, 17)
    shape = backbone_of(host("registers and cls"))[0].shape
    assert (shape.mlp_ratio, shape.quick_gelu, shape.norm_pre, shape.tokens) == (4.0, False, False, 20)


def test_attention_pooling_costs_what_torch_counts() -> None:
    tower = timm.create_model("vit_base_patch16_siglip_224", num_classes=0, depth=1).to("meta")
    with torch.device("meta"):
        backbone, _ = backbone_of(tower)
        frontend = VisualFrontend(backbone, MergeSchedule.identity(1, F, 196, 0))
        with FlopCounterMode(display=False) as counter:
            frontend.head(torch.empty(F, 196, 768), None)
    by_attention = frontend.gflops()
    frontend.shape = replace(frontend.shape, pool="mean")
    counted = counter.get_total_flops() / 2e9
    assert by_attention - frontend.gflops() == pytest.approx(counted, rel=0.01)


# ---- the host stays a host


@few_towers
def test_the_host_works_on(name: str) -> None:
    tower, video = host(name), random_video(F)
    with torch.no_grad():
        before = tower(video.flatten(0, 1))
        front(tower, "tempme")(video)
        assert torch.equal(tower(video.flatten(0, 1)), before)


@every_tower
def test_modules_are_shared(name: str) -> None:
    tower = host(name)
    frontend = front(tower, "tempme")
    ours = {id(p) for key, p in frontend.named_parameters() if ".clip_position." not in key}
    assert ours == {id(p) for p in tower.parameters()}
    names = [key for key, _ in frontend.named_parameters(remove_duplicate=False)]
    assert len(names) == len(list(frontend.parameters())), "each is registered once"


@pytest.mark.parametrize("name", ["registers and cls", "attention pooling beside cls"])
def test_lora_on_the_host_is_seen(name: str) -> None:
    tower, video = host(name), random_video(F)
    frontend = front(tower)
    expected = frontend(video).frames
    model = get_peft_model(tower, LoraConfig(r=2, target_modules=["attn.qkv", "fc1"]))
    # LoRA starts at zero; torch 2.8 rounds the attention pooling of two equal calls apart
    torch.testing.assert_close(frontend(video).frames, expected, rtol=0, atol=1e-6)
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.1)
    actual = frontend(video).frames
    assert not torch.allclose(actual, expected, atol=1e-3)
    torch.testing.assert_close(actual.flatten(0, 1), tower(video.flatten(0, 1)), rtol=0, atol=1e-5)
    actual[..., 0].sum().backward()
    assert len(trained) >= 4 * LAYERS and all(p.grad.any() for p in trained)


@few_towers
def test_parameters_are_read_only_where_their_module_is_called(name: str) -> None:
    """As under ZeRO-3, which gathers a module's own parameters when it is called and drops them behind it."""
    frontend, video = front(host(name), "tempme"), random_video(F)
    with torch.no_grad():
        expected = frontend(video)
    full = {p: p.data for p in frontend.parameters()}

    def gather(module: nn.Module, _: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = full[parameter]

    def drop(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0)

    for module in frontend.modules():
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(drop)
        drop(module)
    with torch.no_grad():
        assert_equal(frontend(video), expected)


# ---- merging


@few_towers
@pytest.mark.parametrize("method", ["tome", "tempme"])
def test_predicted_counts_hold(name: str, method: str) -> None:
    frontend, seen = front(host(name), method), []
    for block in frontend.blocks:
        block.register_forward_hook(lambda _, __, state: seen.append((state.num_clips, state.x.shape[1])))
    output, plan = frontend(random_video(F), trace_source=True), frontend.schedule
    assert seen == plan.token_counts and output.tokens.shape == (2, plan.output_tokens, D)
    assert (output.size.sum(1) == F * frontend.shape.tokens).all() and output.size.max() > 1
    assert torch.equal(output.source[0].bincount(minlength=plan.output_tokens), output.size[0].flatten().long())
    clips, prefix = plan.layer_counts[-1].clips, plan.layer_counts[-1].prefix
    assert (output.size.unflatten(1, (clips, -1))[:, :, :prefix] == 1).all(), "CLS tokens and registers stay"
    whole_clips = frontend.shape.pooling != "cls" and method == "tempme"
    assert output.frames.shape == (2, 1 if whole_clips else F, frontend.shape.embed_dim)


@few_towers
def test_videos_of_a_batch_do_not_meet(name: str) -> None:
    frontend, video = front(host(name), "tempme").double(), random_video(F, dtype=torch.float64)
    both, second = frontend(video), frontend(video[1:])
    torch.testing.assert_close(both.tokens[1:], second.tokens, rtol=0, atol=1e-10)
    torch.testing.assert_close(both.pooled[1:], second.pooled, rtol=0, atol=1e-10)


@few_towers
def test_a_token_of_size_two_is_seen_as_two(name: str) -> None:
    frontend, x = front(host(name)), torch.randn(1, 3, D, generator=torch.Generator().manual_seed(0))
    block, size = frontend.blocks[1].block, torch.tensor([1.0, 1.0, 2.0]).view(1, 3, 1)
    doubled = torch.cat([x, x[:, 2:]], dim=1)
    twice, _ = block.attention_branch(doubled, None)
    sized, context = block.attention_branch(x, size.log().view(1, 1, 1, 3))
    torch.testing.assert_close(sized, twice[:, :3], rtol=0, atol=1e-5)
    assert not torch.allclose(sized, block.attention_branch(x, None)[0], atol=1e-4)
    assert context.keys.shape == (1, 4, 3, D // 4)
    if frontend.shape.pooling == "attention":
        torch.testing.assert_close(frontend.head(x, size), frontend.head(doubled, None), rtol=0, atol=1e-5)
        assert not torch.allclose(frontend.head(x, size), frontend.head(x, None), atol=1e-4)


def test_keys_come_after_their_norm() -> None:
    tower, x = host("qk-norm and LayerScale"), torch.randn(2, 5, D)
    block = tower.blocks[0]
    _, context = front(tower).blocks[0].block.attention_branch(x, None)
    plain = block.attn.qkv(block.norm1(x))[..., D : 2 * D].unflatten(-1, (4, -1)).transpose(1, 2)
    torch.testing.assert_close(context.keys, block.attn.k_norm(plain), rtol=0, atol=1e-6)


# ---- training


@few_towers
def test_checkpointing_is_exact(name: str) -> None:
    rates = {"drop_path_rate": 0.3, "attn_drop_rate": 0.1, "proj_drop_rate": 0.1}
    plain, video = front(host(name, **rates), "tempme").train(), random_video(F)
    checkpointed = deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    outputs, grads = [], []
    for frontend in (plain, checkpointed):
        torch.manual_seed(3)
        outputs.append(frontend(video, trace_source=True))
        (outputs[-1].pooled.square().sum() + outputs[-1].tokens.mean()).backward()
        grads.append({key: p.grad for key, p in frontend.named_parameters()})
    assert_equal(outputs[1], outputs[0])
    assert all(torch.equal(grads[1][key], gradient) for key, gradient in grads[0].items())
    torch.manual_seed(4)
    assert not torch.equal(plain(video).tokens, outputs[0].tokens), "the host's dropout"


@few_towers
def test_bfloat16(name: str) -> None:
    frontend, video = front(host(name), "tempme"), random_video(F)
    with torch.no_grad():
        expected = frontend(video).pooled
    with torch.autocast("cpu", torch.bfloat16):
        output = frontend(video)
    assert output.size.dtype == output.pooled.dtype == torch.float32
    assert (torch.cosine_similarity(output.pooled, expected, dim=-1) > 0.95).all()
    output.pooled.sum().backward()
    half = frontend.bfloat16()(video.bfloat16())
    assert half.tokens.dtype == torch.bfloat16 and half.pooled.isfinite().all()


def test_compiles_into_one_graph() -> None:
    torch.compiler.reset()
    frontend, video = front(host("attention pooling beside cls", reg_tokens=3, depth=2), "tome"), random_video(F)
    compiled = torch.compile(frontend, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(video).tokens, frontend(video).tokens, rtol=0, atol=1e-5)


# ---- names, folders, weights


@pytest.mark.parametrize(
    ("name", "layer"), [*((name, -1) for name in (*FEW, "as in CLIP", "norm before pooling")), ("registers only", -2)]
)
def test_saved_front_end_comes_back(name: str, layer: int, tmp_path: Path) -> None:
    if name == "as in CLIP":  # timm keeps a name of the activation, which JSON can hold
        assert front(host(name)).config.options["act_layer"] == "quick_gelu"
    saved, video = front(host(name), "tempme", layer), random_video(F)
    saved.save_pretrained(tmp_path)
    loaded = VisualFrontend.from_pretrained(tmp_path)
    assert (loaded.shape, loaded.schedule) == (saved.shape, saved.schedule)
    assert loaded.full_config() == saved.full_config() and loaded.config.layer == layer
    assert_equal(loaded.eval()(video, trace_source=True), saved(video, trace_source=True))


def test_towers_of_unknown_origin_cannot_be_saved(tmp_path: Path) -> None:
    by_hand = VisionTransformer(**SIZE)
    with_class = timm.create_model(NAME, **SIZE, norm_layer=nn.LayerNorm)
    for tower in (by_hand, with_class):
        assert backbone_of(tower)[1] is None
        with pytest.raises(ValueError, match=r"to save a front end, give VisualFrontend the `config`"):
            front(tower).save_pretrained(tmp_path)


def test_changes_after_building_are_kept(tmp_path: Path) -> None:
    tower = host("cls")
    tower.reset_classifier(5)
    tower.set_input_size(48)
    frontend = front(tower)
    frontend.save_pretrained(tmp_path)
    loaded = VisualFrontend.from_pretrained(tmp_path)
    assert (loaded.shape.embed_dim, loaded.shape.image_size, loaded.shape.tokens) == (5, 48, 37)
    video = random_video(F, side=48)
    assert_equal(loaded.eval()(video), frontend(video))


def test_front_end_by_name(tmp_path: Path) -> None:
    create: dict[str, Any] = {"method": "none", "num_frames": 1, "image_size": 32}
    frontend = create_frontend(f"timm:{NAME}", **create)
    assert (frontend.shape.tokens, frontend.shape.embed_dim, len(frontend.blocks)) == (5, 192, 12)
    assert frontend.config.preprocess.image_size == 32
    earlier = create_frontend(f"timm:{NAME}.augreg_in21k", layer=-2, num_classes=8, **create)
    assert (earlier.shape.embed_dim, len(earlier.blocks)) == (192, 11)
    assert create_frontend(f"timm:{NAME}", num_classes=8, **create).shape.embed_dim == 8
    tower = timm.create_model(NAME, img_size=32)
    save_file(tower.state_dict(), tmp_path / "vit.safetensors")
    loaded = create_frontend(f"timm:{NAME}", str(tmp_path / "vit.safetensors"), **create).eval()
    video = random_video(1)
    with torch.no_grad():
        expected = tower.eval().forward_head(tower.forward_features(video.flatten(0, 1)), pre_logits=True)
        torch.testing.assert_close(loaded(video).frames.flatten(0, 1), expected, rtol=0, atol=1e-6)
    again = VisualFrontend.from_config(
        FrontendConfig.from_dict(json.loads(json.dumps(loaded.full_config().to_dict())), "f")
    )
    again.load_state_dict(loaded.state_dict())
    assert_equal(again.eval()(video), loaded(video))


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    create: dict[str, Any] = {"method": "none", "num_frames": 1, "image_size": 32}
    torch.save({}, tmp_path / "vit.pth")
    save_file({"pos_embed": torch.zeros(1, 5, 192)}, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=r"expected a state dict of tensors in .*vit.pth"):
        create_frontend(f"timm:{NAME}", str(tmp_path / "vit.pth"), **create)
    for file in (tmp_path / "none.safetensors", "openai"):
        with pytest.raises(ValueError, match=r"expected pretrained=None, 'default' or the path of weights"):
            create_frontend(f"timm:{NAME}", str(file), **create)
    with pytest.raises(
        ValueError,
        match=r"part.safetensors \(safetensors\) does not hold the weights .*: \d+ missing: blocks.0",
    ):
        create_frontend(f"timm:{NAME}", str(tmp_path / "part.safetensors"), **create)


# ---- refusals


@pytest.mark.parametrize(("crop", "resize"), [("squash", "squash"), ("center", "shortest"), ("border", "shortest")])
def test_pixels_are_prepared_as_timm_says(crop: str, resize: str) -> None:
    told = {"crop_mode": crop, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear"}
    tower = timm.create_model(NAME, **SIZE, pretrained_cfg_overlay=told)
    preprocess = backbone_of(tower)[1].preprocess
    assert preprocess == Preprocessing(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), resize, "bilinear")


def small(name: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, pretrained=False, **options)


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        (lambda: small("eva02_tiny_patch14_224", img_size=28, depth=1), r"got Eva \(timm \d.*EVA02, RoPE.*plain one"),
        (lambda: small("vit_medium_patch16_rope_reg1_gap_256", depth=1), r"got Eva .*rotate by position"),
        (lambda: small("swin_tiny_patch4_window7_224", depths=[1], num_heads=[3]), r"got SwinTransformer .*windows"),
        (lambda: small("samvit_base_patch16", img_size=64, depth=1, embed_dim=24), r"got VisionTransformerSAM .*SAM"),
        (lambda: small("beit_base_patch16_224", depth=1), r"expected timm's VisionTransformer; got Beit"),
        (lambda: small("deit_tiny_distilled_patch16_224", depth=1), r"got VisionTransformerDistilled"),
        (lambda: small("resnet18"), r"expected timm's VisionTransformer; got ResNet"),
        (lambda: nn.Linear(2, 2), r"expected timm's VisionTransformer; got Linear"),
        (lambda: VisionTransformer(**SIZE, block_fn=ParallelScalingBlock), r"timm's Block of .*got ParallelScalingB"),
        (lambda: host("cls", img_size=(32, 16)), r"square images and patches; this one takes \(32, 16\) px"),
        (lambda: host("cls", patch_drop_rate=0.5), r"build the tower with patch_drop_rate=0"),
        (
            lambda: host("cls", global_pool="max"),
            r"pools by 'max' is not known \(timm \d.*expected 'token', 'avg', 'map'",
        ),
        (lambda: host("cls", global_pool="avg", pool_include_prefix=True), r"build it with pool_include_prefix=False"),
    ],
)
def test_towers_that_would_go_wrong_are_refused(tower: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        backbone_of(tower())


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("blocks.2", r"expected timm's Block of .*'norm2'\]; got Block of \['adapter', .*timm \d"),
        ("blocks.2.attn", r"expected timm's Attention of .*; got Attention of \['adapter', .*timm \d"),
    ],
)
def test_unknown_children_are_refused(place: str, message: str) -> None:
    tower = host("cls")
    tower.get_submodule(place).add_module("adapter", nn.Linear(2, 2))
    with pytest.raises(ValueError, match=message):
        backbone_of(tower)


def test_pooling_of_a_whole_grid_is_refused() -> None:
    with torch.device("meta"):
        model = TimmModel("vit_tiny_patch16_224", embed_dim=24, pool="avg", proj="linear")
    model.head.add_module("pool", nn.AdaptiveAvgPool2d(1))
    with pytest.raises(ValueError, match=r"AdaptiveAvgPool2d pools a whole grid, which merging breaks"):
        backbone_of(model)


@pytest.mark.parametrize("name", ["timm:vit_tiny", "timm:nothing"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(ValueError, match=rf"timm \d\S+ has no model '{name[5:]}'; known, for example: vit_"):
        create_frontend(name, method="none")
