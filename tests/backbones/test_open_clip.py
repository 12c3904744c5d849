"""Converted open_clip towers equal the originals and go back bit for bit; other towers are refused."""

from __future__ import annotations

import math
from copy import deepcopy

import open_clip
import pytest
import torch
from torch import nn
from towers import random_video, small_clip, tempme_schedule, tiny_frontend

from tempme_vl import MergeSchedule, VisualFrontend, create_frontend, kernels
from tempme_vl.backbones.base import Preprocessing, QuickGELU, SelfAttention, square_side
from tempme_vl.backbones.open_clip import load_clip
from tempme_vl.backbones.open_clip_blocks import OpenCLIPBlock, visual_backbone
from tempme_vl.backbones.open_clip_models import Config, model_config
from tempme_vl.backbones.openai import clip_from_openai, visual_from_openai
from tempme_vl.families import split_name
from tempme_vl.tasks.retrieval import RetrievalModel
from tempme_vl.text.clip import CLIPTextEncoder

OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("ViT-B-16", "ViT-B-32", "ViT-B-16-quickgelu")]


@pytest.fixture(scope="module", params=["ViT-B-32-quickgelu", *OTHERS])
def original(request: pytest.FixtureRequest) -> open_clip.CLIP:
    torch.manual_seed(0)
    return open_clip.CLIP(**open_clip.get_model_config(request.param))


