"""The second stage by fusion layers: its scores are those of evaluation's re-ranking, of the same frames and text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation.predict_runs import TEMPME
from fastapi.testclient import TestClient
from PIL import Image
from search.search_runs import SETTINGS

import tempme_vl.search
from tempme_vl import cli
from tempme_vl.data.splits import Video
from tempme_vl.evaluation.rerank import rerank
from tempme_vl.search import Embedder, Hit, SearchIndex
from tempme_vl.search.web.app import create_app
from tempme_vl.search.web.served import Served
from tempme_vl.tasks.retrieval import create_retrieval_model
from tempme_vl.text.tokenizers import word_vocabulary

TEXTS = ["a red ball moves left", "two things in turn", "a square"]
KINDS: dict[str, dict[str, Any]] = {
    "umt": {"name": "umt:tiny", "mode": "per_frame", **TEMPME},
    "testa": {
        "name": "testa:mini",
        "method": "testa",
        "num_frames": 4,
    },  # of 32 numbers in the tower, 64 in the space of texts
}


@pytest.fixture(scope="module", params=KINDS)
def matching(request: pytest.FixtureRequest, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> SearchIndex:
    """Of a model whose random weights are large enough to tell videos apart."""
    folder = tmp_path_factory.mktemp("matching")
    torch.manual_seed(0)
    model = create_retrieval_model(vocabulary=word_vocabulary(TEXTS), **KINDS[request.param])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and not name.startswith("frontend."):
                weight *= 2
    model.save_pretrained(folder / "model")
    embedder = Embedder.from_pretrained(folder / "model", "cpu")
    tempme_vl.search.build(videos, folder / "index", embedder, **SETTINGS)
    return tempme_vl.search.open(folder / "index", embedder)


def reference(index: SearchIndex, text: str) -> dict[tuple[str, int], float]:
    """What evaluation's second stage says of all segments, from their frames."""
    retrieval, model = index.embedder.retrieval, index.embedder.model
    hits = index.search(text, k=100)
    frames = [retrieval.reader(Video("v", index.file(hit), hit.start, hit.end)).video for hit in hits]
    ids, mask = (part[None] for part in retrieval.tokenizer(text))
    with torch.no_grad():
        video = model({"video": torch.stack(frames), "frame_mask": torch.ones(len(hits), 4)})
        words = {"text_mask": mask, **model({"text_ids": ids, "text_mask": mask})}
    states, mask = (words[name] for name in model.fine_text_parts)
    found = rerank(
        model,
        video["tokens"],
        states,
        mask,
        words["text"] @ video["video"].T,
        device=torch.device("cpu"),
        adds_similarity=model.adds_similarity,
        progress=False,
    )
    return {(hit.path, hit.segment): float(score) for hit, score in zip(hits, found.t2v[0], strict=True)}


def by_name(hits: Sequence[Hit]) -> dict[tuple[str, int], float]:
    return {(hit.path, hit.segment): hit.score for hit in hits}


@pytest.mark.parametrize("text", TEXTS)
def test_scores_and_order_are_those_of_evaluation(text: str, matching: SearchIndex) -> None:
    expected = reference(matching, text)
    hits = matching.search(text, k=7, fine="matching")
    assert len(hits) == 7 and by_name(hits) == pytest.approx(expected, abs=1e-3)  # float16
    assert max(expected.values()) - min(expected.values()) > 0.05
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert (hits[0].path, hits[0].segment) == max(expected, key=lambda name: expected[name])
    assert set(hits.seconds) == {"embed", "coarse", "fine"}
    few = by_name(matching.search(text, k=1, fine="matching", candidates=3))
    first = by_name(matching.search(text, k=3)).keys()
    assert few.keys() == {max(first, key=lambda name: expected[name])}


def test_the_same_tokens_are_compared_in_the_space_of_texts(matching: SearchIndex) -> None:
    """Places and MaxSim are those of tokens that are embedded with the video."""
    hit = matching.search(TEXTS[0], k=1)[0]
    frames = matching.embedder.frames_of(Video("v", matching.file(hit), hit.start, hit.end))
    tokens = matching.embedder.videos(frames[None]).tokens
    assert tokens is not None
    query = matching.embedder.text(TEXTS[0])
    fine = by_name(matching.search(query, k=7, fine="maxsim"))[hit.path, hit.segment]
    assert fine == pytest.approx((hit.coarse + float((tokens[0] @ query.vector).max())) / 2, abs=2e-3)


def test_what_cannot_be_matched(matching: SearchIndex, index: SearchIndex, videos: Path) -> None:
    for query in (Image.new("RGB", (32, 32)), videos / "a.mp4", matching.embedder.query(videos / "a.mp4")):
        with pytest.raises(ValueError, match="compares texts with segments; for a picture or a video give 'maxsim'"):
            matching.search(query, fine="matching")
    with pytest.raises(ValueError, match=r"no layers that see a text and a segment together.*give 'maxsim'"):
        index.search(TEXTS[0], fine="matching")


def test_the_command_matches(matching: SearchIndex, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["search", str(matching.store.folder), TEXTS[0], "-k", "3", "--fine", "matching", "--json"])
    said = capsys.readouterr()
    assert [hit["path"] for hit in json.loads(said.out)] == [
        hit.path for hit in matching.search(TEXTS[0], k=3, fine="matching")
    ]
    assert "fine " in said.err


def test_the_server_matches_where_the_model_does(matching: SearchIndex, index: SearchIndex) -> None:
    asked = {"q": TEXTS[0], "k": 3, "fine": "matching"}
    with TestClient(create_app(Served(matching), str)) as client:
        assert client.get("/api/status").json()["matching"]
        found = client.get("/api/search", params=asked).json()
    expected = matching.search(TEXTS[0], k=3, fine="matching")
    assert [hit["score"] for hit in found["hits"]] == pytest.approx([hit.score for hit in expected])
    assert "fine" in found["times"]
    with TestClient(create_app(Served(index), str)) as client:
        assert not client.get("/api/status").json()["matching"]
        refused = client.get("/api/search", params=asked)
    assert refused.status_code == 400 and "give 'maxsim'" in refused.json()["detail"]
