"""What goes to a server of the bare language model is what the whole model reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from integrations import tiny, tiny_post

from tempme_vl.integrations import compress

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
POST = ("InternVL", "SmolVLM", "PerceptionLM, rotary")
FRAMES = 4


def build(name: str) -> tuple[Any, Any, str]:
    if name in tiny.MODELS:
        return *tiny.build(name), tiny.ASK
    return *tiny_post.build(name), f"what {tiny_post.placeholder(name)} why"


def video(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (FRAMES, 32, 32, 3), dtype=np.uint8)


@torch.no_grad()
@pytest.mark.parametrize("name", [*tiny.MODELS, *POST])
def test_the_bare_language_model_says_the_same(name: str) -> None:
    model, processor, ask = build(name)
    compressed = compress(model, processor, "tempme", FRAMES, **({} if name in POST else tiny.schedule("tempme", 3)))
    prompts, videos = [ask, f"why {ask}"], [[video()], [video(1)]]
    embeds = compressed.prompt_embeds(prompts, videos, fps=2.0)
    whole = compressed(**compressed.prepare(prompts, videos, fps=2.0)).logits[:, -1]
    bare, words = compressed.host.language_model, compressed.host.target.get_output_embeddings()
    for row, one in enumerate(embeds):
        states = bare(inputs_embeds=one.unsqueeze(0))[0]
        logits = states if states.shape[-1] == whole.shape[-1] and name.startswith("InstructBlip") else words(states)
        torch.testing.assert_close(logits[0, -1], whole[row], rtol=0, atol=1e-5)
    assert len(embeds[0]) < len(embeds[1])


@pytest.mark.parametrize(("name", "message"), [("Qwen2.5-VL", "is told position_ids"), ("Qwen3-VL", "deeper layers")])
def test_language_models_that_are_told_more_are_refused(name: str, message: str) -> None:
    model, processor, ask = build(name)
    with pytest.raises(ValueError, match=message):
        compress(model, processor, "tempme", FRAMES).prompt_embeds(ask, [video()], fps=2.0)


def test_the_page_sends_what_a_server_can_read() -> None:
    """Its client's lines, up to the request: a tensor comes back out of the text."""
    import base64
    import io

    (code,) = re.findall(r"```python\n# client\.py\n(.*?)```", PAGE.read_text(), re.S)
    before, _, _ = code.partition("client = ")
    before = before[before.index("def as_text") :]
    names: dict[str, Any] = {"io": io, "base64": base64, "torch": torch}
    exec(before, names)
    sent = torch.randn(3, 4)
    back = torch.load(io.BytesIO(base64.b64decode(names["as_text"](sent))), weights_only=True)
    assert torch.equal(back, sent)
