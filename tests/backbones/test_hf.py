"""Vision towers of transformers as front ends: equal to their hosts, merged, saved, shared with a host, refused."""

from __future__ import annotations

import inspect
import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights
from towers import qwen_tower, random_video
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tempme_vl import FrontendOutput, MergeSchedule, VisualFrontend, create_frontend
from tempme_vl.backbones import hf
from tempme_vl.backbones.base import Preprocessing
from tempme_vl.backbones.hf import backbone_of
from tempme_vl.backbones.hf_embed import SiglipPool

F, LAYERS, D = 6, 4, 32
SIZE = {"hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
WIDE = {**SIZE, "intermediate_size": 64}
NO_SIZE = {key: value for key, value in WIDE.items() if key != "image_size"}
FIELDS = ("tokens", "pooled", "size", "frames", "source")

# name: class, configuration, tokens that never merge
TOWERS: dict[str, tuple[str, dict[str, Any], int]] = {
    "clip": ("CLIPVisionModel", WIDE, 1),
    "clip projected": ("CLIPVisionModelWithProjection", {**WIDE, "projection_dim": 24}, 1),
    "siglip": ("SiglipVisionModel", WIDE, 0),
    "siglip without head": ("SiglipVisionModel", {**WIDE, "vision_use_head": False}, 0),
    "siglip2": ("Siglip2VisionModel", {**NO_SIZE, "num_patches": 16}, 0),
    "dinov2": ("Dinov2Model", {**SIZE, "mlp_ratio": 2, "drop_path_rate": 0.3}, 1),
    "dinov2 swiglu": ("Dinov2Model", {**SIZE, "use_swiglu_ffn": True, "layerscale_value": 0.3}, 1),
    "dinov2 registers": ("Dinov2WithRegistersModel", {**SIZE, "mlp_ratio": 2, "num_register_tokens": 4}, 5),
    "internvl": ("InternVLVisionModel", WIDE, 1),
    "internvl qk-norm": ("InternVLVisionModel", {**WIDE, "use_qk_norm": True, "norm_type": "rms_norm"}, 1),
    "internvl cls": ("InternVLVisionModel", {**WIDE, "use_mean_pooling": False}, 1),
    "instructblip": ("InstructBlipVideoVisionModel", WIDE, 1),
}
FEW = ["clip projected", "siglip", "dinov2 registers", "internvl qk-norm"]
every_tower = pytest.mark.parametrize("name", TOWERS)
few_towers = pytest.mark.parametrize("name", FEW)  # one for each kind of block, prefix and pooling
own_modules = pytest.mark.parametrize("name", [*FEW, "siglip2", "instructblip"])  # and of attention and embedding


def host(name: str, attention: str = "sdpa", **changes: Any) -> Any:
    """A tower none of whose parameters is zero or one."""
    torch.manual_seed(0)
    model_class = getattr(transformers, TOWERS[name][0])
    config = model_class.config_class(**{**TOWERS[name][1], **changes})
    model = model_class._from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def schedule(method: str, layers: int, tokens: int, prefix: int) -> MergeSchedule:
    shape = {"layers": layers, "frames": F, "tokens": tokens, "prefix": prefix}
    if method == "tempme":
        merging = {"r": 2, "merge_layers": (1, 2), "merge_frames": (2, 3), "cross_percent": 30, "intra_percent": 20}
        return MergeSchedule.tempme(**shape, **merging)
    return MergeSchedule.tome(**shape, r=2) if method == "tome" else MergeSchedule.identity(**shape)


def front(tower: nn.Module, method: str = "none", layer: int = -1, **options: Any) -> VisualFrontend:
    """A front end in evaluation mode over a host's modules."""
    backbone, config = backbone_of(tower, layer, **options)
    plan = schedule(method, len(backbone.blocks), backbone.shape.tokens, backbone.shape.num_prefix)
    frontend = VisualFrontend(backbone, plan, config)
    torch.manual_seed(1)
    frontend.init_clip_positions(0.1)
    return frontend.eval()


def inside(tower: Any) -> Any:
    """Where the encoder is: one level deeper in transformers 4."""
    return getattr(tower, "vision_model", tower)


def run(tower: Any, video: Tensor) -> Any:
    """The host itself on single frames, with all hidden states."""
    images = video.flatten(0, 1)
    if "InternVL" in type(tower).__name__ and "kwargs" not in inspect.signature(tower.forward).parameters:
        return watched(tower, images)
    if "Siglip2" not in type(tower).__name__:
        asks = images.shape[-1] != 32 and type(tower).__name__.startswith(("CLIP", "Siglip"))
        return tower(images, output_hidden_states=True, **({"interpolate_pos_encoding": True} if asks else {}))
    side = images.shape[-1] // 8
    grid = images.unfold(2, 8, 8).unfold(3, 8, 8)  # (R, 3, rows, columns, p, p)
    patches = grid.permute(0, 2, 3, 4, 5, 1).reshape(len(images), side**2, -1)
    mask = torch.ones(patches.shape[:2], dtype=torch.int64)
    return tower(patches, mask, torch.tensor([[side, side]] * len(images)), output_hidden_states=True)


def watched(tower: Any, images: Tensor) -> Any:
    """A host with its hidden states where it cannot be asked for them, as InternVL's of transformers 4."""
    states: list[Tensor] = []
    hooks = [tower.encoder.layer[0].register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))]
    for layer in tower.encoder.layer:
        hooks.append(
            layer.register_forward_hook(lambda _, __, out: states.append(out[0] if isinstance(out, tuple) else out))
        )
    last = tower(images).last_hidden_state
    for hook in hooks:
        hook.remove()
    return SimpleNamespace(hidden_states=states, last_hidden_state=last)


