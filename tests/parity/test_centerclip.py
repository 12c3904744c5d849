"""CenterCLIP equals its original implementation: the clusterings by themselves, and the step in front of a block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity.cases import Case, assert_close, find

from tempme_vl.merging import Encoder, MergeSchedule, TokenMerger, make_schedule, merge_layers
from tempme_vl.merging.centerclip import Clustering
from tempme_vl.merging.clustering import affinity
from tempme_vl.merging.pool import grid_schedule
from tempme_vl.state import AttentionContext, TokenState

PARTS = [(case, part) for case in find("compressors", "centerclip*") for part in case.config["cases"]]
CLUSTERINGS = [(case, part) for case, part in PARTS if f"{part['key']}.assign" in case.tensors]
MODULES = [(case, part) for case, part in PARTS if "algorithm" in part]
HEAT = [case for case in find("compressors", "centerclip*") if "spec.W_heat" in case.tensors]


def name(value: object) -> str:
    return value["key"] if isinstance(value, dict) else str(value)


def clustering(part: dict[str, Any]) -> Clustering:
    """Ours for what a case says of the original's: its defaults are 1e-5 and 60 steps without a module around them."""
    graph = part.get("mode")
    return Clustering(
        "kmedoids" if graph is None else "spectral",
        distance=part.get("distance", "euclidean"),
        norm=part.get("norm_p", 2),
        unit=part.get("pre_norm", False),
        threshold=part.get("threshold", 1e-5),
        iterations=part.get("iter_limit", 60),
        neighbours=part["knn_k"] if graph == "KNN" else 0,
        sigma=part.get("sigma", 2.0),
    )


@pytest.mark.parametrize(("case", "part"), CLUSTERINGS, ids=name)
def test_clusters_and_medoids(case: Case, part: dict[str, Any]) -> None:
    t, dims = case.tensors, case.config["dims"]
    tokens = t["seg_tokens"].to(getattr(torch, part.get("input_cast", "float32")))
    assigned, medoids = clustering(part)(tokens, dims["K"], dims["frames_per_segment"])
    assert torch.equal(medoids, t[f"{part['key']}.medoids"])
    assert torch.equal(assigned, t[f"{part['key']}.assign"])
    for row in range(len(tokens)):  # a row by itself has the same
        alone, _ = clustering(part)(tokens[row : row + 1], dims["K"], dims["frames_per_segment"])
        assert torch.equal(alone[0], assigned[row])


@pytest.mark.parametrize("case", HEAT, ids=str)
def test_the_graph(case: Case) -> None:
    sigma = next((part["sigma"] for part in case.config["cases"] if part.get("mode") == "HeatKernel"), 2.0)
    assert_close(
        affinity(case.tensors["seg_tokens"], 0, sigma), case.tensors["spec.W_heat"], "graph", case.config["tol"]
    )


@pytest.mark.parametrize(("case", "part"), MODULES, ids=name)
def test_in_front_of_a_block(case: Case, part: dict[str, Any]) -> None:
    t, dims = case.tensors, case.config["dims"]
    x = t["module_in_LND"].transpose(0, 1)
    frames, tokens, join = dims["frames"], x.shape[1], dims["frames"] // dims["segments"]
    step, schedule = step_of(part, frames, tokens, join, dims["K"])
    state = step(TokenState.start(x, frames, 1, proportional=schedule.proportional), AttentionContext.of_tokens(x))
    assert (state.num_clips, state.x.shape[1], state.num_prefix) == (dims["segments"], schedule.token_counts[0][1], 1)
    assert_close(state.x, t[f"{part['key']}.out_LND"].transpose(0, 1), "tokens", case.config["tol"])
    assert state.attention_bias is None


def step_of(
    part: dict[str, Any], frames: int, tokens: int, join: int, clusters: int
) -> tuple[TokenMerger, MergeSchedule]:
    """The original's module as one of ours: its pooling is that of the method of the name."""
    options: dict[str, Any] = {"merge_layers": (0,), "merge_frames": (join,), "clusters": clusters}
    if part["algorithm"] == "pooling":
        grid = 1, tokens - 1
        schedule = grid_schedule(Encoder(1, frames, tokens), grid, grid, join)
    else:
        algorithm = {"kmediods++": "kmedoids", "spectral": "spectral"}[part["algorithm"]]
        centers = part["aggregation"] or "medoid"
        schedule = make_schedule("centerclip", 1, frames, tokens, **options, algorithm=algorithm, centers=centers)
    return merge_layers(schedule, 16)[0].before_attention, schedule
