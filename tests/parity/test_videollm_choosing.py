"""Compressors of single tokens, frames and segments equal their original implementations: every decision and value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from parity.cases import Case, assert_close, find
from torch import Tensor

from tempme_vl.compressors import FrameFeatures, KeptFeatures, dtd, dycoke, evs, fastvid, storm, vidcom2, visionzip
from tempme_vl.compressors.peaks import density_peaks, neighbour_similarity, segments

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def each(pattern: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", find("videollm", pattern), ids=str)


def given(case: Case) -> dict[str, Any]:
    return case.config["config"]


def features(case: Case, **readings: Any) -> FrameFeatures:
    """With the case's grid, or one row where it has none."""
    x = case.tensors["in.x"]
    rows, columns = given(case).get("grid", (1, x.shape[1]))
    return FrameFeatures(x, (rows, columns), **readings)


def assert_left(left: KeptFeatures, case: Case, source: str = "out.keep") -> None:
    assert torch.equal(left.source, case.tensors[source])
    assert_close(left.x, case.tensors["out.tokens"], "tokens", case.config["tol"])


@each("evs*")
def test_efficient_video_sampling(case: Case) -> None:
    t, frames = case.tensors, features(case)
    assert_close(evs.similarity(frames.x), t["out.similarity"], "similarity", case.config["tol"])
    left = evs.compress(frames, evs.Options(1 - given(case)["q"]))
    assert_left(left, case)
    assert torch.equal(t["out.mrope"][left.source], t["out.mrope_kept"])


@each("vidcom2*")
def test_vidcom2(case: Case) -> None:
    t, frames, share = case.tensors, features(case), given(case)["R_RATIO"]
    assert torch.equal(vidcom2.steady_channels(frames.x).sort().values, t["out.channels"])
    like = vidcom2.likeness(frames.x)
    assert_close(like.video, t["out.video_score"], "likeness to the video", case.config["tol"])
    assert_close(like.frame, t["out.frame_score"], "likeness to the frame", case.config["tol"])
    scales = vidcom2.frame_scales(like.video, share)
    assert_close(scales, t["out.scales"], "scales", case.config["tol"])
    assert torch.equal(vidcom2.frame_counts(scales, frames.x.shape[1]), t["out.per_frame"])
    assert_left(vidcom2.compress(frames, vidcom2.Options(share, exact=False)), case)
    assert torch.equal(vidcom2.compress(frames, vidcom2.Options(share)).source, t["out.vllm_keep"])


@each("dycoke*")
def test_dycoke(case: Case) -> None:
    options = dycoke.Options(1 - given(case)["k"], public_code=True)
    assert_left(dycoke.compress(features(case), options), case, "out.source")


@each("dtd*")
def test_differential_token_drop(case: Case) -> None:
    config, frames = given(case), features(case)
    by, value = config["method"], config["threshold"]
    if by == "pixel":
        pixels = dtd.pixels_of_patches(case.tensors["in.pixels"], frames.grid, CLIP_MEAN, CLIP_STD)
        frames = features(case, pixels=pixels)
    options = dtd.Options(by, value) if config["absolute"] else dtd.Options(by, retention=1 - value)
    left = dtd.compress(frames, options)
    assert_left(left, case)
    # (t, h, w) behind the text, whose last token opens the video
    before = config["text_before"]
    row, column = case.tensors["out.positions"][1:, before : before + len(left.source)] - before
    assert torch.equal(left.source % frames.x.shape[1], row * frames.grid[1] + column)


@each("visionzip_siglip*")
def test_visionzip_without_cls(case: Case) -> None:
    t, config = case.tensors, given(case)
    frames = features(case, received=t["in.attn"], keys=t["in.metric"])
    count, tokens, _ = frames.x.shape
    options = visionzip.Options((config["SPATIAL_TOKENS"] + 0.5) / tokens, config["DOMINANT_RATIO"])
    left = visionzip.compress(frames, options)
    assert_close(left.x.unflatten(0, (count, -1)), t["out.tokens"], "tokens", case.config["tol"])

    first = config["dominant"]
    others = visionzip.rest(t["out.dominant"], tokens)
    own = tokens * torch.arange(count).unsqueeze(1)
    expected = torch.cat([t["out.dominant"], others[:, t["out.targets"]]], dim=1) + own
    assert torch.equal(left.source.view(count, -1), expected)
    assert torch.equal(visionzip.dominant(t["in.attn"], first), t["out.dominant"])
    gathered = visionzip.gather(taken(frames.x, others), taken(t["in.metric"], others), config["contextual"])
    assert torch.equal(gathered.assigned, t["out.assign"])


@each("visionzip_clip*")
def test_visionzip_with_cls(case: Case) -> None:
    t, config = case.tensors, given(case)
    x, number = t["out.hidden"], config["contextual"]
    chosen = visionzip.dominant_with_cls(t["out.cls_attention"], config["dominant"])
    assert torch.equal(chosen, t["out.dominant"])
    others = visionzip.rest(chosen, x.shape[1])
    assert visionzip.targets(others.shape[1], number) == t["out.targets"].tolist()
    gathered = visionzip.gather(taken(x, others), taken(t["out.metric"], others), number)
    assert torch.equal(gathered.assigned, t["out.assign"])
    left = torch.cat([taken(x, chosen), gathered.x], dim=1)
    assert_close(left, t["out.tokens"], "tokens", case.config["tol"])


