"""Where a text is found: the attention that a token gets from the CLS tokens, and what it makes of cosines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from search.search_runs import SETTINGS, save_model
from torch import Tensor
from towers import TINY_SHAPE, every_way, random_video, tempme_schedule, tiny_frontend, way

import tempme_vl.search
from tempme_vl import MergeSchedule, VisualFrontend
from tempme_vl.data.splits import Video
from tempme_vl.scheduling import schedule_for
from tempme_vl.search import SearchIndex
from tempme_vl.search.embed import Layout
from tempme_vl.search.locate import locate, token_scores
from tempme_vl.search.tracing import attention_of_cls, traced
from tempme_vl.state import FrontendOutput

FRAMES = 6


def looked_at(frontend: VisualFrontend) -> tuple[Tensor, FrontendOutput]:
    with torch.no_grad(), traced(frontend) as trace:
        output = frontend(random_video(FRAMES))
    return attention_of_cls(trace, 1), output


def test_attention_is_that_of_torch_where_nothing_merges() -> None:
    frontend = tiny_frontend(schedule_for("none", 6, TINY_SHAPE, FRAMES))
    attention = frontend.blocks[-1].get_submodule("block").get_submodule("attn")
    seen: list[Tensor] = []
    attention.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    found, _ = looked_at(frontend)
    theirs = torch.nn.MultiheadAttention(64, 4, batch_first=True)
    given = attention.state_dict()
    theirs.load_state_dict(
        {
            "in_proj_weight": given["qkv.weight"],
            "in_proj_bias": given["qkv.bias"],
            "out_proj.weight": given["proj.weight"],
            "out_proj.bias": given["proj.bias"],
        }
    )
    with torch.no_grad():
        _, weights = theirs(seen[0], seen[0], seen[0])  # (B * F, N, N), the mean over heads
    torch.testing.assert_close(found, weights[:, 0].reshape(2, FRAMES * 17) * 17)


@pytest.mark.parametrize("schedule", every_way(), ids=way)
def test_an_input_token_gets_one_on_average(schedule: MergeSchedule) -> None:
    found, output = looked_at(tiny_frontend(schedule))
    assert output.source is not None
    kept = output.source >= 0
    by_input = found.gather(1, output.source.clamp(min=0)).masked_fill(~kept, 0.0)
    assert found.shape == output.tokens.shape[:2] and (found >= 0).all()
    if kept.all():
        torch.testing.assert_close(by_input.mean(1), torch.ones(2))


@pytest.mark.parametrize("schedule", [tempme_schedule(), schedule_for("tome", 6, TINY_SHAPE, FRAMES)], ids=way)
def test_a_token_of_many_is_not_looked_at_more(schedule: MergeSchedule) -> None:
    """Queries that see no difference between keys."""
    frontend = tiny_frontend(schedule)
    qkv = frontend.blocks[-1].get_submodule("block").get_submodule("attn").get_submodule("qkv")
    with torch.no_grad():
        for parameter in qkv.parameters():
            parameter[:64] = 0
    found, output = looked_at(frontend)
    assert output.size.max() > 2
    torch.testing.assert_close(found, torch.ones_like(found))


def test_cosines_above_zero_count_by_attention() -> None:
    text = np.array([[1.0, 0.0]], np.float32)
    cosines = np.array([0.2, 0.5, -0.5, -0.1], np.float32)
    tokens = np.stack([cosines, np.sqrt(1 - cosines**2)], axis=1)
    np.testing.assert_allclose(token_scores(text, tokens, None), cosines)
    attention = np.array([5.0, 1.0, 9.0, 0.0], np.float32)
    np.testing.assert_allclose(token_scores(text, tokens, attention), [1.0, 0.5, -0.5, -0.1], rtol=1e-6)


def test_the_highest_score_that_holds_a_patch_comes_first() -> None:
    source = np.array([[0, 1, 2, 2, 1], [0, 3, 3, 2, 3]])  # CLS and 2 x 2 patches
    found = locate(np.array([9.0, 1.0, 3.0, 2.0]), source, np.arange(2.0), Layout(2, 1, 2, "shortest"), 2)
    assert found.tokens.tolist() == [2, 3] and found.scores.tolist() == [3.0, 2.0]
    assert found.heat().tolist() == [[[0, 3], [3, 0]], [[2, 2], [3, 2]]]


def test_an_index_looks_for_texts_where_its_model_looked(index: SearchIndex, videos: Path) -> None:
    """With random weights; a video is looked for by cosines."""
    hit = index.search("a ball")[0]
    query = index.embedder.text("a ball")
    assert query.of_cls and query.parts is not None
    plain = index.locate(query._replace(of_cls=False), hit, top=1000)
    found = index.locate("a ball", hit, top=1000)
    reading = index.embedder.retrieval.reader(Video("v", index.file(hit), hit.start, hit.end))
    attention = index.embedder.videos(reading.video[None]).attention
    assert attention is not None and sorted(plain.tokens) == sorted(found.tokens)
    cosine = dict(zip(plain.tokens.tolist(), plain.scores.tolist(), strict=True))
    factors = [score / cosine[token] for token, score in zip(found.tokens, found.scores, strict=True)]
    expected = [attention[0, token] if cosine[token] > 0 else 1.0 for token in found.tokens]
    np.testing.assert_allclose(factors, expected, rtol=2e-3)
    assert len(set(expected)) > 3
    assert not index.embedder.query(videos / "a.mp4").of_cls


def test_a_head_of_tokens_looks_by_cosines(videos: Path, tmp_path: Path) -> None:
    tempme_vl.search.build(videos, tmp_path / "index", save_model(tmp_path / "model", head="maxsim"), **SETTINGS)
    index = tempme_vl.search.open(tmp_path / "index")
    query = index.embedder.text("a ball")
    assert query.trained and not query.of_cls
    assert np.abs(index.locate(query, index.search("a ball")[0], top=1000).scores).max() <= 1.001