def assert_equal(actual: FrontendOutput, expected: FrontendOutput) -> None:
    for field in FIELDS:
        a, b = getattr(actual, field), getattr(expected, field)
        assert (a is None and b is None) or torch.equal(a, b), field


# ---- equal to the host


@pytest.mark.parametrize(
    ("name", "layer"), [*((name, -1) for name in TOWERS), *((name, layer) for name in FEW for layer in (-2, 1))]
)
def test_tokens_are_the_hosts_hidden_states(name: str, layer: int) -> None:
    tower, video = host(name), random_video(F)
    with torch.no_grad():
        frontend, theirs = front(tower, layer=layer), run(tower, video)
        tokens = frontend(video).tokens
    expected = theirs.hidden_states[layer]
    assert len(frontend.blocks) == (LAYERS + 1 + layer if layer < 0 else layer)
    assert frontend.shape.num_prefix == TOWERS[name][2] and frontend.shape.tokens == expected.shape[1]
    torch.testing.assert_close(tokens.reshape(expected.shape), expected, rtol=0, atol=1e-6)
    if layer == -1 and not name.startswith("clip"):  # CLIP's last_hidden_state is not normed, the others' is
        normed = frontend.norm(tokens).reshape(expected.shape)
        torch.testing.assert_close(normed, theirs.last_hidden_state, rtol=0, atol=1e-6)


@few_towers
def test_hosts_with_eager_attention_are_equalled_too(name: str) -> None:
    tower, video = host(name, "eager").double(), random_video(F, dtype=torch.float64)
    with torch.no_grad():
        expected, tokens = run(tower, video).hidden_states[-1], front(tower)(video).tokens
    # not closer: some of the library's eager softmaxes are float32, whatever the weights are
    torch.testing.assert_close(tokens.reshape(expected.shape), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in TOWERS if not name.startswith(("siglip w", "internvl", "instruct"))])
def test_frames_are_the_hosts_pooled_output(name: str) -> None:
    tower, video = host(name), random_video(F)
    with torch.no_grad():
        theirs, output = run(tower, video), front(tower)(video)
    expected = theirs.image_embeds if name == "clip projected" else theirs.pooler_output
    torch.testing.assert_close(output.frames.flatten(0, 1), expected, rtol=0, atol=1e-6)
    unit = nn.functional.normalize(expected, dim=-1).unflatten(0, (2, F))
    torch.testing.assert_close(output.pooled, unit.mean(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [("siglip without head", 0, 16), ("internvl", 1, 17), ("internvl cls", 0, 1), ("instructblip", 0, 1)],
)
def test_frames_where_the_host_pools_nothing(name: str, first: int, last: int) -> None:
    """The CLS token, or the mean of the patches where the configuration says so or there is no CLS token."""
    tower, video = host(name), random_video(F)
    with torch.no_grad():
        expected = run(tower, video).last_hidden_state[:, first:last].mean(1)
        frames = front(tower)(video).frames.flatten(0, 1)
    torch.testing.assert_close(frames, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["clip", "siglip", "siglip2", "dinov2", "dinov2 registers", "internvl"])
def test_frames_of_another_size(name: str) -> None:
    tower, video = host(name), random_video(F, side=48)
    with torch.no_grad():
        frontend, expected = front(tower, image_size=48), run(tower, video).hidden_states[-1]
        tokens = frontend(video).tokens.reshape(expected.shape)
    assert frontend.shape.tokens == 36 + TOWERS[name][2]
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"resize them to 48 px"):
        frontend(random_video(F))


