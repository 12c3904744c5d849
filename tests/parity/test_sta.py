"""STA drops the tokens that its original implementation drops, and leaves the others in its order."""

from __future__ import annotations

import pytest
import torch
from parity.cases import Case, find

from tempme_vl.merging.sta import SlotDrop
from tempme_vl.state import AttentionContext, TokenState

CASES = [(case, part) for case in find("compressors", "sta*") for part in case.config["cases"]]
DEPTH = 12  # of the original's tower, whose blocks the cases name


def name(value: object) -> str:
    return value["key"] if isinstance(value, dict) else str(value)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("case", "part"), CASES, ids=name)
def test_a_step(case: Case, part: dict, apart: bool) -> None:
    """As one clip, like the original's, and with every slot as a clip of its own behind a CLS token."""
    slots = part["T"]
    x, metric, expected = (case.tensors[f"{part['key']}.{what}"] for what in ("x", "metric", "out"))
    step = SlotDrop(slots, part["r"], backwards=part["index"] == DEPTH // 3)
    if apart:
        x, metric, expected = (t.unflatten(1, (slots, -1)).flatten(0, 1) for t in (x, metric, expected))
        x, metric, expected = (torch.cat([torch.full_like(t[:, :1], 9), t], dim=1) for t in (x, metric, expected))
    clips, prefix = (slots, 1) if apart else (1, 0)
    state = TokenState.start(x, clips, prefix, trace_source=True)
    actual = step(state, AttentionContext(metric.unsqueeze(1)))
    assert torch.equal(actual.x, expected)
    assert actual.x.shape[1] * clips - prefix * clips == part["out_tokens"]
    kept = actual.source.gather(1, actual.origin)
    assert torch.equal(kept, torch.arange(kept.shape[1]).expand(len(kept), -1))
    assert ((actual.source >= 0).sum(1) == kept.shape[1]).all(), "all others are named as dropped"
