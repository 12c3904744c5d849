"""The merging modules one by one."""

from __future__ import annotations

import pytest
import torch
from towers import TINY_SHAPE

from tempme_vl.merging import METHODS, LayerPlan, MergeSchedule, TokenMerger, merge_layers
from tempme_vl.merging.tempme import ClipPosition, CrossClipMerge
from tempme_vl.merging.tome import ToMeMerge
from tempme_vl.scheduling import schedule_for
from tempme_vl.state import AttentionContext, TokenState


def state(rows: int, tokens: int, clips: int, prefix: int = 1) -> TokenState:
    x = torch.randn(rows, tokens, 8, generator=torch.Generator().manual_seed(0))
    return TokenState.start(x, clips, prefix, trace_source=True)


def test_clip_position_reaches_all_tokens_of_its_clip_in_every_video() -> None:
    position = ClipPosition(3, 8)
    x = torch.randn(6, 5, 8)
    assert torch.equal(position(x), x), "zero at first"
    torch.nn.init.normal_(position.weight)
    for row in range(6):
        torch.testing.assert_close(position(x)[row], x[row] + position.weight[row % 3])


@pytest.mark.parametrize("join", [1, 2])
def test_cross_clip_merging_compares_tokens_without_positions_but_merges_them_with(join: int) -> None:
    before, pairs = state(4, 7, 4), 3
    plain, placed = (CrossClipMerge(4, join, pairs, 8) for _ in range(2))
    torch.nn.init.normal_(placed.clip_position.weight, std=100)
    expected, actual = (merge(before, AttentionContext.of_tokens(before.x)) for merge in (plain, placed))
    assert torch.equal(actual.source, expected.source)
    assert torch.equal(actual.size, expected.size)
    assert not torch.allclose(actual.x, expected.x)


def test_positions_are_added_where_nothing_merges() -> None:
    before = state(4, 7, 4)
    merge = CrossClipMerge(4, 2, 0, 8)
    torch.nn.init.ones_(merge.clip_position.weight)
    after = merge(before, AttentionContext.of_tokens(before.x))
    assert torch.equal(after.x, before.join_clips(2).x + 1)
    assert not after.merged and after.attention_bias is None


def test_tome_leaves_unmerged_tokens_by_similarity_without_cls_and_by_position_with() -> None:
    """As ToMe's own code does: it sorts them back only to keep a class token in front."""
    keys = torch.tensor([[1.0, 0.0], [1, 0.1], [1, 0.9], [0, 1], [1, 0.3], [-1, 0], [1, 0.6], [-1, -1]])
    # cosines of tokens 0, 2, 4, 6 with their best odd one: 0.995, 0.81, 0.98, 0.91; the first pair merges
    for prefix, kept in ((0, [4, 6, 2]), (1, [2, 6])):
        before = TokenState.start(torch.eye(8).unsqueeze(0), 1, prefix, trace_source=True)
        after = ToMeMerge(1)(before, AttentionContext(keys.expand(1, 2, 8, 2)))
        assert after.source[0, kept].tolist() == list(range(prefix, prefix + len(kept)))


def test_modules_follow_the_plan() -> None:
    layers = merge_layers(MergeSchedule.tempme(4, 6, 17, 2, (1, 2), (2, 3), 30, 10), width=8)
    assert [type(layer.before_attention) for layer in layers] == [
        TokenMerger,
        CrossClipMerge,
        CrossClipMerge,
        TokenMerger,
    ]
    assert [len(layer.before_attention.clip_position.weight) for layer in layers[1:3]] == [6, 3]
    assert all(not list(m.parameters()) for m in (layers[0].after_attention, layers[3].after_attention))


def test_an_unknown_method_in_a_schedule() -> None:
    with pytest.raises(ValueError, match=r"unknown method 'own'; expected one of none, tome, tempme"):
        merge_layers(MergeSchedule("own", 2, 5, (LayerPlan(),)), width=8)


@pytest.mark.parametrize("method", METHODS)
def test_the_registry_names_its_schedules(method: str) -> None:
    assert schedule_for(method, 6, TINY_SHAPE, 6).method == method