def test_numbers_of_a_tower() -> None:
    shape = backbone_of(host("clip projected"))[0].shape
    assert (shape.image_size, shape.patch_size, shape.width, shape.heads, shape.embed_dim) == (32, 8, D, 4, 24)
    assert (shape.mlp_ratio, shape.quick_gelu, shape.norm_pre, shape.pooling) == (2.0, True, True, "cls")
    shape = backbone_of(host("siglip"))[0].shape
    assert (shape.mlp_ratio, shape.quick_gelu, shape.norm_pre, shape.pooling) == (2.0, False, False, "attention")
    assert backbone_of(host("dinov2 registers"))[0].shape.tokens == 16 + 1 + 4
    earlier = backbone_of(host("clip projected"), layer=-2)[0]
    assert earlier.shape.embed_dim == D and not [*earlier.norm.parameters(), *earlier.head.parameters()]


def test_the_video_tower_of_a_video_language_model() -> None:
    vision = CLIPVisionConfig(**WIDE)
    text = {"model_type": "llama", "hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
    text |= {"intermediate_size": 64, "num_key_value_heads": 4}
    config = transformers.VideoLlavaConfig(vision_config=vision, text_config=text, image_token_index=1)
    torch.manual_seed(0)
    model = transformers.VideoLlavaForConditionalGeneration(config).eval()
    video, tower = random_video(F), model.model.video_tower
    frontend = front(tower, layer=model.config.vision_feature_layer)
    with torch.no_grad():
        tokens = frontend(video).tokens.reshape(2 * F, 17, D)
        native = model.model.get_video_features(video, vision_feature_layer=-2)
        native = native.pooler_output if hasattr(native, "pooler_output") else native[0]  # a tuple in transformers 4
        projected = model.model.multi_modal_projector(tokens)
    torch.testing.assert_close(projected, native.reshape(projected.shape), rtol=0, atol=1e-6)


# ---- the host stays a host


@pytest.mark.parametrize(
    ("name", "processor"),
    [
        ("clip", "CLIPImageProcessor"),
        ("siglip", "SiglipImageProcessor"),
        ("siglip2", "Siglip2ImageProcessor"),
        ("dinov2 registers", None),
        ("instructblip", "BlipImageProcessor"),
    ],
)
def test_pixels_are_prepared_as_published_where_no_folder_says(name: str, processor: str | None) -> None:
    """As the family's image processor does by default; DINOv2 has none of its own, and the numbers of ImageNet."""
    published: Any = getattr(transformers, processor)() if processor else None
    image_net = ResNet18_Weights.DEFAULT.transforms()
    mean, std = (published.image_mean, published.image_std) if processor else (image_net.mean, image_net.std)
    config = hf.backbone_of(host(name))[1]
    assert config is not None
    assert (config.preprocess.mean, config.preprocess.std) == (tuple(mean), tuple(std))
    crops = published.to_dict().get("do_center_crop") if processor else True
    assert config.preprocess.resize == ("shortest" if crops else "squash")


@few_towers
def test_the_host_works_on(name: str) -> None:
    tower, video = host(name), random_video(F)
    with torch.no_grad():
        before = run(tower, video).last_hidden_state
        front(tower, "tempme")(video)
        assert torch.equal(run(tower, video).last_hidden_state, before)


@every_tower
def test_modules_are_shared(name: str) -> None:
    tower = host(name)
    frontend, theirs = front(tower, "tempme"), {id(p) for p in tower.parameters()}
    ours = [p for key, p in frontend.named_parameters() if ".clip_position." not in key]
    assert ours and {id(p) for p in ours} <= theirs
    names = [key for key, _ in frontend.named_parameters(remove_duplicate=False)]
    assert len(names) == len(list(frontend.parameters())), "each is registered once"


def test_both_train_the_same_weights() -> None:
    tower, video = host("siglip"), random_video(F)
    frontend = front(tower, "tempme")
    frontend(video).pooled[:, 0].sum().backward()
    first, head = inside(tower).encoder.layers[0], inside(tower).head
    assert first.self_attn.q_proj.weight.grad.any() and head.probe.grad.any()
    before = frontend(video).pooled
    with torch.no_grad():
        first.mlp.fc1.weight.mul_(1.5)
    assert not torch.allclose(frontend(video).pooled, before, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "first"),
    [*((name, "front end") for name in FEW), ("clip projected", "lora"), ("internvl qk-norm", "lora")],
)
def test_lora_on_the_host_is_seen(name: str, first: str) -> None:
    tower, video = host(name), random_video(F)
    expected = front(deepcopy(tower))(video).tokens
    frontend = front(tower) if first == "front end" else None
    peft_model = get_peft_model(tower, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "fc1"]))
    frontend = frontend or front(tower)
    assert torch.equal(frontend(video).tokens, expected), "LoRA starts at zero"
    trained = {key: p for key, p in peft_model.named_parameters() if p.requires_grad and ".lora_" in key}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1)
    states = run(tower, video).hidden_states[-1]
    tokens = frontend(video).tokens
    assert not torch.allclose(tokens, expected, atol=1e-3)
    torch.testing.assert_close(tokens.reshape(states.shape), states, rtol=0, atol=1e-5)
    frontend(video).pooled[:, 0].sum().backward()
    assert trained and all(p.grad.any() for p in trained.values())


