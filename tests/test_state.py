"""The token state: how it starts, and joining clips as an order of tokens."""

from __future__ import annotations

import pytest
import torch

from tempme_vl.state import TokenState


def numbered(clips: int, tokens: int, prefix: int, videos: int = 2) -> TokenState:
    """A state whose token values count from 0 over the whole batch, each clip with a random source."""
    x = torch.arange(videos * clips * tokens, dtype=torch.float64).view(videos * clips, tokens, 1)
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(-1, tokens, (videos * clips, 7), generator=generator)
    return TokenState(x, x + 1, clips, prefix, source=source)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_token_starts_as_itself(dtype: torch.dtype) -> None:
    state = TokenState.start(torch.randn(6, 5, 3).to(dtype), num_clips=3, num_prefix=1, trace_source=True)
    assert torch.equal(state.size, torch.ones(6, 5, 1))
    assert state.size.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(state.source, torch.arange(5).repeat(6, 1))
    assert state.attention_bias is None
    assert TokenState.start(state.x, 3, 1).source is None


def test_attention_bias_is_the_log_of_the_key_sizes() -> None:
    size = torch.tensor([[1.0, 2.0, 5.0]]).unsqueeze(-1)
    bias = TokenState(torch.zeros(1, 3, 4), size, 1, 1, merged=True).attention_bias
    assert bias.shape == (1, 1, 1, 3)
    assert torch.equal(bias.flatten().exp().round(), size.flatten())


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("join", [1, 2, 3, 6])
def test_joined_clips_hold_all_cls_then_all_patches_in_clip_order(join: int, prefix: int) -> None:
    clips, tokens = 6, 5
    state = numbered(clips, tokens, prefix)
    joined = state.join_clips(join)
    assert (joined.num_clips, joined.num_prefix) == (clips // join, prefix * join)
    for row, values in enumerate(joined.x.squeeze(-1)):
        parts = state.x[row * join : (row + 1) * join].squeeze(-1)
        expected = [v for part in parts for v in part[:prefix]] + [v for part in parts for v in part[prefix:]]
        assert values.tolist() == [v.item() for v in expected]
    assert torch.equal(joined.size, joined.x + 1)


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("join", [1, 2, 3, 6])
def test_source_points_at_the_same_token_after_a_join(join: int, prefix: int) -> None:
    def held(state: TokenState) -> torch.Tensor:
        """The value that each input token finds, -1 for a dropped one."""
        found = state.x.squeeze(-1).gather(1, state.source.clamp(min=0))
        return torch.where(state.source < 0, -1.0, found).flatten()

    state = numbered(6, 5, prefix)
    assert (state.source < 0).any()
    assert torch.equal(held(state.join_clips(join)), held(state))


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_joining_twice_is_joining_once(prefix: int) -> None:
    state = numbered(12, 4, prefix)
    twice, once = state.join_clips(2).join_clips(3), state.join_clips(6)
    for name in ("x", "size", "source"):
        assert torch.equal(getattr(twice, name), getattr(once, name)), name
    assert (twice.num_clips, twice.num_prefix) == (once.num_clips, once.num_prefix)


def test_a_state_cannot_be_changed() -> None:
    state = numbered(2, 3, 1)
    with pytest.raises(AttributeError):
        state.num_clips = 1
    before = state.x.clone()
    added = state.add(torch.ones_like(state.x))
    assert torch.equal(state.x, before) and torch.equal(added.x, before + 1)