def assert_same_state(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype and torch.equal(actual[key], value), key


def test_real_towers_equal_open_clip_and_export_back(original: open_clip.CLIP) -> None:
    backbone = visual_backbone(deepcopy(original.visual))
    schedule = MergeSchedule.identity(12, 2, backbone.shape.tokens)
    frontend = VisualFrontend(backbone, schedule)
    text = CLIPTextEncoder(deepcopy(original))
    video = random_video(2, 224, videos=1)
    ids = torch.zeros(2, 77, dtype=torch.int64)
    ids[0, :4], ids[1, :3] = torch.tensor([49406, 7, 320, 49407]), torch.tensor([49406, 525, 49407])
    with torch.no_grad():
        with kernels.plain():  # the products of the same library
            actual = frontend(video).frames[0]
        embedded = text(ids[:, :32], ids[:, :32] > 0)
        expected, captions = original.visual(video[0]), original.encode_text(ids)
        # oneDNN, and the fused kernel that torch's nn.MultiheadAttention has for this mode, round in another order
        fast = frontend(video).frames[0]
        fused = original.eval().visual(video[0])
    assert (actual - expected).abs().max() <= 1e-6
    assert (embedded - captions).abs().max() <= 1e-6 * captions.abs().max()
    for rounded, reference in ((fast, actual), (actual, fused), (fast, fused)):
        pair = nn.functional.normalize(rounded, dim=-1), nn.functional.normalize(reference, dim=-1)
        torch.testing.assert_close(*pair, rtol=0, atol=1e-6)

    assert_same_state(frontend.openai_state_dict(), original.visual.state_dict())
    preprocess = Preprocessing(224, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD, "shortest", "bicubic")
    config = Config(embed_dim=512, vision_cfg={}, preprocess=preprocess)
    model = RetrievalModel(VisualFrontend(backbone, schedule, config), text, {}, original.logit_scale.item())
    assert_same_state(model.openai_state_dict(), original.state_dict())


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_loading_openai_names_and_exporting_them(quick_gelu: bool) -> None:
    original = small_clip(quick_gelu)
    nn.init.constant_(original.logit_scale, math.log(100))  # as OpenAI's, and not as CLIP's training starts
    state, schedule = original.state_dict(), MergeSchedule.identity(4, 3, 17)
    video = random_video(3)
    frontends = [
        VisualFrontend.from_openai_state_dict(state, 2, schedule, quick_gelu),
        VisualFrontend.from_openai_state_dict(original.visual.state_dict(), 2, schedule, quick_gelu),
    ]
    model = RetrievalModel.from_openai_state_dict(state, 2, schedule, text_heads=2, quick_gelu=quick_gelu)
    expected = original.visual(video.flatten(0, 1)).unflatten(0, (2, 3))
    for frontend in (*frontends, model.frontend):
        assert_same_state(frontend.openai_state_dict(), original.visual.state_dict())
        torch.testing.assert_close(frontend(video).frames, expected, rtol=0, atol=1e-6)
        assert frontend.shape.quick_gelu == frontend.config.quick_gelu == quick_gelu
    assert_same_state(model.openai_state_dict(), state)
    assert model.logit_scale().item() == pytest.approx(100)
    wrong = VisualFrontend.from_openai_state_dict(state, 2, schedule, not quick_gelu)(video).frames
    assert (wrong - expected).abs().max() > 1e-5, "the activation matters"


def test_pixels_are_normalised_as_open_clip_does() -> None:
    for name in ("tiny", "ViT-B-32-quickgelu"):
        with torch.device("meta"):
            preprocess = load_clip(name).config.preprocess
        assert (preprocess.mean, preprocess.std) == (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        assert (preprocess.resize, preprocess.interpolation) == ("shortest", "bicubic")


def test_merging_parameters_are_not_exported() -> None:
    state = tiny_frontend(tempme_schedule()).openai_state_dict()
    assert_same_state(state, tiny_frontend(MergeSchedule.identity(6, 6, 17)).openai_state_dict())


def test_numbers_of_a_tower() -> None:
    shape = visual_backbone(small_clip(quick_gelu=True, mlp_ratio=2.0).visual).shape
    assert (shape.image_size, shape.patch_size, shape.tokens, shape.width) == (32, 8, 17, 32)
    assert (shape.heads, shape.embed_dim, shape.mlp_ratio, shape.quick_gelu, shape.norm_pre) == (2, 16, 2.0, True, True)


def test_layer_scale_is_kept() -> None:
    original = small_clip(ls_init_value=0.3)
    frontend = VisualFrontend(visual_backbone(deepcopy(original.visual)), MergeSchedule.identity(4, 2, 17))
    video = random_video(2)
    expected = original.visual(video.flatten(0, 1)).unflatten(0, (2, 2))
    torch.testing.assert_close(frontend(video).frames, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("grad", [False, True])
def test_quick_gelu_is_the_usual_one_bit_for_bit(grad: bool) -> None:
    x = torch.randn(100, requires_grad=grad)
    before = x.detach().clone()
    with torch.set_grad_enabled(grad):
        assert torch.equal(QuickGELU()(x), x * torch.sigmoid(1.702 * x))
    assert torch.equal(x.detach(), before), "the input stays as it was"


def test_attention_gives_its_keys_and_adds_the_bias() -> None:
    torch.manual_seed(0)
    attention, x = SelfAttention(8, 2), torch.randn(3, 5, 8)
    _, context = attention(x)
    torch.testing.assert_close(context.keys.transpose(1, 2).flatten(2), attention.qkv(x)[..., 8:16])
    bias = torch.zeros(3, 1, 1, 5)
    bias[..., 2] = float("-inf")
    hidden, _ = attention(x, bias)
    changed = x.clone()
    changed[:, 2] += 1
    kept = [0, 1, 3, 4]
    torch.testing.assert_close(attention(changed, bias)[0][:, kept], hidden[:, kept])


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"attentional_pool": True, "attn_pooler_heads": 2}, r"expected CLS pooling"),
        ({"pool_type": "avg"}, r"expected CLS pooling \('tok'\); this tower pools by 'avg'"),
        ({"patch_dropout": 0.5}, r"build the tower with patch_dropout=0"),
        ({"image_size": (32, 16)}, r"square images; this one takes \(32, 16\) px"),
        (
            {"block_type": "custom", "qk_norm": True},
            r"expected open_clip's ResidualAttentionBlock .* got Custom",
        ),
    ],
)
def test_towers_that_would_go_wrong_are_refused(vision: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        visual_backbone(small_clip(**vision).visual)


def test_unknown_modules_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected open_clip's VisionTransformer; got Linear"):
        visual_backbone(nn.Linear(2, 2))
    block = small_clip().visual.transformer.resblocks[0]
    block.adapter = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"got ResidualAttentionBlock with \['adapter', .*open_clip_torch \d"):
        OpenCLIPBlock(block)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B-32", r"like 'open_clip:ViT-B-16-quickgelu'; got 'ViT-B-32' \(known families: open_clip"),
        ("own:ViT-B-32", r"got 'own:ViT-B-32' \(known families"),
        ("open_clip:", r"got 'open_clip:'"),
        ("open_clip:ViT-B-33", r"open_clip has no model 'ViT-B-33'; known ViTs: tiny, .*ViT-B-32"),
        ("open_clip:RN50", r"'RN50' cannot be taken apart: its visual tower is a ResNet"),
        ("open_clip:convnext_base", r"expected timm's VisionTransformer; got ConvNeXt"),
        (
            "open_clip:EVA02-B-16",
            r"expected timm's VisionTransformer; got Eva .*rotate by position \(EVA02",
        ),
        ("open_clip:EVA01-g-14", r"expected timm's VisionTransformer; got Eva "),
        ("open_clip:coca_ViT-B-32", r"cannot be taken apart: CoCa has a text tower with a class token"),
        ("open_clip:roberta-ViT-B-32", r"cannot be taken apart: its text tower is 'roberta-base' of transformers"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_frontend(name)


def test_names_and_configurations() -> None:
    assert split_name("open_clip:ViT-B-16:x") == ("open_clip", "ViT-B-16:x")
    assert model_config("ViT-B-16")["vision_cfg"]["patch_size"] == 16
    with pytest.raises(ValueError, match=r"'tiny' has no pretrained weights"):
        load_clip("tiny", "openai")


def altered(change: str) -> dict[str, torch.Tensor]:
    """A CLIP's weights with something wrong about them."""
    state = dict(small_clip().state_dict())
    if change == "resnet":
        return {"visual.layer1.0.conv1.weight": torch.zeros(1)}
    if change == "missing":
        del state["visual.ln_post.weight"]
    if change == "unknown":
        state["visual.extra"] = torch.zeros(1)
    if change == "shape":
        state["visual.transformer.resblocks.1.mlp.c_proj.weight"] = torch.zeros(32, 99)
    if change == "oblong":
        state["visual.positional_embedding"] = torch.zeros(16, 32)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("resnet", r"holds no CLIP ViT in a layout that is known .*names are like visual.layer1"),
        ("missing", r"not the weights of an OpenAI CLIP ViT: .*ln_post.weight"),
        ("unknown", r"not the weights of an OpenAI CLIP ViT: .*extra"),
        ("shape", r"not the weights of an OpenAI CLIP ViT: .*resblocks.1.mlp.c_proj.weight"),
        ("oblong", r"position table of a square image; got 15 patch positions"),
    ],
)
def test_weights_of_another_architecture(change: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        visual_from_openai(altered(change), heads=2, quick_gelu=True)


@pytest.mark.parametrize("key", ["token_embedding.weight", "logit_scale", "transformer.resblocks.0.ln_1.weight"])
def test_half_a_clip(key: str) -> None:
    state = {name: value for name, value in small_clip().state_dict().items() if name != key}
    with pytest.raises(ValueError, match=rf"not a whole OpenAI CLIP: keys \['{key}'\]"):
        clip_from_openai(state, 2, 2)


@pytest.mark.parametrize(("heads", "text_heads", "wrong"), [(3, 2, 3), (0, 2, 0), (2, 5, 5), (2, None, 0)])
def test_heads_that_do_not_divide(heads: int, text_heads: int | None, wrong: int) -> None:
    with pytest.raises(ValueError, match=rf"width 32 cannot have {wrong} heads; give a number that divides it"):
        clip_from_openai(small_clip().state_dict(), heads, text_heads)


def test_square_side() -> None:
    assert [square_side(n * n) for n in (1, 7, 14)] == [1, 7, 14]


def test_unknown_weights_are_named() -> None:
    with pytest.raises(ValueError, match=r"pretrained='nonsense' for 'ViT-B-32'"):
        load_clip("ViT-B-32", "nonsense")
