"""The search of DiffRate: its masks are what dropping and merging do, its gradient is that of a masked softmax, and it
finds numbers for a target of FLOPs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tempme_vl import VisualFrontend, create_frontend
from tempme_vl.backbones.attention import attend
from tempme_vl.merging import diffrate_search as search
from tempme_vl.merging import is_of_merging
from tempme_vl.state import AttentionContext, TokenState

PATCHES, FRAMES = 16, 2


def searching(**options: Any) -> VisualFrontend:
    torch.manual_seed(0)
    return create_frontend(
        "open_clip:tiny", method="diffrate", num_frames=FRAMES, merge_kept="search", granularity=1, **options
    )


def choose(choice: search.Choice, patches: int) -> None:
    with torch.no_grad():
        choice.logits.fill_(-30.0)
        choice.logits[PATCHES - patches] = 30.0


def video() -> Tensor:
    return torch.randn(2, FRAMES, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_masks_do_what_dropping_and_merging_do() -> None:
    """Merging in the last block, behind which weights no longer matter: a search never lets them fall below one."""
    frontend = searching().eval()
    for step, pruned in zip(search.search_steps(frontend)[1:], (12, 12, 9, 7, 6), strict=True):
        choose(step.prune, pruned)
        choose(step.merge, 16)
    choose(step.merge, 3)
    found = search.found(frontend)
    assert found == {"prune_kept": [17, 13, 13, 10, 8, 7], "merge_kept": [17, 13, 13, 10, 8, 4]}
    fixed = create_frontend("open_clip:tiny", method="diffrate", num_frames=FRAMES, **found).eval()
    state = {name: weight for name, weight in frontend.state_dict().items() if not is_of_merging(frontend, name)}
    fixed.load_state_dict(state)
    with torch.no_grad():
        masked, dropped = frontend(video()), fixed(video())
    assert masked.tokens.shape[1] == FRAMES * 17 and dropped.tokens.shape[1] == FRAMES * 4
    torch.testing.assert_close(masked.pooled, dropped.pooled, rtol=0, atol=1e-4)
    kept = masked.tokens.unflatten(1, (FRAMES, 17))[:, :, :4].flatten(1, 2)
    torch.testing.assert_close(kept, dropped.tokens, rtol=0, atol=1e-3)


def test_the_gradient_of_a_mask_is_that_of_a_masked_softmax() -> None:
    """Of tokens that are gone, too: how much better or worse it would be to have them back."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 9, 8)
    mask = torch.tensor([1.0] * 5 + [0.0] * 4)
    exact, ours = mask.double().requires_grad_(), mask.clamp(min=search.GONE).requires_grad_()
    weight = torch.rand(2, 9, 1) + 1
    logits = (q.double() @ k.double().mT / 8**0.5).exp() * (exact * weight.double().squeeze(-1)).view(2, 1, 1, 9)
    expected = (logits / logits.sum(-1, keepdim=True)) @ v.double()
    state = TokenState.start(torch.zeros(2, 9, 1), 1, 0)
    state = state.regroup(state.x, state.size, list, list, weight=weight * ours.unsqueeze(1))
    actual = attend(q, k, v, state.attention_bias)
    torch.testing.assert_close(actual.double(), expected.transpose(1, 2).flatten(2), rtol=0, atol=1e-4)
    target = torch.randn(2, 9, 16, dtype=torch.float64)
    (expected.transpose(1, 2).flatten(2) * target).sum().backward()
    (actual * target).sum().backward()
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-3, atol=1e-3)
    assert (exact.grad[5:].abs() > 0.01).any()


def test_a_choice_keeps_all_at_first_and_its_probability_falls_with_the_rank() -> None:
    choice = search.Choice(14, 4)
    mean, probability = choice()
    assert len(choice.logits) == 4 and int(mean) == 13  # of 14, 10, 6 and 2
    torch.testing.assert_close(probability[[0, 1, 2, 5, 6, 13]], torch.tensor([30, 30, 29, 29, 28, 27]) / 30)
    torch.testing.assert_close(probability.sum(), mean)


def test_a_search_finds_numbers_for_a_target_of_flops(tmp_path: Path) -> None:
    frontend = searching()
    whole = search.search_flops(create_frontend("open_clip:tiny", method="none", num_frames=FRAMES)).item()
    assert whole * FRAMES / 1e9 < frontend.gflops(), "the paper's own count has softmax, norms and biases, too"
    rates = search.search_parameters(frontend)
    assert [name for name, _ in frontend.named_parameters() if is_of_merging(frontend, name)] == [
        f"blocks.{layer}.after_attention.{part}.logits" for layer in range(1, 6) for part in ("prune", "merge")
    ]
    optimizer, before = torch.optim.Adam(rates, lr=0.05), search.search_flops(frontend).item()
    for step in range(150):
        loss = 1e2 * (search.search_flops(frontend) / whole - 0.6).square()
        if step == 0:  # the task's gradient reaches every choice through the masks
            task = frontend(video()).pooled.square().mean() + frontend(video()).tokens[:, :1].square().mean()
            given = torch.autograd.grad(task, rates, allow_unused=True, retain_graph=True)
            assert all(g is not None and g.isfinite().all() and g.any() for g in given[:-2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = search.search_flops(frontend).item()
    assert before > 0.9 * whole and abs(after - 0.6 * whole) < 0.02 * whole
    found = search.found(frontend)
    shape = frontend.shape
    counted = search.flops(*found.values(), shape.tokens, shape.width, 3 * shape.patch_size**2, shape.embed_dim)
    assert 0.9 * after < counted.item() <= after and found["merge_kept"][0] == 17
    frontend.save_pretrained(tmp_path)
    assert search.found(VisualFrontend.from_pretrained(tmp_path)) == found


def test_the_first_block_and_the_cls_token_stay() -> None:
    frontend = searching()
    for step in search.search_steps(frontend)[1:]:
        choose(step.prune, 1)
        choose(step.merge, 1)
    states: list[TokenState] = []
    for block in frontend.blocks:
        block.register_forward_hook(lambda _, __, state: states.append(state))
    output = frontend(video(), trace_source=True)
    assert states[0].weight is None
    for state in states[1:]:
        assert (state.weight[:, :2] >= 1).all() and (state.weight[:, 2:] < 1e-3).all()
    assert (output.size == 1).all() and (output.source.sort(1).values == torch.arange(FRAMES * 17)).all()


def test_what_is_gone_is_not_ranked_again() -> None:
    """Even if the CLS token attended to it most."""
    step = search.SearchStep(4, 1)
    choose_all = torch.tensor([0.0, 30, -30, -30])  # three of four
    with torch.no_grad():
        step.prune.logits.copy_(choose_all)
    keys = torch.zeros(1, 1, 5, 2)
    keys[0, 0, 1:] = torch.tensor([[9.0, 0], [1, 0], [2, 0], [3, 0]])
    state = TokenState.start(torch.randn(1, 5, 3), 1, 1, trace_source=True)
    weight = torch.tensor([1.0, search.GONE, 1, 1, 1]).view(1, 5, 1)
    state = state.regroup(state.x, state.size, lambda: state.source, lambda: state.source, weight=weight)
    after = step(state, AttentionContext(keys, torch.ones_like(keys), state.attention_bias))
    assert after.origin.tolist() == [[0, 4, 3, 2, 1]]
