"""A checkpoint as sentence-transformers calls it: the vectors of search, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from search.search_runs import code_of, scene

pytest.importorskip("sentence_transformers", minversion="5.4")
from sentence_transformers import SentenceTransformer

from tempme_vl.data.video import VideoError
from tempme_vl.search import Embedder
from tempme_vl.search.adapters.sentence_transformers import load

PAGE = Path(__file__).parents[2] / "docs" / "mteb.md"
TEXTS = ["a red square moves left", "a much longer text about a green ball that is not there.mp4", "rest"]


@pytest.fixture(scope="module")
def sentences(model: Path) -> SentenceTransformer:
    return load(model, "cpu")


def test_vectors_are_those_of_search(
    sentences: SentenceTransformer, embedder: Embedder, videos: Path, tmp_path: Path
) -> None:
    picture = Image.fromarray(scene(3, 0.5)[0])
    picture.save(tmp_path / "a.PNG")
    video = videos / "deep" / "b.mp4"
    kinds: list[tuple[list[Any], list[Any]]] = [
        (TEXTS, TEXTS),
        ([str(video), video], [video, video]),
        ([picture, str(tmp_path / "a.PNG"), tmp_path / "a.PNG"], [picture, picture, picture]),
    ]
    for given, queries in kinds:
        found = sentences.encode(given, batch_size=2)
        assert isinstance(found, np.ndarray) and found.dtype == np.float32
        np.testing.assert_array_equal(found, np.stack([embedder.query(query).vector for query in queries]))
    text, shown = embedder.text(TEXTS[0]).vector, embedder.query(video).vector
    np.testing.assert_array_equal(sentences.encode(TEXTS[0]), text)
    similar = sentences.similarity(sentences.encode(TEXTS), sentences.encode([video]))
    assert similar.shape == (3, 1) and float(similar[0, 0]) == pytest.approx(float(text @ shown), abs=1e-6)
    assert sentences.get_embedding_dimension() == embedder.width
    np.testing.assert_array_equal(sentences.encode(TEXTS[0], prompt="so: "), embedder.text("so: " + TEXTS[0]).vector)
    np.testing.assert_array_equal(sentences.encode([video], prompt="so: ")[0], shown)


def test_it_is_saved_and_read(sentences: SentenceTransformer, tmp_path: Path) -> None:
    sentences.save_pretrained(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
    np.testing.assert_array_equal(again.encode(TEXTS), sentences.encode(TEXTS))
    assert again.similarity_fn_name == "cosine"


def test_what_it_does_not_take(sentences: SentenceTransformer, videos: Path) -> None:
    with pytest.raises(VideoError):
        sentences.encode([str(videos / "broken.mp4")])
    with pytest.raises(ValueError, match=r"notes\.txt cannot be read as a picture"):
        sentences.encode([videos / "notes.txt"])
    with pytest.raises(ValueError, match="expected a text, a picture of Pillow, a Path or a Video; got ndarray"):
        sentences.encode([np.zeros((4, 8, 8, 3), np.uint8)])


def test_the_page_runs(
    model: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").symlink_to(videos / "a.mp4")
    (tmp_path / "videos" / "b.mp4").symlink_to(videos / "deep" / "b.mp4")
    (tmp_path / "runs" / "demo" / "tempme-seed0").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "tempme-seed0" / "best").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    exec(code_of(PAGE, "sentence-transformers"), {})
    assert capsys.readouterr().out.startswith("(2, 64) float32 tensor([[")
