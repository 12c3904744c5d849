"""Models of all kinds make an index, and what they give of videos and texts lies in one space."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluation.predict_runs import TEMPME
from families.models import save_hf
from search.search_runs import SETTINGS

import tempme_vl.search
from tempme_vl.data.splits import Video
from tempme_vl.search import Embedder
from tempme_vl.tasks.retrieval import create_retrieval_model
from tempme_vl.text.tokenizers import word_vocabulary

TEXT = "a red ball moves left"
WORDS = word_vocabulary([TEXT])
TINY: dict[str, Any] = {"method": "tempme", "num_frames": 4}
KINDS: dict[str, dict[str, Any]] = {
    "umt": {"name": "umt:tiny", "vocabulary": WORDS, "mode": "per_frame", **TEMPME},
    "umt joint": {"name": "umt:tiny", "vocabulary": WORDS, "mode": "joint", "method": "none", "num_frames": 4},
    "testa": {"name": "testa:tiny", "vocabulary": WORDS, "method": "testa", "num_frames": 4},
    "siglip": {"name": "hf:SIGLIP", **TINY},
    "clip of transformers": {"name": "hf:CLIP", **TINY},
    **{
        head: {"name": "open_clip:tiny", "head": head, **TEMPME}
        for head in ("xpool", "seqtransf", "eercf", "tighttransf")
    },
    "maxsim of frames": {"name": "open_clip:tiny", "head": "maxsim", "of": "frames", **TEMPME},
}
WHOLE = ("umt", "umt joint", "testa", "siglip", "clip of transformers", "seqtransf", "eercf")  # one vector each side


@pytest.mark.parametrize("kind", KINDS)
def test_a_video_finds_itself(kind: str, videos: Path, tmp_path: Path) -> None:
    options = dict(KINDS[kind])
    name = options.pop("name")
    if name.startswith("hf:"):
        save_hf(name[3:].lower(), tmp_path / "theirs")
        name = f"hf:{tmp_path / 'theirs'}"
    torch.manual_seed(0)
    create_retrieval_model(name, **options).save_pretrained(tmp_path / "model")
    embedder = Embedder.from_pretrained(tmp_path / "model", "cpu")
    assert embedder.has_tokens == (kind != "siglip")
    tempme_vl.search.build(videos, tmp_path / "index", embedder, **SETTINGS)
    index = tempme_vl.search.open(tmp_path / "index", embedder)
    for fine in ("none", *(["maxsim"] if embedder.has_tokens else [])):
        hits = index.search(videos / "deep" / "b.mp4", k=7, fine=fine)
        assert len(hits) == 7 and hits[0].score == pytest.approx(1, abs=2e-3)
        assert "deep/b.mp4" in [hit.path for hit in hits if hit.score > hits[0].score - 1e-3]
        assert all(-1.001 <= hit.score <= 1.001 for hit in index.search(TEXT, k=7, fine=fine))
    if kind in WHOLE:  # the cosines of the model's own vectors
        hits = index.search(TEXT, k=7)
        parts = [Video("v", index.file(hit), hit.start, hit.end) for hit in hits]
        video, text = embedder.retrieval.encode_video(parts), embedder.retrieval.encode_text([TEXT])
        expected = F.normalize(text, dim=-1) @ F.normalize(video, dim=-1).T
        np.testing.assert_allclose([hit.score for hit in hits], expected[0], atol=1e-5)
    if embedder.has_tokens:
        found = index.locate(TEXT, hits[0], top=10_000)
        assert found.patches.any(axis=0).sum() == found.patches.sum() and found.patches.any()
        assert len(set(found.tokens.tolist())) == len(found.tokens)
    else:
        with pytest.raises(ValueError, match="single ones are not in the space of texts; give --tokens none"):
            tempme_vl.search.build(videos, tmp_path / "other", embedder, tokens="int8")