def test_lora_on_the_front_end() -> None:
    frontend, video = front(host("clip"), "tempme"), random_video(F)
    before = frontend(video)
    model = get_peft_model(frontend, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    assert_equal(model(video), before)
    assert len([p for p in model.parameters() if p.requires_grad]) == 2 * 2 * LAYERS
    with pytest.raises(ValueError, match=r"unmerged adapters"):
        frontend.save_pretrained("unused")
    assert model.merge_and_unload().state_dict().keys() == front(host("clip"), "tempme").state_dict().keys()


@own_modules
def test_parameters_are_read_only_where_their_module_is_called(name: str) -> None:
    """As under ZeRO-3, which gathers a module's own parameters when it is called and drops them behind it."""
    frontend, video = front(host(name), "tempme"), random_video(F)
    with torch.no_grad():
        expected = frontend(video)
    full = {p: p.data for p in frontend.parameters()}
    # modules of the libraries that read their children's parameters themselves
    whole = [m for m in frontend.modules() if type(m).__name__ in ("MultiheadAttention", "Siglip2VisionEmbeddings")]
    inside = {child for module in whole for child in module.children()}

    def own(module: nn.Module) -> list[nn.Parameter]:
        return list(module.parameters(recurse=module in whole))

    def gather(module: nn.Module, _: Any) -> None:
        for parameter in own(module):
            parameter.data = full[parameter]

    def drop(module: nn.Module, *_: Any) -> None:
        for parameter in own(module):
            parameter.data = torch.empty(0)

    for module in frontend.modules():
        if module not in inside and own(module):
            module.register_forward_pre_hook(gather)
            module.register_forward_hook(drop)
            drop(module)
    with torch.no_grad():
        assert_equal(frontend(video), expected)


# ---- merging


@few_towers
@pytest.mark.parametrize(("method", "layer"), [("tome", -1), ("tempme", -1), ("tempme", -2)])
def test_predicted_counts_hold(name: str, method: str, layer: int) -> None:
    frontend, seen = front(host(name), method, layer), []
    for block in frontend.blocks:
        block.register_forward_hook(lambda _, __, state: seen.append((state.num_clips, state.x.shape[1])))
    output = frontend(random_video(F), trace_source=True)
    plan, tokens = frontend.schedule, frontend.shape.tokens
    assert seen == plan.token_counts and output.tokens.shape == (2, plan.output_tokens, D)
    assert (output.size.sum(1) == F * tokens).all() and output.size.max() > 1
    assert torch.equal(output.source[0].bincount(minlength=plan.output_tokens), output.size[0].flatten().long())
    whole_clips = frontend.shape.pooling != "cls" and method == "tempme"
    assert output.frames.shape == (2, 1 if whole_clips else F, frontend.shape.embed_dim)


@few_towers
def test_videos_of_a_batch_do_not_meet(name: str) -> None:
    frontend, video = front(host(name).double(), "tempme").double(), random_video(F, dtype=torch.float64)
    both, second = frontend(video), frontend(video[1:])
    torch.testing.assert_close(both.tokens[1:], second.tokens, rtol=0, atol=1e-10)
    torch.testing.assert_close(both.pooled[1:], second.pooled, rtol=0, atol=1e-10)


def test_registers_and_cls_never_merge() -> None:
    frontend, video = front(host("dinov2 registers"), "tempme"), random_video(F)
    output = frontend(video)
    assert frontend.schedule.layer_counts[-1][:2] == (1, 5 * F)
    assert (output.size[:, : 5 * F] == 1).all() and output.size[:, 5 * F :].max() > 1
    cls = frontend.norm(output.tokens[:, : 5 * F : 5])
    assert torch.equal(output.frames, cls), "registers take no part in a frame's embedding"
    assert torch.equal(frontend.patches(output.tokens), output.tokens[:, 5 * F :])


@own_modules
def test_a_token_of_size_two_is_seen_as_two(name: str) -> None:
    block = front(host(name)).blocks[1].block
    x = torch.randn(1, 3, D, generator=torch.Generator().manual_seed(0))
    bias = torch.tensor([1.0, 1.0, 2.0]).log().view(1, 1, 1, 3)
    twice, _ = block.attention_branch(torch.cat([x, x[:, 2:]], dim=1), None)
    sized, context = block.attention_branch(x, bias)
    torch.testing.assert_close(sized, twice[:, :3], rtol=0, atol=1e-5)
    assert not torch.allclose(sized, block.attention_branch(x, None)[0], atol=1e-4)
    assert context.keys.shape == (1, 4, 3, D // 4)


def test_keys_come_after_their_norm() -> None:
    tower = host("internvl qk-norm")
    attention, block = tower.encoder.layer[0].attention, front(tower).blocks[0].block
    x = torch.randn(2, 5, D)
    _, context = block.attention_branch(x, None)
    expected = attention.k_norm(attention.k_proj(tower.encoder.layer[0].layernorm_before(x)))
    assert torch.equal(context.keys.transpose(1, 2).flatten(2), expected)


def test_attention_pooling_counts_a_token_by_its_size() -> None:
    pool = SiglipPool(inside(host("siglip")).head)
    x = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(0))
    size = torch.tensor([1.0, 1.0, 2.0]).view(1, 3, 1).expand(2, -1, -1)
    twice = pool(torch.cat([x, x[:, 2:]], dim=1), None)
    torch.testing.assert_close(pool(x, size), twice, rtol=0, atol=1e-6)
    assert not torch.allclose(pool(x, None), twice, atol=1e-4)


# ---- training


@few_towers
def test_checkpointing_is_exact(name: str) -> None:
    rates = {"attention_probs_dropout_prob": 0.2} if "dinov2" in name else {"attention_dropout": 0.2}
    plain, video = front(host(name, **rates), "tempme").train(), random_video(F)
    checkpointed = deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    outputs, grads = [], []
    for frontend in (plain, checkpointed):
        torch.manual_seed(3)
        outputs.append(frontend(video, trace_source=True))
        (outputs[-1].pooled.square().sum() + outputs[-1].tokens.mean()).backward()
        grads.append({key: p.grad for key, p in frontend.named_parameters() if p.grad is not None})
    assert_equal(outputs[1], outputs[0])
    assert grads[0].keys() == grads[1].keys() and all(torch.equal(grads[1][k], g) for k, g in grads[0].items())
    unused = {key for key, _ in plain.named_parameters()} - grads[0].keys()
    assert unused <= {"embed.embeddings.mask_token"}
    torch.manual_seed(4)
    assert not torch.equal(plain(video).tokens, outputs[0].tokens), "the host's dropout"
    assert torch.equal(plain.eval()(video).tokens, plain(video).tokens)


@pytest.mark.parametrize("name", [*FEW, "siglip2"])
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
    frontend, video = front(host("internvl qk-norm", num_hidden_layers=2), "tome"), random_video(F)
    compiled = torch.compile(frontend, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(video).tokens, frontend(video).tokens, rtol=0, atol=1e-5)


# ---- names, folders, weights


CLASSES = {model_class: name for name, (model_class, _, _) in TOWERS.items()}.values()  # one tower of each class


@pytest.mark.parametrize(("name", "layer"), [*((name, -1) for name in CLASSES), ("siglip", -2)])
def test_saved_front_end_comes_back(name: str, layer: int, tmp_path: Path) -> None:
    saved, video = front(host(name), "tempme", layer), random_video(F)
    saved.save_pretrained(tmp_path)
    loaded = VisualFrontend.from_pretrained(tmp_path)
    assert (loaded.shape, loaded.schedule) == (saved.shape, saved.schedule)
    assert loaded.full_config() == saved.full_config() and loaded.config.layer == layer
    assert_equal(loaded.eval()(video, trace_source=True), saved(video, trace_source=True))


def test_saved_front_end_of_another_image_size(tmp_path: Path) -> None:
    saved, video = front(host("clip"), "tempme", image_size=48), random_video(F, side=48)
    saved.save_pretrained(tmp_path)
    loaded = VisualFrontend.from_pretrained(tmp_path)
    assert loaded.config.preprocess.image_size == 48
    assert_equal(loaded.eval()(video), saved(video))


def clip_folder(path: Path, **options: Any) -> CLIPModel:
    """A whole CLIP, text tower included, as `save_pretrained` writes it."""
    torch.manual_seed(0)
    text = {**NO_SIZE, "vocab_size": 50, "max_position_embeddings": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=WIDE, projection_dim=24))
    model.save_pretrained(path, **options)
    return model.eval()


