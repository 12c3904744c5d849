"""ToMe equals its original implementation: the matching by itself, and inside a ViT."""

from __future__ import annotations

import pytest
import torch
from parity.cases import Case, assert_close, find
from parity.vits import frontend_of, holders, states_of, vit_of

from tempme_vl.matching import bipartite_match

MERGES = [(case, part) for case in find("compressors", "tome_merge*") for part in case.config["cases"]]
VITS = [(case, part) for case in find("compressors", "tome_vit*") for part in case.config["cases"]]


def name(value: object) -> str:
    return value["key"] if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("case", "part"), MERGES, ids=name)
def test_matching(case: Case, part: dict) -> None:
    t, key, tolerance = case.tensors, part["key"], case.config["tol"]
    if part["distill_token"] and not part["class_token"]:
        pytest.skip("no tower has a distillation token and no CLS token; a prefix is in front of what merges")
    num_prefix = int(part["class_token"]) + int(part["distill_token"])
    order = "position" if num_prefix else "similarity"
    merge = bipartite_match(t["metric"], part["r_effective"], num_prefix, order)

    merged, size = merge.weighted_mean(t["x"], t["size"])
    unsized, ones = merge.weighted_mean(t["x"], torch.ones_like(t["size"]))
    source = torch.nn.functional.one_hot(merge.assignment, merged.shape[1]).transpose(1, 2)
    actual = {
        "x": merged,
        "size": size,
        "x_unsized": unsized,
        "size_unsized": ones,
        "source": source,
        "mean": merge.mean(t["x"]),
        "unmerge": merge.unmerge(t[f"{key}.x"]),
    }
    for what, value in actual.items():
        assert_close(value, t[f"{key}.{what}"], what, tolerance)


@pytest.mark.parametrize(("case", "part"), VITS, ids=name)
def test_inside_a_vit(case: Case, part: dict) -> None:
    """By each form of r: (r, inflection) in the file's list of two, and the number of each block that it stands for."""
    t, key, tolerance = case.tensors, part["key"], case.config["tol"]
    pair = isinstance(part["r"], list) and part["r"] != part["r_list"]
    forms = [part["r_list"], tuple(part["r"]) if pair else part["r"]]
    frontend, other = (frontend_of(vit_of(case), "tome", r=r, proportional=part["prop_attn"]) for r in forms)
    assert frontend.schedule == other.schedule
    _, output = states_of(frontend, t["image"])

    assert output.tokens.shape[1] == part["n_tokens"] == frontend.schedule.output_tokens
    assert_close(output.tokens, t[f"{key}.tokens"], "tokens", tolerance)
    assert torch.equal(output.size, t[f"{key}.size"])
    assert torch.equal(holders(output.source, part["n_tokens"]), t[f"{key}.source"].long())
    assert_close(output.frames.squeeze(1), t[f"{key}.logits"], "logits", tolerance)
