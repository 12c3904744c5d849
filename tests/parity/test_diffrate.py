"""DiffRate equals its original implementation: the merge by itself, inside a ViT, and its count of FLOPs."""

from __future__ import annotations

import pytest
import torch
from parity.cases import Case, assert_close, find
from parity.vits import frontend_of, holders, states_of, vit_of

from tempme_vl.matching import match_last
from tempme_vl.merging.diffrate import merge_last
from tempme_vl.merging.diffrate_search import flops
from tempme_vl.state import TokenState

PARTS = [(case, part) for case in find("compressors", "diffrate*") for part in case.config["cases"]]
MERGES = [(case, part) for case, part in PARTS if "class_token" in part]
VITS = [(case, part) for case, part in PARTS if "merge_kept_num" in part]


def name(value: object) -> str:
    return value["key"] if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("case", "part"), MERGES, ids=name)
def test_merging(case: Case, part: dict) -> None:
    x, size, expected = case.tensors["x"], case.tensors["size"], case.group(f"{part['key']}.")
    kept, prefix, tolerance = part["kept"], int(part["class_token"]), case.config["tol"]
    match, cosine = match_last(x, x.shape[1] - kept, prefix)
    assert_close(match.mean(x), expected["x_mean"], "x", tolerance)
    assert_close(cosine, expected["node_max"], "cosine", tolerance)
    assert_close(torch.cat([match.mean(x), x[:, kept:]], 1), expected["x_mean_training"], "x in training", tolerance)
    state = merge_last(TokenState(x, size, 1, prefix), x.shape[1] - kept)
    assert_close(state.weight, expected["size_eval"], "weight", tolerance)
    assert_close(state.size, match.sum(size), "size", tolerance)


@pytest.mark.parametrize(("case", "part"), VITS, ids=name)
def test_inside_a_vit(case: Case, part: dict) -> None:
    t, key, tolerance = case.tensors, part["key"], case.config["tol"]
    numbers = {"merge_kept": part["merge_kept_num"], "prune_kept": part["prune_kept_num"]}
    frontend = frontend_of(vit_of(case), "diffrate", **numbers)
    states, output = states_of(frontend, t["image"])
    tokens = frontend.schedule.output_tokens
    assert [state.x.shape[1] for state in states] == [count.out for count in frontend.schedule.layer_counts]
    assert_close(output.tokens, t[f"{key}.tokens"], "tokens", tolerance)
    assert_close(states[-1].weight, t[f"{key}.size"], "weight", tolerance)
    assert torch.equal(holders(output.source, tokens), t[f"{key}.source"].long())
    assert_close(output.frames.squeeze(1), t[f"{key}.logits"], "logits", tolerance)
    assert torch.equal(output.size, t[f"{key}.source"].sum(2, keepdim=True)), "how many tokens each holds"


@pytest.mark.parametrize(("case", "part"), VITS, ids=name)
def test_flops(case: Case, part: dict) -> None:
    arch, patch = case.config["arch"], case.config["arch"]["patch"]
    tokens = (arch["img"] // patch) ** 2 + 1
    numbers = part["prune_kept_num"], part["merge_kept_num"]
    assert flops(*numbers, tokens, arch["dim"], 3 * patch**2, arch["num_classes"]).item() == part["flops_reported"]
