"""The contrastive loss on one rank; what several ranks compute is in tests/distributed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tempme_vl.tasks.losses import contrastive_loss, gather_rows

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
