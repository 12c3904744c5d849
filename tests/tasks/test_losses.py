"""The losses on one rank; what several ranks compute is in tests/distributed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tempme_vl.tasks.losses import (
    Temperature,
    contrastive_loss,
    draw_negatives,
    gather_rows,
    matching_loss,
    negative_weights,
    same_pairs,
    soft_contrastive_loss,
)

SCALE = torch.tensor(7.0, dtype=torch.float64)


def features(count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    video, text = torch.randn(2, count, 5, generator=generator, dtype=torch.float64)
    return F.normalize(video, dim=-1).requires_grad_(), F.normalize(text, dim=-1).requires_grad_()


def ids(*values: int) -> Tensor:
    return torch.tensor(values)


def plain(video: Tensor, text: Tensor) -> Tensor:
    logits, target = SCALE * video @ text.T, torch.arange(len(video))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@pytest.mark.parametrize("given", [(None, None, None), (torch.arange(6), torch.arange(6), torch.ones(6).bool())])
def test_equals_cross_entropy_when_all_differ(given: tuple) -> None:
    video, text = features()
    torch.testing.assert_close(contrastive_loss(video, text, SCALE, *given), plain(video, text))


def test_one_direction_alone() -> None:
    video, text = features()
    own = torch.arange(len(video))
    by_video = contrastive_loss(video, text, torch.tensor(4.0), weights=(1.0, 0.0))
    by_text = contrastive_loss(video, text, torch.tensor(4.0), weights=(0.0, 1.0))
    torch.testing.assert_close(by_video, F.cross_entropy(4 * video @ text.T, own))
    torch.testing.assert_close(by_text, F.cross_entropy(4 * text @ video.T, own))


def test_the_same_video_or_caption_is_no_negative() -> None:
    """Pairs 0 and 3 share their video, 1 and 4 their caption: no gradient between them, in either direction."""
    for video_ids, text_ids, (i, j) in (
        (ids(0, 1, 2, 0, 4, 5), torch.arange(6), (0, 3)),
        (torch.arange(6), ids(0, 1, 2, 3, 1, 5), (1, 4)),
    ):
        video, text = features()
        logits = (SCALE * video @ text.T).detach().requires_grad_()
        # the loss takes features; unit rows on one side make its logits these
        contrastive_loss(logits, torch.eye(6).double(), torch.ones(()), video_ids, text_ids).backward()
        zero = (logits.grad == 0).nonzero().tolist()
        assert zero == [[i, j], [j, i]]


def test_excluded_pairs_leave_the_denominator() -> None:
    video, text = features(3)
    logits = (SCALE * video @ text.T).detach()
    loss = contrastive_loss(video, text, SCALE, ids(0, 1, 0))
    rows = [logits[0, [0, 1]], logits[1], logits[2, [1, 2]]]
    columns = [logits[[0, 1], 0], logits[:, 1], logits[[1, 2], 2]]
    own = [0, 1, 1]
    terms = [part.logsumexp(0) - part[i] for parts in (rows, columns) for part, i in zip(parts, own, strict=True)]
    torch.testing.assert_close(loss.detach(), torch.stack(terms).mean())


def test_all_of_one_video_is_no_contrast() -> None:
    video, text = features()
    loss = contrastive_loss(video, text, SCALE, ids(*[3] * 6))
    loss.backward()
    assert loss == 0 and not video.grad.any() and not text.grad.any()


def test_unread_videos_have_no_influence() -> None:
    video, text = features()
    valid = torch.tensor([True, True, False, True, False, True])
    loss = contrastive_loss(video, text, SCALE, torch.arange(6), torch.arange(6), valid)
    torch.testing.assert_close(loss, plain(video[valid], text[valid]))
    loss.backward()
    assert not video.grad[~valid].any() and not text.grad[~valid].any()
    assert video.grad[valid].any(1).all() and text.grad[valid].any(1).all()
    other = video.detach().clone()
    other[~valid] *= -100
    assert torch.equal(contrastive_loss(other, text, SCALE, valid=valid), loss)


def test_nothing_valid_gives_zero() -> None:
    video, text = features()
    loss = contrastive_loss(video, text, SCALE, valid=torch.zeros(6, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and not video.grad.any() and not text.grad.any()


def test_order_of_the_pairs_does_not_matter() -> None:
    video, text = features()
    order = torch.randperm(6)
    video_ids, valid = ids(0, 1, 0, 3, 4, 5), torch.tensor([True] * 5 + [False])
    loss = contrastive_loss(video, text, SCALE, video_ids, valid=valid)
    again = contrastive_loss(video[order], text[order], SCALE, video_ids[order], valid=valid[order])
    torch.testing.assert_close(loss, again)


def test_gradient_is_right() -> None:
    video, text = features(4)
    scale = SCALE.clone().requires_grad_()
    valid = torch.tensor([True, True, True, False])
    check = lambda v, t, s: contrastive_loss(v, t, s, ids(0, 1, 0, 3), ids(0, 1, 2, 2), valid)  # noqa: E731
    assert torch.autograd.gradcheck(check, (video, text, scale))


def test_one_process_gathers_its_own_rows() -> None:
    rows = torch.randn(3, 2)
    assert gather_rows(rows) is rows


TEMPERATURE = 1 / SCALE


def test_soft_targets_of_different_ids_are_plain_cross_entropy() -> None:
    video, text = features()
    loss = soft_contrastive_loss(video, text, TEMPERATURE, same_pairs(torch.arange(6)))
    torch.testing.assert_close(loss, plain(video, text))


def test_soft_targets_are_uniform_over_equal_ids() -> None:
    """As torch's cross-entropy with probabilities as targets says, in both directions."""
    video, text = features()
    targets = torch.eye(6).double()
    targets[0, 3] = targets[3, 0] = targets[0, 0] = targets[3, 3] = 0.5
    targets[1:3, 1:3] = 0.5
    logits = SCALE * video @ text.T
    expected = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    assert not torch.isclose(expected, plain(video, text))
    loss = soft_contrastive_loss(video, text, TEMPERATURE, same_pairs(ids(0, 1, 1, 0, 4, 5)))
    torch.testing.assert_close(loss, expected)