def test_name_of_a_folder(tmp_path: Path) -> None:
    clip, video = clip_folder(tmp_path), random_video(2)
    create = {"method": "none", "num_frames": 2}
    frontend = create_frontend(f"hf:{tmp_path}", "default", **create).eval()
    with torch.no_grad():
        features = clip.get_image_features(video.flatten(0, 1))
        features = getattr(features, "pooler_output", features)  # a tensor before transformers 5
        torch.testing.assert_close(frontend(video).frames.flatten(0, 1), features, rtol=0, atol=1e-6)
    by_path = create_frontend(f"hf:{tmp_path}", str(tmp_path), **create).eval()
    assert_equal(by_path(video), frontend(video))
    drawn = create_frontend(f"hf:{tmp_path}", **create).eval()
    assert drawn.shape == frontend.shape and not torch.allclose(drawn(video).tokens, frontend(video).tokens)
    earlier = create_frontend(f"hf:{tmp_path}", "default", layer=-2, image_size=48, **create)
    assert (len(earlier.blocks), earlier.shape.tokens) == (LAYERS - 1, 37)
    assert str(tmp_path) not in json.dumps(frontend.full_config().to_dict()), "a folder's place means nothing elsewhere"


def test_folder_of_a_tower_alone(tmp_path: Path) -> None:
    for number, name in enumerate(("clip", "clip projected", "siglip", "dinov2", "internvl", "siglip2")):
        tower, video = host(name), random_video(F)
        tower.save_pretrained(tmp_path / str(number))
        frontend = create_frontend(f"hf:{tmp_path / str(number)}", "default", method="none", num_frames=F).eval()
        assert frontend.config.architecture == TOWERS[name][0]
        assert_equal(frontend(video), front(tower)(video))