def taken(x: Tensor, places: Tensor) -> Tensor:
    return torch.stack([row[at] for row, at in zip(x, places, strict=True)])


def fastvid_options(config: Mapping[str, Any], rule: Any) -> fastvid.Options:
    named = {"segments": "c", "threshold": "tau", "context": "d", "anchor_step": "p", "own": "beta", "ignore": "ignore"}
    options = {ours: config[theirs] for ours, theirs in named.items() if theirs in config}
    return fastvid.Options(config["retention_ratio"], **options, rule=rule)


def assert_segments(case: Case, summary: Tensor, options: fastvid.Options) -> list[range]:
    alike = neighbour_similarity(summary)
    assert_close(alike, case.tensors["out.transition"], "transitions", case.config["tol"])
    found = segments(fastvid.cuts(alike, options.segments, options.threshold), len(summary))
    assert [len(segment) for segment in found] == case.tensors["out.segments"].tolist()
    return found


@each("fastvid_ov*")
def test_fastvid_for_llava_onevision(case: Case) -> None:
    t, options = case.tensors, fastvid_options(given(case), "llava_onevision")
    found = assert_segments(case, t["in.glob"], options)
    frames = features(case, summary=(t["in.glob"], t["in.attn"]))
    assert_left(fastvid.compress(frames, options), case)

    tokens, alike = frames.x.shape[1], t["out.transition"]
    parts = [fastvid.budgets(segment, alike, tokens, options) for segment in found]
    budget = {frame: of for part in parts for frame, of in part.items()}
    assert [budget[frame].context for frame in range(len(frames.x))] == t["out.anchors_per_frame"].tolist()
    for frame, x in enumerate(frames.x):
        chosen = fastvid.salient(t["in.attn"][frame], budget[frame].salient)
        assert torch.equal(chosen, t["out.salient"][frame])
        others = sorted(set(range(tokens)) - set(chosen.tolist()))
        assert others == t["out.filtered"][frame].tolist()
        peaks = density_peaks(x[others], 4)
        assert_close(peaks.density, t["out.density"][frame], "density", case.config["tol"])
        assert_close(peaks.score, t["out.score"][frame], "score", case.config["tol"])


@each("fastvid_qwen*")
def test_fastvid_for_qwen(case: Case) -> None:
    options = fastvid_options(given(case), "qwen2_5_vl")
    summary = case.tensors["in.x"].mean(dim=1)
    assert_segments(case, summary, options)
    assert_left(fastvid.compress(features(case, summary=(summary, case.tensors["in.attn"])), options), case)


@each("fastvid_llavavideo*")
def test_fastvid_for_llava_video(case: Case) -> None:
    """The original counts a newline behind each row, which stays with any token of its row."""
    t, options = case.tensors, fastvid_options(given(case), "llava_video")
    assert_segments(case, t["in.glob"], options)
    left = fastvid.compress(features(case, summary=(t["in.glob"], t["in.attn"])), options)
    side = 13  # of the original's grid
    rows = torch.div(left.source, side, rounding_mode="floor")
    stays = torch.cat([left.source + rows, rows.unique() * (side + 1) + side])
    newlines = t["in.newline"].flatten().expand(len(rows.unique()), -1)
    order = stays.argsort()
    assert torch.equal(stays[order], t["out.keep"])
    assert_close(torch.cat([left.x, newlines])[order], t["out.tokens"], "tokens", case.config["tol"])


REDUCTIONS = {
    "avg2_floor": storm.Options(1, spatial="floor"),
    "avg2_ceil": storm.Options(1, spatial="ceil"),
    "bilinear2": storm.Options(1, spatial="bilinear"),
}


@each("plain*")
def test_reductions_in_space(case: Case) -> None:
    for name, options in REDUCTIONS.items():
        expected = case.tensors[f"out.{name}"]
        left = storm.compress(features(case), options)
        assert_close(left.x, expected.flatten(0, 1), name, case.config["tol"])


@each("plain*")
def test_reductions_in_time(case: Case) -> None:
    t, step, frames = case.tensors, given(case)["temporal_stride"], features(case)
    mean = storm.compress(frames, storm.Options(step))
    assert_close(mean.x, t["out.temporal_avg"].flatten(0, 1), "mean", case.config["tol"])
    one = storm.compress(frames, storm.Options(step, "sample"))
    assert_close(one.x, t["out.temporal_sample"].flatten(0, 1), "sample", case.config["tol"])
    tokens = frames.x.shape[1]
    places = t["out.temporal_sample_index"].unsqueeze(1) * tokens + torch.arange(tokens)
    assert torch.equal(one.source, places.flatten()) and torch.equal(mean.source, one.source)
