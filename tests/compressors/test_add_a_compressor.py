"""A compressor from outside of the package, as docs/add_a_compressor.md adds it: a file and a line."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from integrations import tiny, tiny_post

import tempme_vl
from tempme_vl.compressors import FrameFeatures
from tempme_vl.integrations import compress, load_compressed

PAGE = Path(__file__).parents[2] / "docs" / "add_a_compressor.md"
FRAMES = 8


@pytest.fixture(autouse=True)
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's file, and its line."""
    ((name, text),) = re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE.read_text(), re.S)
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    (line,) = re.findall(r"^tempme_vl\.COMPRESSORS\.register\(.*\)$", PAGE.read_text(), re.M)
    exec(line, {"tempme_vl": tempme_vl, name: importlib.import_module(name)})
    yield
    tempme_vl.COMPRESSORS.unregister(name)
    del sys.modules[name]


@torch.no_grad()
@pytest.mark.parametrize("name", ["VideoLlava", "LlavaOnevision", "Qwen2.5-VL", "Qwen3-VL", "SmolVLM"])
def test_every_kind_of_host_takes_it(name: str, tmp_path: Path) -> None:
    plain = name in tiny.MODELS
    model, processor = tiny.build(name) if plain else tiny_post.build(name)
    compressed = compress(model, processor, "still", FRAMES, budget=0.5)
    native, ours = compressed.counts((32, 32))
    assert ours is not None and 0.3 * native < ours <= 0.5 * native
    video = np.random.default_rng(0).integers(0, 256, (FRAMES, 32, 32, 3), dtype=np.uint8)
    prompt = tiny.ASK if plain else f"what {tiny_post.placeholder(name)} why"
    inputs = compressed.prepare(prompt, [video], fps=2.0)
    ids = inputs.get("input_ids")
    assert ids is None or (ids == compressed.host.token_id).sum() == ours
    expected = compressed(**inputs).logits[:, -1]
    compressed.save_pretrained(tmp_path / "folder")
    again = load_compressed(tmp_path / "folder")
    torch.testing.assert_close(again(**again.prepare(prompt, [video], fps=2.0)).logits[:, -1], expected)


def test_what_differs_from_the_first_frame_stays() -> None:
    still = tempme_vl.COMPRESSORS["still"]
    x = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0)).repeat(3, 1, 1)
    x[1, 2], x[2, 4] = -x[1, 2], -x[2, 4]
    left = still.compress(FrameFeatures(x, (2, 3)), still.options(1 / 6))
    assert left.source.tolist() == [0, 1, 2, 3, 4, 5, 6 + 2, 12 + 4]
    with pytest.raises(ValueError, match="'retention': expected"):
        still.compress(FrameFeatures(x, (2, 3)), still.options(1.5))