def test_soft_loss_leaves_unread_videos_out() -> None:
    video, text = features()
    video = video.detach()
    valid, names = torch.tensor([True, True, False, True, False, True]), ids(0, 1, 1, 0, 0, 5)
    expected = soft_contrastive_loss(video[valid], text[valid], TEMPERATURE, same_pairs(names[valid]))
    video[~valid] = torch.nan
    video.requires_grad_()
    loss = soft_contrastive_loss(video, text, TEMPERATURE, same_pairs(names), valid)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for grad in (video.grad, text.grad):
        assert not grad[~valid].any() and grad[valid].any(1).all()


def test_soft_loss_with_nothing_valid_is_zero() -> None:
    video, text = features()
    loss = soft_contrastive_loss(
        video, text, TEMPERATURE, same_pairs(torch.arange(6)), torch.zeros(6, dtype=torch.bool)
    )
    loss.backward()
    assert loss == 0 and not video.grad.any() and not text.grad.any()


def test_soft_loss_does_not_hide_nan() -> None:
    video, text = features()
    broken = video.detach().index_fill(0, ids(2), torch.nan)
    assert soft_contrastive_loss(broken, text, TEMPERATURE, same_pairs(torch.arange(6))).isnan()


def test_gradient_of_soft_loss_is_right() -> None:
    video, text = features(4)
    temperature = TEMPERATURE.clone().requires_grad_()
    valid = torch.tensor([True, True, True, False])
    check = lambda v, t, s: soft_contrastive_loss(v, t, s, same_pairs(ids(0, 1, 0, 1)), valid)  # noqa: E731
    assert torch.autograd.gradcheck(check, (video, text, temperature))


def test_negative_weights_are_the_softmax_but_for_equal_ids() -> None:
    similarity = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weights = negative_weights(similarity, same_pairs(ids(0, 1, 0, 3)))
    same = torch.eye(4).bool()
    same[0, 2] = same[2, 0] = True
    assert not weights[same].any() and not weights.requires_grad
    torch.testing.assert_close(weights[~same], similarity.softmax(1)[~same].detach())


