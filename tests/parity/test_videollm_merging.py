"""Compressors in front of a language model equal their original implementations: decisions exactly, values closely."""

from __future__ import annotations

from math import isqrt

import pytest
import torch
from parity.cases import Case, assert_close, find
from torch import Tensor

from tempme_vl.compressors import (
    FrameFeatures,
    flashvid,
    framefusion,
    holitom,
    holitom_inner,
    prunevid,
    scissor,
    sttm,
    unicomp,
)
from tempme_vl.compressors.inner import whole

FLASHVID = find("videollm", "flashvid*")
HOLITOM = [case for case in find("videollm", "holitom*") if "in.attn" in case.tensors]
INNER = find("videollm", "holitom_inner*")
PRUNEVID = find("videollm", "prunevid*")
SCISSOR = find("videollm", "scissor*")
STTM = find("videollm", "sttm*")
UNICOMP = find("videollm", "unicomp*")
FRAMEFUSION = find("videollm", "framefusion*")


def flashvid_options(case: Case) -> flashvid.Options:
    c = case.config["config"]
    whole, complement = not c["do_segment"], c["complementary_segment"]
    return flashvid.Options(
        retention=c["retention_ratio"],
        expansion=c["expansion"],
        alpha=c["alpha"],
        selection=c["token_selection_method"],
        segment_threshold=-1.0 if whole else c["segment_threshold"],
        min_segments=c["min_segment_num"] if complement and not whole else 1,
        temporal_threshold=c["temporal_threshold"],
        public_code=True,
    )


def by_number(x: Tensor, numbers: Tensor) -> Tensor:
    """Tokens in the order of their numbers, those of the same number in that of their first channel."""
    return x[x[:, 0].argsort(stable=True)][numbers[x[:, 0].argsort(stable=True)].argsort(stable=True)]


@pytest.mark.parametrize("case", FLASHVID, ids=str)
def test_flashvid(case: Case) -> None:
    t, options = case.tensors, flashvid_options(case)
    left = flashvid.compress(FrameFeatures(t["in.x"], (1, t["in.x"].shape[1]), received=t["in.attn"]), options)
    assert torch.equal(left.source, t["out.keep"])
    tokens = by_number(t["out.tokens"], t["out.keep"])
    assert_close(by_number(left.x, left.source), tokens, "tokens", case.config["tol"])


@pytest.mark.parametrize("case", FLASHVID, ids=str)
def test_steps_of_flashvid(case: Case) -> None:
    t, c, options = case.tensors, case.config["config"], flashvid_options(case)
    x, received = t["in.x"], t["in.attn"]
    assert flashvid.budget(c["S"], options) == (c["num_adts"], c["num_tstm"])
    parts = flashvid.segment(x, options.segment_threshold, options.min_segments)
    assert [len(part) for part in parts] == t["out.segments"].tolist()
    chosen, trees = [], []
    for part in parts:
        inside = x[part.start : part.stop], received[part.start : part.stop]
        chosen.append(flashvid.select(*inside, c["num_adts"], options.selection))
        if len(part) > 1 and c["num_tstm"]:
            free = torch.ones_like(inside[1], dtype=torch.bool).scatter(1, chosen[-1], False)
            least = c["token_budget"] * len(part)
            _, left = flashvid.merge_trees(inside[0], free, options.temporal_threshold, least, True)
            trees += left.sum(1).tolist()
    assert torch.equal(torch.cat(chosen), t["out.adts"])
    assert trees == t["out.after_temporal"].tolist()


@pytest.mark.parametrize("case", HOLITOM, ids=str)
def test_holitom(case: Case) -> None:
    t, c, tol = case.tensors, case.config["config"], case.config["tol"]
    x, tokens, rows = t["in.x"], t["in.x"].shape[1], c["newline"] == "grid"
    options = holitom.Options(
        retention=c["RETAIN_RATIO"],
        tau=c["tau"],
        contextual=c["D_contextual_share"],
        beta=None if c["NO_BETA"] else c["BETA"],
        neighbours=c["K"],
        longest=c["MAX_WINDOW_SIZE"],
        rows=rows,
    )
    similarity = holitom.place_similarity(x)
    assert_close(similarity, t["out.sim"], "similarity", tol)
    cut = holitom.windows(similarity > options.tau, options.longest)
    assert [[part[0], part[-1]] for part in cut.frames] == t["out.windows"].tolist()
    assert cut.saved == t["out.reduced"]
    still = [int(holitom.still_places(similarity > options.tau, part).sum()) for part in cut.frames]
    assert still == t["out.static_per_window"].tolist()
    ratio = holitom.remaining_retention(options.retention, cut.saved, x.shape[0] * tokens)
    assert_close(torch.tensor(ratio), t["out.ratio"], "ratio", tol)

    separator = torch.full((x.shape[2],), 7.0) if rows else None
    features = FrameFeatures(x, (isqrt(tokens), isqrt(tokens)), received=t["in.attn"], separator=separator)
    left = holitom.compress(features, options)
    assert_close(left.x, t["out.tokens"], "tokens", tol)
    per_window = [sum(clip.tokens for clip in left.clips if clip.first in part) for part in cut.frames]
    assert per_window == t["out.per_window"].tolist()


@pytest.mark.parametrize("case", INNER, ids=str)
def test_holitom_inside_the_language_model(case: Case) -> None:
    t, c = case.tensors, case.config["config"]
    place = torch.full((len(t["in.hidden"][0]),), -1)
    place[c["text_before"] : c["text_before"] + c["video"]] = 0
    options = holitom_inner.Options(ratio=c["HOLITOM_r"])
    left, hidden = holitom_inner.step(whole(place), t["in.hidden"][0], t["in.logits"][0].softmax(-1), options)
    assert torch.equal(left.position, t["out.keep"])
    assert_close(hidden, t["out.hidden"], "states", case.config["tol"])


