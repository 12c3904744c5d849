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


def tracked(rows: int = 4, tokens: int = 7, clips: int = 2, prefix: int = 1) -> TokenState:
    """Tokens that begin with a 1 for each input token they hold, in float64."""
    x = torch.eye(tokens, dtype=torch.float64).expand(rows, -1, -1)
    return TokenState.start(x, clips, prefix, trace_source=True)


def check(state: TokenState, inputs: int) -> None:
    """Every token's content is what its source and size say; sizes, dropped and inserted tokens add up."""
    rows, tokens, _ = state.x.shape
    held = torch.zeros(rows, tokens, inputs, dtype=torch.float64)
    for row, sources in enumerate(state.source.tolist()):
        for number, place in enumerate(sources):
            if place >= 0:
                held[row, place, number] = 1
    inserted = slice(state.num_prefix - state.num_inserted, state.num_prefix)
    assert not held[:, inserted].any() and (state.size[:, inserted] == 1).all()
    sizes = held.sum(2)
    sizes[:, inserted] = 1
    assert torch.equal(state.size.squeeze(-1), sizes)
    dropped = (state.source < 0).sum(1)
    assert torch.equal(state.size.sum((1, 2)).long() + dropped, torch.full((rows,), inputs + state.num_inserted))
    for row, places in enumerate(state.origin.tolist()):
        assert all(held[row, token, place] for token, place in enumerate(places) if place >= 0), "a token of its own"


def test_dropped_tokens_leave_and_the_kept_ones_take_the_order_that_is_given() -> None:
    state = tracked().keep(torch.tensor([[5, 2, 3]]).expand(4, -1))
    check(state, 7)
    assert torch.equal(state.x[0], torch.eye(7, dtype=torch.float64)[[0, 5, 2, 3]])
    assert state.source[0].tolist() == [0, -1, 2, 3, -1, 1, -1] and state.origin[0].tolist() == [0, 5, 2, 3]
    assert not state.merged and state.attention_bias is None
    again = state.keep(torch.tensor([[3, 1]]).expand(4, -1))
    check(again, 7)
    assert again.source[0].tolist() == [0, -1, -1, 1, -1, 2, -1]


def test_a_fused_token_holds_what_would_be_dropped() -> None:
    start = tracked()
    state = start.keep(torch.tensor([[6, 2]]).expand(4, -1), fused=start.x[:, [1, 3, 4, 5]].sum(1, keepdim=True))
    check(state, 7)
    assert state.merged and state.size[0].flatten().tolist() == [1, 1, 1, 4]
    assert state.source[0].tolist() == [0, 3, 2, 3, 3, 3, 1] and state.origin[0].tolist() == [0, 6, 2, -1]
    assert torch.equal(state.x[0, 3], torch.tensor([0, 1, 0, 1, 1, 1, 0]).double())


def test_inserted_tokens_stand_behind_the_cls_tokens_also_of_joined_clips() -> None:
    prompts = torch.full((4, 2, 7), -9.0)
    state = tracked().insert(prompts)
    check(state, 7)
    assert (state.num_prefix, state.num_inserted) == (3, 2) and (state.x[:, 1:3] == -9).all()
    joined = state.keep(torch.tensor([[4, 8]]).expand(4, -1)).join_clips(2)
    check(joined, 14)
    assert (joined.num_prefix, joined.num_inserted, joined.num_clips) == (6, 4, 1)
    assert (joined.x[:, 2:6] == -9).all() and (joined.x[:, [0, 1, 6, 7, 8, 9]] >= 0).all()
    assert joined.origin[0].tolist() == [0, 7, -1, -1, -1, -1, 2, 6, 9, 13]


@pytest.mark.parametrize("registers", [0, 2])
def test_the_prefixes_of_a_clips_frames_become_their_mean(registers: int) -> None:
    start = tracked(prefix=1 + registers)
    state = start.join_clips(2).pool_prefix(2)
    check(state, 14)
    one = 1 + registers
    assert state.num_prefix == one and state.x.shape[1] == 14 - one and state.merged
    assert torch.equal(state.x[0, :one], torch.eye(7, dtype=torch.float64)[:one])  # both frames have the same
    assert state.source[0, :one].tolist() == state.source[0, 7 : 7 + one].tolist() == list(range(one))
    with_prompts = start.insert(torch.zeros(4, 1, 7)).join_clips(2).pool_prefix(2)
    check(with_prompts, 14)
    assert (with_prompts.num_prefix, with_prompts.num_inserted) == (one + 2, 2)


def test_sizes_count_in_attention_only_where_the_method_wants_it() -> None:
    state = TokenState.start(torch.zeros(2, 5, 3), 1, 1, proportional=False)
    assert state.keep(torch.tensor([[1], [2]]), fused=torch.zeros(2, 1, 3)).attention_bias is None