def test_folder_of_a_whole_siglip(tmp_path: Path) -> None:
    text = {**NO_SIZE, "vocab_size": 50, "max_position_embeddings": 8}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=WIDE)).eval()
    model.save_pretrained(tmp_path)
    frontend, video = create_frontend(f"hf:{tmp_path}", "default", method="none", num_frames=2).eval(), random_video(2)
    with torch.no_grad():
        expected = model.vision_model(video.flatten(0, 1)).pooler_output
        torch.testing.assert_close(frontend(video).frames.flatten(0, 1), expected, rtol=0, atol=1e-6)


def test_preprocessing_is_the_folders_own(tmp_path: Path) -> None:
    host("siglip").save_pretrained(tmp_path)
    plain = Preprocessing(32, (0.5,) * 3, (0.5,) * 3, "squash", "bicubic")
    create = {"method": "none", "num_frames": 2}
    assert create_frontend(f"hf:{tmp_path}", **create).config.preprocess == plain
    processor = {"image_processor_type": "SiglipImageProcessor", "image_mean": [0.1, 0.2, 0.3], "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    given = create_frontend(f"hf:{tmp_path}", **create).config.preprocess
    assert given == replace(plain, mean=(0.1, 0.2, 0.3), interpolation="bilinear")


def test_only_safetensors_are_read(tmp_path: Path) -> None:
    tower = host("clip")
    tower.config.save_pretrained(tmp_path)
    torch.save(tower.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no safetensors of a CLIPVisionModel can be loaded"):
        create_frontend(f"hf:{tmp_path}", "default", method="none", num_frames=2)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    clip_folder(tmp_path / "clip")
    host("dinov2").save_pretrained(tmp_path / "dinov2")
    host("clip").save_pretrained(tmp_path / "tower")
    with pytest.raises(ValueError, match=r"lacks \d+ weights of a CLIPVisionModelWithProjection"):
        create_frontend(f"hf:{tmp_path / 'clip'}", str(tmp_path / "dinov2"), method="none", num_frames=2)
    # some versions find the tower's weights without their prefix, others none at all
    with pytest.raises(ValueError, match=r"lacks (1 weights .*visual_projection|72 weights )"):
        create_frontend(f"hf:{tmp_path / 'clip'}", str(tmp_path / "tower"), method="none", num_frames=2)


# ---- layouts that changed within transformers 4 and 5


class _Nested(nn.Module):
    """CLIPVisionModel and SiglipVisionModel of transformers 4: the tower one level deeper."""

    def __init__(self, tower: Any):
        super().__init__()
        self.vision_model, self.config = tower, tower.config


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_towers_one_level_deeper_are_the_same(name: str) -> None:
    tower, video = host(name), random_video(F)
    nested = tower if inside(tower) is not tower else type(type(tower).__name__, (_Nested,), {})(tower)
    assert_equal(front(nested, "tempme")(video), front(inside(tower), "tempme")(video))


class _FlatAttention(nn.Module):
    """DINOv2's newer layout, of the older one."""

    def __init__(self, attention: Any):
        super().__init__()
        inner = attention.attention
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = inner.query, inner.key, inner.value, attention.output.dense
        self.scaling = inner.scaling


class _Dinov2SelfAttention(nn.Module):
    def __init__(self, attention: Any):
        super().__init__()
        self.query, self.key, self.value = attention.q_proj, attention.k_proj, attention.v_proj
        self.scaling = attention.scaling


class _Dinov2Output(nn.Module):
    def __init__(self, attention: Any):
        super().__init__()
        self.dense, self.dropout = attention.o_proj, nn.Dropout(0.0)


class _NestedAttention(nn.Module):
    """The older layout, of the newer one."""

    def __init__(self, attention: Any):
        super().__init__()
        self.attention, self.output = _Dinov2SelfAttention(attention), _Dinov2Output(attention)


def test_both_layouts_of_dinov2s_attention_are_the_same() -> None:
    tower, video = host("dinov2"), random_video(F)
    expected = front(tower, "tempme")(video)
    for layer in tower.encoder.layer:
        flat = hasattr(layer.attention, "q_proj")
        layer.attention = (_NestedAttention if flat else _FlatAttention)(layer.attention)
    assert_equal(front(tower, "tempme")(video), expected)


# ---- refusals


def unknown(model_class: str, **config: Any) -> nn.Module:
    made = getattr(transformers, model_class)
    return made(made.config_class(**config))


QWEN = {"hidden_size": 32, "depth": 1, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 32}


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        (
            lambda: qwen_tower(transformers.Qwen2_5_VLConfig, **QWEN),
            r"^Qwen2_5_VisionTransformer\w+ \(transformers \d.*rotates .* behind it; towers that can",
        ),
        (lambda: unknown("DINOv3ViTModel", **WIDE), r"^DINOv3ViTModel .*rotates queries and keys by position"),
        (
            lambda: unknown("SwinModel", image_size=32, patch_size=4, embed_dim=8, depths=[1], num_heads=[2]),
            r"^SwinModel .*attends within windows .*merge the tokens that it gives, behind it",
        ),
        (
            lambda: unknown("ViTModel", **WIDE),
            r"^ViTModel .*no family that is known here: pass the vision tower itself",
        ),
        (
            lambda: CLIPModel(CLIPConfig(vision_config=WIDE, text_config=NO_SIZE)),
            r"^CLIPModel .*known here.*CLIPVisionM",
        ),
        (lambda: nn.Linear(2, 2), r"^Linear .*known here.*towers that can merge inside: CLIPVisionModel"),
        (lambda: host("internvl", image_size=[32, 16]), r"expected a tower for square images; .* \(32, 16\) px"),
    ],
)
def test_towers_that_would_go_wrong_are_refused(tower: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        backbone_of(tower())


@pytest.mark.parametrize(
    ("place", "child", "module", "message"),
    [
        ("encoder.layers.2", "adapter", nn.Linear(2, 2), r"of \['layer_norm1', .*; got \['adapter', .*transformers \d"),
        ("encoder.layers.2.self_attn", "q_norm", nn.Identity(), r"unknown CLIPAttention of .*q_norm.*transformers \d"),
        ("encoder", "rotary", nn.Identity(), r"expected a CLIPEncoder of \['layers'\]; got \['layers', 'rotary'\]"),
        ("", "cls_head", nn.Identity(), r"expected a CLIPVisionModel of .*; got \['cls_head', "),
    ],
)
def test_unknown_children_are_refused(place: str, child: str, module: nn.Module, message: str) -> None:
    tower = CLIPVisionModel(CLIPVisionConfig(**WIDE))
    (inside(tower).get_submodule(place) if place else tower).add_module(child, module)
    with pytest.raises(ValueError, match=message):
        backbone_of(tower)


def test_unknown_children_around_a_nested_tower_are_refused() -> None:
    tower = host("clip projected")
    tower.adapter = nn.Identity()
    with pytest.raises(ValueError, match=r"of \['vision_model', 'visual_projection'\]; got \['adapter', "):
        backbone_of(tower)


def test_unknown_parameters_are_refused() -> None:
    tower = Dinov2Model(Dinov2Config(**SIZE))
    tower.encoder.layer[0].gate = nn.Parameter(torch.ones(D))
    with pytest.raises(ValueError, match=r"expected a Dinov2Layer of .*; got .*'gate'"):
        backbone_of(tower)
    siglip = SiglipVisionModel(SiglipVisionConfig(**WIDE))
    inside(siglip).head.second_probe = nn.Parameter(torch.ones(D))
    with pytest.raises(ValueError, match=r"expected a SiglipMultiheadAttentionPoolingHead of .*'second_probe'"):
        backbone_of(siglip)


@pytest.mark.parametrize("layer", [0, 5, -5])
def test_layers_that_are_not_there(layer: int) -> None:
    with pytest.raises(ValueError, match=rf"of 4 layers has hidden states .* -4..-1 or 1..4; got layer={layer}"):
        backbone_of(host("clip"), layer)


def test_images_of_broken_patches() -> None:
    with pytest.raises(ValueError, match=r"SigLIP 2 takes whole patches of 8 px; got image_size=36"):
        backbone_of(host("siglip2"), image_size=36)


def test_names_that_are_no_towers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"finds no configuration for .*nothing', a hub id or a folder"):
        create_frontend(f"hf:{tmp_path}/nothing", method="none")
    for config, message in (
        (transformers.BertConfig(), r"is a 'bert' of transformers \d.*expected one of clip, "),
        (transformers.VideoLlavaConfig(), r"is a 'video_llava' .*give its vision tower to .*backbone_of"),
    ):
        config.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            create_frontend(f"hf:{tmp_path}", method="none")
    assert set(hf._MODELS.values()) <= {model_class for model_class, _ in hf._TOWERS.values()}