@pytest.mark.parametrize("case", PRUNEVID, ids=str)
def test_prunevid(case: Case) -> None:
    t, c = case.tensors, case.config["config"]
    x = t["in.x"]
    options = prunevid.Options(c["tau"], c["temporal_segment_ratio"], c["cluster_ratio"])
    labels = prunevid.frame_clusters(x, options.segment_ratio)
    assert labels == t["out.clusters"].tolist()
    labels = prunevid.refined(labels)
    assert labels == t["out.refined"].tolist()
    windows = prunevid.runs(labels)
    assert [len(window) for window in windows] == t["out.windows"].tolist()
    still, moving = [], []
    for window in windows:
        first, *frames = prunevid.window_parts(x, window, options)
        still.append(len(first.x))
        moving.append(sum(len(part.x) for part in frames))
    assert still == t["out.static"].tolist()
    assert moving == t["out.dynamic"].tolist()
    left = prunevid.compress(FrameFeatures(x, tuple(c["grid"])), options)
    assert_close(left.x, t["out.tokens"], "tokens", case.config["tol"])


@pytest.mark.parametrize("case", SCISSOR, ids=str)
def test_scissor(case: Case) -> None:
    t, x = case.tensors, case.tensors["in.x"]
    tau = case.config["config"]["tau"]
    first = torch.cat([scissor.components(frame, tau).x for frame in x])
    assert len(first) == t["out.first"]
    targets = scissor.components(first, tau).x
    assert torch.equal(scissor.most_similar(x.flatten(0, 1), targets), t["out.assign"])
    left = scissor.compress(FrameFeatures(x, (1, x.shape[1])), scissor.Options(tau))
    assert_close(left.x, t["out.tokens"], "tokens", case.config["tol"])


@pytest.mark.parametrize("case", STTM, ids=str)
def test_sttm(case: Case) -> None:
    t, c = case.tensors, case.config["config"]
    options = sttm.Options(
        threshold=c["threshold"],
        temporal_threshold=c["temporal_thresh"],
        root_level=c["root_level"],
        weighted=c["weighted_avg"],
        head_width=c["head_dim"],
        public_code=True,
    )
    grid = tuple(c["grid"])
    nodes = sttm.merged_nodes(t["in.x"], grid, options)
    assert torch.equal(nodes.box, t["out.tlbr"])
    assert torch.equal(nodes.size, t["out.patches"])
    assert_close(
        sttm.compress(FrameFeatures(t["in.x"], grid), options).x, t["out.tokens"], "tokens", case.config["tol"]
    )


@pytest.mark.parametrize("case", UNICOMP, ids=str)
def test_unicomp(case: Case) -> None:
    t, c, tol = case.tensors, case.config["config"], case.config["tol"]
    x, tokens = t["in.x"], t["in.x"].shape[1]
    options = unicomp.Options(c["RETAIN_RATIO"], c["Uf"], c["Uc"], c["min_interval"], public_code=True)
    summary = (t["in.global"], torch.zeros(x.shape[:2])) if c["global_metric"] else None
    separator = torch.full((x.shape[2],), 7.0)
    features = FrameFeatures(x, (1, tokens), summary=summary, keys=t["in.keys"], separator=separator)
    groups = unicomp.groups(x, options.frame_distance, c["min_interval"])
    starts = [group.start for group in groups]
    assert starts == t["out.groups"].tolist()
    fused = torch.stack([x[group.start : group.stop].mean(0) for group in groups])
    assert_close(fused, t["out.fused"], "means of groups", tol)
    left = unicomp.compress(features, options)
    assert_close(left.x, t["out.tokens"], "tokens", tol)
    if len(groups) * tokens > int(options.retention * x.shape[0] * tokens):
        metric = unicomp.group_summary(features, fused, starts, True)
        budget = unicomp.budgets(metric, int(options.retention * x.shape[0] * tokens), tokens)
        assert budget == t["out.budget"].tolist()
        ends = (left.source < 0).nonzero()[:, 0].tolist()
        assert ends == [int(n) + i for i, n in enumerate(t["out.per_frame"].cumsum(0))]


@pytest.mark.parametrize("case", FRAMEFUSION, ids=str)
def test_framefusion(case: Case) -> None:
    t, c = case.tensors, case.config["config"]
    options = framefusion.Options(c["cost"], c["similarity_lower_bound"], c["ratio_lower_bound"])
    hidden = torch.cat([t["in.head"], t["in.x"].flatten(0, 1), t["in.tail"]])
    video = range(len(t["in.head"]), len(hidden) - len(t["in.tail"]))
    state = framefusion.start(len(hidden), video, t["in.x"].shape[1])
    kept = []
    for length in t["out.lengths"].tolist():
        attention = t["in.attn"][0][:, : len(hidden), : len(hidden)].softmax(-1)
        state, hidden = framefusion.step(state, hidden, attention, options)
        assert len(hidden) == length
        kept.append(state.position)
        hidden = hidden + 0.1 * hidden.tanh()
    assert torch.equal(torch.cat(kept), t["out.kept"])
    assert state.merged == pytest.approx(t["out.sparsity"].tolist(), abs=case.config["tol"])
    assert_close(hidden, t["out.hidden"], "states", case.config["tol"])
