"""The text tower: equal to open_clip's, blind to padding, exact under checkpointing."""

from __future__ import annotations

from copy import deepcopy

import open_clip
import pytest
import torch
from towers import small_clip

from tempme_vl.text.clip import CLIPTextEncoder

LENGTHS = (3, 7, 12)


def captions() -> tuple[torch.Tensor, torch.Tensor]:
    """Three captions of different length: start 98, words below 98, end 99, zeros."""
    ids = torch.zeros(3, 12, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = torch.randint(1, 98, (length,), generator=generator)
        ids[row, 0], ids[row, length - 1] = 98, 99
    return ids, (torch.arange(12) < torch.tensor(LENGTHS)[:, None]).long()


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_equals_open_clip(quick_gelu: bool) -> None:
    clip = small_clip(quick_gelu)
    text, (ids, mask) = CLIPTextEncoder(deepcopy(clip)), captions()
    torch.testing.assert_close(text(ids, mask), clip.encode_text(ids), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_padding_never_changes_a_feature(dtype: torch.dtype) -> None:
    text, (ids, mask) = CLIPTextEncoder(small_clip()), captions()
    expected = text(ids, mask.to(dtype))
    filled = torch.where(mask.bool(), ids, torch.randint(0, 100, ids.shape))
    assert not torch.equal(filled, ids)
    assert torch.equal(text(filled, mask.to(dtype)), expected)
    assert torch.equal(text(ids, 2 * mask), expected), "nonzero is real"
    for row, length in enumerate(LENGTHS):
        short = text(ids[row : row + 1, :length], mask[row : row + 1, :length])
        torch.testing.assert_close(short, expected[row : row + 1], rtol=0, atol=1e-6)


def test_padding_gets_no_gradient() -> None:
    text, (ids, mask) = CLIPTextEncoder(small_clip()), captions()
    text(ids[:1], mask[:1]).sum().backward()
    rows = text.embed.token_embedding.weight.grad.abs().sum(1)
    assert set(rows.nonzero().flatten().tolist()) == set(ids[0, : LENGTHS[0]].tolist())
    assert not text.embed.positional_embedding.grad[LENGTHS[0] :].any()


def test_words_see_only_what_came_before() -> None:
    text, (ids, _) = CLIPTextEncoder(small_clip()), captions()
    mask = torch.ones(1, 12, dtype=torch.int64)
    hidden = []
    text.blocks[-1].ln_2.register_forward_hook(lambda _, __, out: hidden.append(out))
    text(ids[2:], mask)
    changed = ids[2:].clone()
    changed[0, 6] = (changed[0, 6] + 1) % 97 + 1
    text(changed, mask)
    assert torch.equal(hidden[0][:, :6], hidden[1][:, :6])
    assert not torch.isclose(hidden[0][:, 6:], hidden[1][:, 6:]).all(-1).any()


def test_checkpointing_is_exact() -> None:
    plain, (ids, mask) = CLIPTextEncoder(small_clip()), captions()
    checkpointed = deepcopy(plain)
    checkpointed.grad_checkpointing = True
    expected, actual = plain(ids, mask), checkpointed(ids, mask)
    assert torch.equal(actual, expected)
    for output in (expected, actual):
        output.square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_precisions() -> None:
    text, (ids, mask) = CLIPTextEncoder(small_clip()), captions()
    expected = text(ids, mask)
    with torch.autocast("cpu", torch.bfloat16):
        half = text(ids, mask)
    assert (torch.cosine_similarity(half.float(), expected, dim=-1) > 0.99).all()
    half.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in text.parameters())
    double = text.double()(ids, mask)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), expected, rtol=0, atol=1e-5)


def test_too_long_or_of_two_shapes() -> None:
    text = CLIPTextEncoder(small_clip())
    with pytest.raises(ValueError, match=r"\(B, L\) with L <= 12; got \(1, 13\) and \(1, 13\)"):
        text(torch.ones(1, 13, dtype=torch.int64), torch.ones(1, 13))
    with pytest.raises(ValueError, match=r"got \(2, 12\) and \(2, 11\)"):
        text(torch.ones(2, 12, dtype=torch.int64), torch.ones(2, 11))


@pytest.mark.parametrize("change", [{"pool_type": "first"}, {"pool_type": "eos"}, {"proj_type": "none"}])
def test_other_pooling_is_refused(change: dict) -> None:
    vision = {"image_size": 8, "layers": 1, "width": 8, "head_width": 8, "patch_size": 8}
    text = {"context_length": 4, "vocab_size": 9, "width": 8, "heads": 1, "layers": 1, **change}
    with pytest.raises(ValueError, match=r"expected a text tower pooled at the end token .*, with a projection; this"):
        CLIPTextEncoder(open_clip.CLIP(8, vision, text))
