"""Ways to run an encoder have names, change no result, and merging's share of the time is what its steps take."""

from __future__ import annotations

import time
from typing import get_args, get_type_hints

import pytest
import torch
from torch import Tensor, nn

from tempme_vl import kernels
from tempme_vl.evaluation.measure import Workload, build_steps
from tempme_vl.evaluation.options import EfficiencyOptions
from tempme_vl.evaluation.share import merging_share
from tempme_vl.evaluation.ways import WAYS, name_of, row_and_way
from tempme_vl.merging import TokenMerger

CPU = torch.device("cpu")


def test_the_options_offer_every_way() -> None:
    named = get_args(get_args(get_type_hints(EfficiencyOptions)["ways"])[0])
    assert set(named) == set(WAYS)
    assert [row_and_way(name_of("tempme", way)) for way in WAYS] == [("tempme", way) for way in WAYS.values()]
    row, way = row_and_way(name_of("per_frame+tempme", None))
    assert row == "per_frame+tempme" and way not in WAYS.values()


def test_plain_and_flash_are_about_the_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def step() -> None:
        seen.append((kernels._enabled, torch.backends.cuda.math_sdp_enabled()))

    for way in ("plain", "flash"):
        WAYS[way].around(step)()
    step()
    assert seen == [(False, True), (True, False), (True, True)]


def test_a_graph_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="leave out the way 'graph'"):
        WAYS["graph"].around(lambda: None)


@pytest.mark.parametrize("row", ["open_clip", "tempme"])
def test_compiled_blocks_are_called_in_place_of_the_blocks(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they give is compared by `fast_paths`; here no compiler runs."""
    compiled = []

    def as_it_is(function: object, **_: object) -> object:
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", as_it_is)
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    options = {"r": 1, "merge_layers": (2,), "merge_frames": (2,), "cross_percent": 30, "intra_percent": 10}
    work = Workload("open_clip:tiny", CPU, frames=4, options={"tempme": options})
    build_steps(work, (f"{row}, compiled",))[f"{row}, compiled"]()
    blocks = 6
    assert len(compiled) == (2 * blocks if row == "tempme" else blocks)


class Slow(TokenMerger):
    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.03)
        return x


class Encoder(nn.Module):
    def __init__(self, merger: nn.Module):
        super().__init__()
        self.merger = merger

    def forward(self) -> None:
        self.merger(torch.zeros(1))
        time.sleep(0.03)


def test_the_share_of_merging() -> None:
    slow, none = Encoder(Slow()), Encoder(nn.Identity())
    assert 0.25 < merging_share(slow, slow, CPU, 3) < 0.75
    assert merging_share(none, none, CPU, 1) == 0.0
    assert not slow.merger._forward_hooks and not slow.merger._forward_pre_hooks