def test_weights_stay_drawable_when_the_positive_takes_all() -> None:
    """The lowest temperature reaches this: a cosine of 1 is then 1000."""
    weights = negative_weights(1000 * torch.eye(3), same_pairs(torch.arange(3)))
    assert weights[~torch.eye(3).bool()].all()
    draw = torch.Generator().manual_seed(0)
    drawn = torch.stack([draw_negatives(weights, draw) for _ in range(20)])
    assert (drawn != torch.arange(3)).all() and all(len(column.unique()) == 2 for column in drawn.T)


def test_unread_videos_are_no_negatives_and_have_none() -> None:
    similarity = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    valid = torch.tensor([True, False, True, True])
    expected = negative_weights(similarity[valid][:, valid], same_pairs(torch.arange(3)))
    similarity[1] = similarity[:, 1] = torch.nan
    weights = negative_weights(similarity, same_pairs(torch.arange(4)), valid)
    assert torch.equal(weights[valid][:, valid], expected)
    assert not weights[~valid].any() and not weights[:, ~valid].any()


def test_negatives_come_as_often_as_their_weights_say() -> None:
    weights = torch.tensor([[0.0, 3.0, 1.0], [0.0, 0.0, 2.0], [1.0, 1.0, 0.0]])
    draw = torch.Generator().manual_seed(0)
    drawn = torch.stack([draw_negatives(weights, draw) for _ in range(2000)])
    assert drawn.dtype == torch.int64
    share = F.one_hot(drawn, 3).double().mean(0)
    torch.testing.assert_close(share, (weights / weights.sum(1, keepdim=True)).double(), atol=0.04, rtol=0)
    assert torch.equal(share == 0, weights == 0)


def test_same_generator_same_negatives() -> None:
    weights = torch.rand(16, 16, generator=torch.Generator().manual_seed(0))
    first, again, other = (draw_negatives(weights, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_query_without_negative_draws_itself_and_no_other_does() -> None:
    for names, alone in ((ids(7, 7, 7), [True] * 3), (ids(7), [True]), (ids(7, 7, 8), [False] * 3)):
        drawn = draw_negatives(negative_weights(torch.zeros(len(names), len(names)), same_pairs(names)))
        assert (drawn == torch.arange(len(names))).tolist() == alone
    valid = torch.tensor([True, False, True])
    assert draw_negatives(negative_weights(torch.zeros(3, 3), same_pairs(torch.arange(3)), valid)).tolist() == [2, 1, 0]


def test_matching_loss_is_the_mean_over_positives_and_negatives() -> None:
    logits = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    no_match, match = -logits.log_softmax(1).T
    torch.testing.assert_close(matching_loss(logits), (match[:2].sum() + no_match[2:].sum()) / 6)


def test_pairs_that_are_not_valid_do_not_count() -> None:
    logits = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    no_match, match = -logits.log_softmax(1).T
    valid = torch.tensor([True, False, True, True, True, False])
    expected = (match[0] + no_match[2:5].sum()) / 4
    logits[~valid] = torch.nan
    logits.requires_grad_()
    loss = matching_loss(logits, valid)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert not logits.grad[~valid].any() and logits.grad[valid].all()
    assert matching_loss(logits, torch.zeros(6, dtype=torch.bool)) == 0


@pytest.mark.parametrize("shape", [(4, 2), (6, 3), (6,)])
def test_matching_loss_names_a_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \(3 B, 2\) logits"):
        matching_loss(torch.zeros(shape))


@pytest.mark.parametrize(("value", "limited"), [(0.07, 0.07), (0.0, 0.001), (-3.0, 0.001), (2.0, 0.5)])
def test_temperature_is_limited_in_value_but_not_in_gradient(value: float, limited: float) -> None:
    module = Temperature(value)
    temperature = module()
    assert temperature.shape == () and temperature == torch.tensor(limited)
    temperature.backward()
    assert module.temperature.grad.tolist() == [1.0]


def test_temperature_starts_at_the_published_value() -> None:
    assert Temperature()().item() == pytest.approx(0.07)
    assert Temperature().half()().dtype == torch.float32
