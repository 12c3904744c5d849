"""Counts told ahead are those that come out, and a share is kept.

Every compressor here works on any number of frames, of any grid; where its rule cannot, it says why.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch

from tempme_vl.compressors import COMPRESSORS, FrameFeatures, dtd, dycoke, evs, storm, vidcom2, visionzip
from tempme_vl.compressors.base import Grid
from tempme_vl.schema import ConfigError

WIDTH = 6
NAMES = ["evs", "vidcom2", "dycoke", "dtd", "visionzip", "storm", "fastvid"]
each_name = pytest.mark.parametrize("name", NAMES)

# options at random, with which the data decide nothing
DRAWN: dict[str, Callable[[random.Random], Any]] = {
    "evs": lambda at: evs.Options(at.random()),
    "vidcom2": lambda at: vidcom2.Options(at.random()),
    "dycoke": lambda at: dycoke.Options(at.random()),
    "dycoke, public code": lambda at: dycoke.Options(at.random(), public_code=True),
    "dtd": lambda at: dtd.Options(retention=at.random()),
    "dtd, pixels": lambda at: dtd.Options("pixel", retention=at.choice((0.1, 0.2, 0.25, 0.8, 1.0))),
    "visionzip": lambda at: visionzip.Options(at.uniform(0.5, 1), at.random()),
    "storm": lambda at: storm.Options(at.randint(1, 5), at.choice(("average", "sample")), at.choice(SPATIAL)),
}
SPATIAL = ("none", "floor", "ceil", "bilinear")
# a step of what `keep` can choose, in tokens; STORM has steps of its own
STEPS: dict[str, Callable[[int], int]] = {
    "evs": lambda frames: 1,
    "vidcom2": lambda frames: 1,
    "dycoke": lambda frames: frames - (frames + 3) // 4,
    "dtd": lambda frames: frames - 1,
    "visionzip": lambda frames: frames,
    "fastvid": lambda frames: frames,
}


def video(frames: int, grid: Grid, seed: int = 0) -> FrameFeatures:
    """With all that a compressor may read."""
    generator = torch.Generator().manual_seed(seed)
    shape = frames, prod(grid)

    def values(*more: int) -> torch.Tensor:
        return torch.randn(*shape, *more, generator=generator)

    x, deeper = values(WIDTH), (values(WIDTH), values(WIDTH))
    summary = torch.randn(frames, 4, generator=generator), values().softmax(-1)
    return FrameFeatures(x, grid, deeper, values().softmax(-1), summary, values(3), values(2, 5).sigmoid())


@pytest.mark.parametrize("way", DRAWN)
def test_the_count_is_known_ahead(way: str) -> None:
    at, record = random.Random(way), COMPRESSORS[way.partition(",")[0]]
    assert record.count is not None
    for seed in range(40):
        frames = at.randint(5 if "public" in way else 1, 11)
        grid = at.randint(2, 6), at.randint(2, 6)
        options = DRAWN[way](at)
        left = record.compress(video(frames, grid, seed), options)
        assert record.count(frames, grid, options) == len(left.x) == len(left.source), (frames, grid, options)
        assert len(set(left.source.tolist())) == len(left.source)


@each_name
@pytest.mark.parametrize(
    ("frames", "grid"), [(1, (4, 4)), (2, (3, 5)), (3, (1, 6)), (5, (2, 2)), (9, (4, 3)), (1, (1, 1))]
)
def test_every_video_has_something_left(name: str, frames: int, grid: Grid) -> None:
    record, features = COMPRESSORS[name], video(frames, grid)
    half = {"retention": 1 if prod(grid) == 1 else 0.5} if name != "storm" else {}
    left = record.compress(features, record.options(**half))
    assert 0 < len(left.x) <= frames * prod(grid)
    assert left.x.isfinite().all() and left.x.shape[1] == WIDTH
    assert left.source.min() >= 0 and left.source.max() < frames * prod(grid)


@each_name
def test_a_still_video_is_no_trouble(name: str) -> None:
    features = video(6, (4, 4))
    x = features.x[:1, :1].expand_as(features.x)
    record = COMPRESSORS[name]
    left = record.compress(replace(features, x=x, summary=(x[:, 0], torch.full((6, 16), 1 / 16))), record.options())
    assert torch.isfinite(left.x).all() and len(left.x)
    if name != "visionzip":  # whose targets are sums of two
        assert (left.x - x[0, 0]).abs().max() < 1e-6


@each_name
def test_features_for_deeper_layers_are_of_the_tokens_that_are_left(name: str) -> None:
    features, record = video(5, (4, 4)), COMPRESSORS[name]
    options = storm.Options(2, "sample") if name == "storm" else record.options()
    left = record.compress(features, options)
    assert len(left.deeper) == 2
    for given, kept in zip(features.deeper, left.deeper, strict=True):
        assert torch.equal(kept, torch.stack([given[i // 16, i % 16] for i in left.source.tolist()]))


@each_name
def test_half_precision_decides_as_float32_does(name: str) -> None:
    features, record = video(6, (4, 4)), COMPRESSORS[name]
    half = replace(features, x=features.x.bfloat16())
    left, wide = (record.compress(each, record.options()) for each in (half, replace(half, x=half.x.float())))
    assert torch.equal(left.source, wide.source)
    assert left.x.dtype == torch.bfloat16 and torch.equal(left.x, wide.x.bfloat16())


@pytest.mark.parametrize("name", STEPS)
def test_a_share_is_kept_and_used(name: str) -> None:
    at, record = random.Random(name), COMPRESSORS[name]
    assert record.keep is not None
    for seed in range(40):
        frames, grid = at.randint(1, 12), (at.randint(2, 7), at.randint(2, 7))
        tokens = frames * prod(grid)
        most = at.randint(max(prod(grid) * ((frames + 3) // 4), frames), tokens)  # what every method can do
        if name in ("evs", "dtd"):
            most = max(most, prod(grid))
        options = record.options(**record.keep(most / tokens, frames, grid))
        features = video(frames, grid, seed)
        if record.count is None:
            assert len(record.compress(features, options).x) <= most
            assert most - frames < frames * int(options.retention * prod(grid)) <= most
        else:
            count = record.count(frames, grid, options)
            assert count == len(record.compress(features, options).x) <= most
            assert most - count < max(1, STEPS[name](frames))


@pytest.mark.parametrize(
    ("share", "frames", "grid", "options"),
    [
        (1.0, 8, (7, 7), {"frames": 1, "spatial": "none"}),
        (0.5, 8, (7, 7), {"frames": 2, "spatial": "none"}),
        (0.34, 8, (7, 7), {"frames": 1, "spatial": "ceil"}),  # 128 of 392, and 98 with every fourth frame
        (0.3, 9, (4, 4), {"frames": 1, "spatial": "ceil"}),
        (0.4, 1, (4, 4), {"frames": 1, "spatial": "ceil"}),
        (0.04, 8, (4, 4), {"frames": 8, "spatial": "ceil"}),
    ],
)
def test_storm_comes_nearest_to_a_share_in_time_or_in_space(
    share: float, frames: int, grid: Grid, options: dict[str, Any]
) -> None:
    assert storm.keep(share, frames, grid) == options


@pytest.mark.parametrize(
    ("name", "share", "reason"),
    [
        ("evs", 15 / 128, "first frame stays whole"),
        ("vidcom2", 7 / 128, "as many tokens stay as there are frames"),
        ("dycoke", 31 / 128, "every fourth frame stays whole"),
        ("dtd", 15 / 128, "first frame stays whole"),
        ("visionzip", 7 / 128, "each frame keeps a token"),
        ("storm", 3 / 128, "half the rows and columns"),
        ("fastvid", 7 / 128, "a budget of a token"),
        ("evs", 1.1, "got 1.1"),
    ],
)
def test_a_share_that_cannot_be_kept_is_refused(name: str, share: float, reason: str) -> None:
    keep = COMPRESSORS[name].keep
    assert keep is not None
    with pytest.raises(ValueError, match=f"expected a share.*{reason}"):
        keep(share, 8, (4, 4))
    if share < 1:
        keep(share + 1 / 128, 8, (4, 4))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("evs", {"retention": 1.5}),
        ("vidcom2", {"exact": 1}),
        ("dycoke", {"retention": -0.1}),
        ("dtd", {"by": "colour"}),
        ("dtd", {"threshold": 2.0}),
        ("visionzip", {"dominant": float("nan")}),
        ("storm", {"frames": 0}),
        ("storm", {"spatial": "max"}),
        ("fastvid", {"anchor_step": 0}),
        ("fastvid", {"rule": "qwen"}),
    ],
)
def test_options_out_of_bounds_are_refused(name: str, options: dict[str, Any]) -> None:
    record = COMPRESSORS[name]
    with pytest.raises(ConfigError, match=f"method '{name}', '{next(iter(options))}'"):
        record.compress(video(2, (2, 2)), record.options(**options))


@pytest.mark.parametrize("name", ["visionzip", "fastvid"])
def test_a_retention_without_a_token_is_refused(name: str) -> None:
    record = COMPRESSORS[name]
    with pytest.raises(ValueError, match=r"at least one of its 9 tokens.*got 0\.1"):
        record.compress(video(3, (3, 3)), record.options(retention=0.1))


@pytest.mark.parametrize(
    ("name", "options", "missing"),
    [
        ("visionzip", {}, "received, keys"),
        ("fastvid", {}, "summary"),
        ("dtd", {"by": "pixel"}, "pixels"),
    ],
)
def test_features_without_what_is_read_are_refused(name: str, options: dict[str, Any], missing: str) -> None:
    record = COMPRESSORS[name]
    given = record.options(**{"retention": 0.5, **options})
    assert ", ".join(record.reads_with(given)) == missing
    with pytest.raises(ValueError, match=f"expected features with {missing},"):
        record.compress(FrameFeatures(torch.randn(2, 4, 3), (2, 2)), given)
