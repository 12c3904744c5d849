"""The merging modules one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from towers import TINY_SHAPE

from tempme_vl import create_frontend
from tempme_vl.merging import METHODS, LayerPlan, MergeSchedule, TokenMerger, merge_layers
from tempme_vl.merging.sta import SlotDrop
from tempme_vl.merging.tempme import ClipPosition, CrossClipMerge
from tempme_vl.merging.tome import ToMeMerge, pairs_by_block
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


class Products(TorchDispatchMode):
    """Multiply-accumulates of matrix products, and elements of softmaxes."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self.total += made.numel() * args[0].shape[-1]
        elif name == "_softmax":
            self.total += made.numel()
        return made


@pytest.mark.parametrize("mode", ["per_frame", "joint", None])
@pytest.mark.parametrize(
    ("method", "given"),
    [(method, {}) for method in ("tome", "tempme", "evit", "diffrate", "sta")]
    + [("sta", {"keep_rate": 0.8, "behind": "attention"}), ("evit", {"keep_rate": 0.5, "fuse": False})],
)
def test_the_cost_of_matching_is_that_of_what_steps_multiply(
    method: str, given: dict[str, Any], mode: str | None
) -> None:
    """In tiny towers, CLIP's (None) and UMT's, where a method works there."""
    record = METHODS[method]
    if (mode == "joint" and not record.joint) or (mode and "cls_rows" in record.reads):
        pytest.skip("refused")
    name, options = ("umt:tiny", {"mode": mode}) if mode else ("open_clip:tiny", {})
    frontend = create_frontend(name, method=method, num_frames=4, **options, **given)
    counted = []
    for block in frontend.blocks:
        for step in (block.before_attention, block.after_attention, block.after_mlp):

            def watched(state: TokenState, context: AttentionContext, forward: Any = step.forward) -> TokenState:
                with Products() as products:
                    state = forward(state, context)
                counted.append(products.total)
                return state

            step.forward = watched
    with torch.no_grad():
        frontend(torch.randn(1, 4, 3, 32, 32))
    schedule, shape = frontend.schedule, frontend.shape
    predicted = [
        record.matching(plan, count, shape.width, shape.width // shape.heads)
        for plan, count in zip(schedule.plan, schedule.layer_counts, strict=True)
    ]
    assert [sum(counted[i : i + 3]) for i in range(0, len(counted), 3)] == predicted and any(predicted)


def test_sta_goes_through_time_and_drops_what_was_said_before() -> None:
    """Two slots of four patches: of the second, the copies of the first's go, and of equal ones the weaker."""
    same, new = torch.tensor([[[9.0, 0, 0]]]), torch.tensor([[[0.0, 9, 0]]])
    for backwards in (False, True):
        slots = [torch.cat([same, same, same, same], 1), torch.cat([new, same, new * 2, same], 1)]
        x = torch.cat(slots[::-1] if backwards else slots, 1)
        state = TokenState.start(x, 1, 0, trace_source=True)
        after = SlotDrop(2, 2, backwards)(state, AttentionContext(20 * x.unsqueeze(1)))
        kept = after.origin.view(2, 2) - torch.tensor([[0], [4]])
        first, second = kept.flip(0) if backwards else kept
        assert first.tolist() == [1, 3], "all are alike: the even ones go"
        assert second.tolist() == [2, 0], "the stronger one has less of what it was given"


def test_pairs_of_an_inflection() -> None:
    for r, expected in (((3, -1), [6, 4, 2, 0]), ([3, -1], [6, 4, 2, 0]), ((3, 1), [0, 2, 4, 6]), ((3, 0), [3] * 4)):
        assert pairs_by_block(r, 4) == expected
    assert pairs_by_block((10, 0.5), 12) == [5, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    assert pairs_by_block([1, 2], 2) == [1, 2] and pairs_by_block((2, 1), 2) == [0, 4]
    assert pairs_by_block((3, 1), 1) == [3]
    for r, layers in (((3, 1.5), 4), ((3, -2), 4), ((-3, 1), 4), ((1.5, 0), 4), ([1, 1], 3), ((1, 1, 1), 4)):
        with pytest.raises(ValueError, match=r"\(r, inflection\) with an inflection from -1 to 1; got"):
            pairs_by_block(r, layers)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("evit", {"keep_rate": 0}, r"above 0 to 1, one for all or one for each of 6 blocks; got 0"),
        ("evit", {"keep_rate": 1.2}, r"keep_rate .* got 1.2"),
        ("evit", {"keep_rate": [0.5] * 5}, r"keep_rate .* got \[0.5, 0.5"),
        ("sta", {"keep_rate": 0.4}, r"0.5 to 1 .*each of the blocks \[0, 2, 4\]; got 0.4"),
        ("sta", {"keep_rate": [0.9, 0.8]}, r"got \[0.9, 0.8\]"),
        ("sta", {"keep_rate": 0.9, "behind": "mlp"}, r"behind a 'block' or its 'attention'; got behind='mlp'"),
        ("diffrate", {"merge_kept": [17, 9]}, r"merge_kept counts .* each of 6 blocks .*got \[17, 9\]"),
        ("diffrate", {"merge_kept": [17, 9, 9, 9, 9, 1]}, r"the 1 CLS and at least one patch among them"),
        ("diffrate", {"merge_kept": [17] * 6, "prune_kept": [1] * 6}, r"prune_kept counts"),
        ("diffrate", {"merge_kept": "searched"}, r"a search has merge_kept='search'"),
        ("diffrate", {"merge_kept": "search", "prune_kept": [17] * 6}, r"no prune_kept"),
    ],
)
def test_options_that_are_refused(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_frontend("open_clip:tiny", method=method, num_frames=2, **options)
