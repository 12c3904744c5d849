"""Merging with a text in mind: what it changes, by hand, and what it needs."""

from __future__ import annotations

import pytest
import torch
from towers import TINY, random_video

from tempme_vl import VisualFrontend, create_frontend, make_schedule
from tempme_vl.matching import bipartite_match
from tempme_vl.merging.guidance import less_alike_frames, less_alike_patches
from tempme_vl.merging.testa import match_frames
from tempme_vl.outputs import direction_of
from tempme_vl.state import TokenState

FEWER = {"temporal_r": [1, 1, 0, 0, 0, 0], "spatial_r": 1}


def pair(tower: str, guidance: float, **options: object) -> tuple[VisualFrontend, VisualFrontend]:
    """The same tower without guidance and with it."""
    torch.manual_seed(0)
    plain = create_frontend(tower, None, "testa", 6, **{**FEWER, **options}).eval()
    guided = create_frontend(tower, None, "testa", 6, guidance=guidance, **{**FEWER, **options}).eval()
    guided.load_state_dict(plain.state_dict())
    return plain, guided


@pytest.mark.parametrize("near", [0, 1])
def test_a_patch_near_the_text_lets_others_merge(near: int) -> None:
    """Of six tokens 0 and 1 are most alike, cos 0.1, then 2 and 3, cos 0.2, which is 0.015 less. One of the first alone
    is near the text: 5/6 above the mean of 1/6, where the deviation is sqrt(5)/6: sqrt(5) of it, and the others
    -1/sqrt(5). The pair loses guidance times half of their sum, 0.894, and the other -0.447."""
    angles = torch.tensor([0.0, 0.1, 2.0, 2.2, 4.0, 5.0])
    metric = torch.stack([angles.cos(), angles.sin()], -1).unsqueeze(0)
    x = torch.tensor([[[0.0, 1.0]] * 6])
    x[0, near] = torch.tensor([1.0, 0.0])
    state = TokenState.start(x, 1, 0, guide=torch.tensor([[2.0, 0.0]]))
    assert less_alike_patches(state, 0.0) is None
    less = less_alike_patches(state, 0.2)
    assert less is not None
    expected = torch.full((1, 6), -0.0447)
    expected[0, near] = 0.2236
    torch.testing.assert_close(less, expected, atol=1e-4, rtol=0)
    for guidance, merged in ((0.0, 0), (0.01, 0), (0.0115, 2), (0.2, 2)):  # 0.0149 / (0.894 + 0.447) = 0.0111
        assert bipartite_match(metric, 1, 0, less=less_alike_patches(state, guidance)).src.tolist() == [[merged]]


def test_a_frame_near_the_text_lets_others_merge() -> None:
    """Frames 0 and 1 are alike, then 2 and 3; the patches of frame 1 are near the text on average."""
    angle = torch.tensor([[0.0, 0.1, 2.0, 2.2]]).expand(3, -1)
    metric = torch.stack([angle.cos(), angle.sin()], -1).unsqueeze(0)
    x = torch.zeros(4, 4, 2)
    x[..., 1] = 1.0
    x[1, 1:3] = torch.tensor([1.0, 0.0])  # two of its three patches, the CLS token aside
    state = TokenState.start(x, 4, 1, guide=torch.tensor([[1.0, 0.0]]))
    less = less_alike_frames(state, 1.0)
    assert less is not None
    torch.testing.assert_close(less, torch.tensor([[-0.2887, 0.8660, -0.2887, -0.2887]]), atol=1e-4, rtol=0)
    assert match_frames(metric, 1).src.tolist() == [[0]] and match_frames(metric, 1, less).src.tolist() == [[2]]


@pytest.mark.parametrize("tower", ["testa:tiny", TINY])
def test_the_direction_of_a_text_is_that_of_its_embeddings(tower: str) -> None:
    """Tokens along it are nearer to the text, once they are embedded, than tokens along any other direction tried."""
    torch.manual_seed(0)
    frontend = create_frontend(tower, None, "none", 6)
    assert isinstance(frontend.norm, torch.nn.LayerNorm)
    torch.nn.init.normal_(frontend.norm.weight)
    torch.nn.init.normal_(frontend.norm.bias)
    text = torch.randn(1, frontend.shape.embed_dim)
    towards = direction_of(text, frontend.norm, frontend.head, frontend.shape.width)
    tokens = torch.cat([towards, torch.randn(500, frontend.shape.width)])
    with torch.no_grad():
        products = frontend.head(frontend.norm(tokens)) @ text[0]
    assert products.argmax() == 0


@pytest.mark.parametrize("tower", ["testa:tiny", TINY])
def test_counts_stay_and_what_merges_changes(tower: str) -> None:
    plain, guided = pair(tower, 20.0)
    assert guided.schedule.token_counts == plain.schedule.token_counts and guided.gflops() == plain.gflops()
    video, texts = random_video(6), torch.randn(2, plain.shape.embed_dim)
    with torch.no_grad():
        without = plain(video, trace_source=True).source
        one, other = (guided(video, trace_source=True, guide=text).source for text in (texts, texts.flip(0)))
        alone = guided(video[1:], trace_source=True, guide=texts[1:]).source
    assert without is not None and one is not None and other is not None and alone is not None
    assert not torch.equal(one, without) and not torch.equal(one, other)
    assert torch.equal(alone[0], one[1]), "each video by its own text"


def test_no_guidance_is_the_method_as_it_is() -> None:
    plain, zero = pair("testa:tiny", 0.0)
    assert zero.schedule == plain.schedule and not plain.schedule.guided
    video = random_video(6)
    with torch.no_grad():
        assert torch.equal(plain(video).tokens, zero(video).tokens)
    saved = pair("testa:tiny", 0.5)[1].schedule
    assert saved.guided and type(saved).from_dict(saved.to_dict()) == saved


def test_a_text_of_another_dtype_than_the_weights() -> None:
    _, guided = pair("testa:tiny", 0.5)
    text = torch.randn(2, 64)
    with torch.no_grad():
        exact = guided(random_video(6), guide=text.double()).tokens
        torch.testing.assert_close(exact, guided(random_video(6), guide=text).tokens)
        assert guided.bfloat16()(random_video(6).bfloat16(), guide=text).tokens.dtype == torch.bfloat16


def test_what_guidance_needs_is_said() -> None:
    plain, guided = pair("testa:tiny", 0.5)
    video, text = random_video(6), torch.randn(2, 64)
    with pytest.raises(ValueError, match="merges with a text in mind: give `guide`"):
        guided(video)
    with pytest.raises(ValueError, match="only a schedule with guidance takes a `guide`"):
        plain(video, guide=text)
    with pytest.raises(ValueError, match=r"expected guide \(2, 64\); got \(1, 64\)"):
        guided(video, guide=text[:1])
    with pytest.raises(ValueError, match="needs strategy 'geometry'; got 'prune'"):
        make_schedule("testa", 6, 6, 17, **FEWER, strategy="prune", guidance=0.5)
    with pytest.raises(ValueError, match="guidance"):
        make_schedule("testa", 6, 6, 17, **FEWER, guidance=-1)


def test_a_step_of_training_is_told_the_text_too() -> None:
    """Gradients flow as without; the text gets none, since matching has none."""
    _, guided = pair("testa:tiny", 0.5)
    text = torch.randn(2, 64, requires_grad=True)
    guided.set_grad_checkpointing()
    guided(random_video(6), guide=text).pooled.sum().backward()
    assert text.grad is None
    assert all(weight.grad is not None for weight in guided.blocks.parameters())
