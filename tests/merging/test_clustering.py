"""Clustering: small cases by hand, ties, and what CenterCLIP's settings come to."""

from __future__ import annotations

import pytest
import torch
from towers import TINY, random_video

from tempme_vl import create_frontend, make_schedule
from tempme_vl.compressors import FrameFeatures
from tempme_vl.integrations.reduction import make_plan, merge
from tempme_vl.merging.centerclip import Clustering

POINTS = torch.tensor([[[0.0], [1.0], [9.0], [10.0], [12.0], [30.0]]])


def test_the_start_and_the_medoids_by_hand() -> None:
    """From 30, then 0, then 12: clusters 0 1 | 9 10 12 | 30; of two points the first is the medoid."""
    assigned, medoids = Clustering()(POINTS, 3, 1)
    assert medoids.tolist() == [[0, 3, 5]] and assigned.tolist() == [[0, 0, 1, 1, 1, 2]]
    assigned, medoids = Clustering("spectral")(POINTS, 3, 1)
    assert assigned.tolist() == [[0, 0, 1, 1, 1, 2]]
    assigned, medoids = Clustering(iterations=1)(POINTS.flip(1), 3, 1)
    assert medoids.tolist() == [[0, 2, 4]]


@pytest.mark.parametrize("clustering", [Clustering(), Clustering(distance="cosine"), Clustering("spectral")])
def test_a_still_video_keeps_its_first_frame(clustering: Clustering) -> None:
    """Both frames have the same tokens; rounding must not choose between them."""
    frame = torch.randn(3, 40, 64, generator=torch.Generator().manual_seed(0)) / 8
    for dtype in (torch.float32, torch.float64):
        assigned, medoids = clustering(frame.to(dtype).repeat(1, 2, 1), 40, 2)
        assert torch.equal(medoids, torch.arange(40).expand(3, -1))
        assert torch.equal(assigned, torch.arange(40).repeat(2).expand(3, -1))


def test_the_papers_segments() -> None:
    for tokens, join, gflops, left in ((50, 2, 40.08, 6 * 50), (50, 3, 35.78, 4 * 50), (197, 2, None, 6 * 161)):
        schedule = make_schedule("centerclip", 12, 12, tokens, merge_frames=(join,))
        assert schedule.output_tokens == left and schedule.plan[6].join == join
        if gflops is not None:  # counted without clustering
            assert schedule.gflops() == pytest.approx(gflops, rel=3e-3)
    assert make_schedule("centerclip", 12, 12, 50) == make_schedule("centerclip", 12, 12, 50, merge_frames=(2,))


def test_a_segments_embedding_is_real_if_one_of_its_frames_is() -> None:
    torch.manual_seed(0)
    frontend = create_frontend(
        TINY, method="centerclip", num_frames=4, clusters=8, merge_layers=(2,), merge_frames=(2,)
    )
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0]])
    output = frontend(random_video(4), mask)
    unit = torch.nn.functional.normalize(output.frames, dim=-1)
    assert output.frames.shape == (2, 2, 64)
    torch.testing.assert_close(output.pooled, torch.stack([unit[0, 0], unit[1].mean(0)]))


def test_behind_a_tower_means_stand_where_their_medoids_stood() -> None:
    torch.manual_seed(0)
    frames = FrameFeatures(torch.randn(4, 6, 8), (2, 3))
    kept = merge(frames, make_plan("centerclip", 4, (2, 3), {"percent": 50}))
    means = merge(frames, make_plan("centerclip", 4, (2, 3), {"percent": 50, "centers": "mean"}))
    assert kept.x.shape == means.x.shape == (6, 8) and torch.equal(kept.source, means.source)
    assert torch.equal(kept.x, frames.x.flatten(0, 1)[kept.source]) and not torch.allclose(kept.x, means.x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": 33}, "block 3 has 32 patches to cluster in a joined clip; got clusters=33"),
        ({"clusters": (3, 4)}, "one number of joined clips and of clusters a block"),
        ({"clusters": 3, "merge_layers": (6,)}, r"merge_layers must ascend within 0\.\.5; got \(6,\)"),
        ({"clusters": 3, "merge_frames": (4,)}, r"6 frames do not divide by the joins \[4\]"),
        ({"clusters": 3, "algorithm": "kmeans"}, "method 'centerclip', 'algorithm': expected .*kmedoids"),
        ({"clusters": 3, "sigma": 0.0}, "method 'centerclip', 'sigma': expected a number"),
    ],
)
def test_refusals(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_frontend(TINY, method="centerclip", num_frames=6, **options)
