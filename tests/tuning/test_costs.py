"""What a tuning adds to the cost of a video: ahead the same as what its modules compute while they run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from counting import Counter
from towers import random_video
from tuning.models import make

from tempme_vl.recipes.report import cost
from tempme_vl.tuning import TUNINGS, find_tuning

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "prompt": [{"tokens": 2}],
    "adapter": [{"width": 5}],
    "plevu": [{"layers": 3, "heads": 4}],
    "vop": [{"visual": 3}, {"visual": 0}],
    "dgl": [{"tokens": 2}, {"tokens": 2, "prompts": "transformer"}],
    "mv_adapter": [
        {"width": 8},
        {"width": 8, "norm_in": True, "calibrate_patches": True, "blocks": (0, 1), "shared": (1,)},
    ],
    "testa_clip": [{"blocks": (0, 3)}],
}
CASES = [(name, options) for name, several in OPTIONS.items() for options in several]


EVERY_FRAME = ("mv_adapter", "dgl transformer")  # refused where frames become fewer


def made_before(path: str) -> bool:
    """Whether a module's part is done before any video is there: made of other weights, or merged into them."""
    return path.endswith((".prompts", ".factors", ".lora_A", ".lora_B"))


@pytest.mark.parametrize("method", ["none", "tempme", "testa"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_it_costs_what_its_modules_compute(
    name: str, options: dict[str, Any], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    merging = {"r_temporal": [1, 0, 1, 0, 0, 0], "r_spatial": 1} if method == "testa" else {}
    if method == "testa" and f"{name} {options.get('prompts', '')}".strip() in EVERY_FRAME:
        with pytest.raises(ValueError, match=f"{name} reads every frame's CLS token, and 'testa' leaves 2 of 4"):
            make("CLIP", find_tuning(name, options), method, **merging)
        return
    model = make("CLIP", find_tuning(name, options), method, **merging).eval()
    frontend, tuning = model.frontend, model.tuning
    shape, frames = frontend.shape, frontend.schedule.pooled_prefixes
    made = [module for path, module in frontend.named_modules() if made_before(path)]
    counter = Counter(frontend, monkeypatch, made)
    with torch.no_grad():
        frontend(random_video(4, 32, videos=1))
    projected = frames + (options["tokens"] if name == "dgl" else 0)
    counted = counter.total + projected * shape.width * shape.embed_dim
    assert model.gflops() == pytest.approx(counted / 1e9, rel=1e-12)
    added = tuning.cost(frontend.schedule, shape)
    assert (added > 0) == (options != {"visual": 0})
    assert tuning.cost(frontend.schedule, shape, published=True) >= added


def test_what_becomes_plain_weights_adds_nothing() -> None:
    for name in TUNINGS.keys() - OPTIONS.keys():
        model = make("CLIP", name)
        assert model.gflops() == model.frontend.gflops(), name


def test_a_report_and_a_card_have_the_cost_of_a_tuned_model() -> None:
    model = make("CLIP", "prompt", "none")
    assert cost(model)["gflops"] == model.gflops() > model.frontend.gflops()
    assert model.card().facts["GFLOPs of a video with the tuning"] == f"{model.gflops():.4g}"
