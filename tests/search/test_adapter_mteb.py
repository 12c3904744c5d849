"""A checkpoint as mteb runs it: a task of its own kind in memory, whose scores are those of this package's metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from search.search_runs import code_of, scene
from torch.utils.data import DataLoader

pytest.importorskip("mteb")
import mteb
from datasets import Dataset, Features, Value
from datasets import Video as VideoFeature
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import EncoderProtocol

from tempme_vl.data.rendered import write_video
from tempme_vl.evaluation.metrics import retrieval_metrics
from tempme_vl.pipeline import VideoRetrieval
from tempme_vl.search import Embedder
from tempme_vl.search.adapters.mteb import TempMeEncoder, load, model_meta
from tempme_vl.search.embed import fingerprint

TEXTS = [f"a {color} square moves {way}" for color in ("red", "green", "blue") for way in ("left", "right", "up")]


class Squares(AbsTaskRetrieval):
    """Texts that look for videos, as mteb's own tasks hold them."""

    folder: Path
    as_bytes = False
    metadata = TaskMetadata(
        name="SquaresT2VRetrieval",
        description="Squares that move.",
        reference=None,
        dataset={"path": "in memory", "revision": "1"},
        type="Any2AnyRetrieval",
        category="t2v",
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="hit_rate_at_1",
        date=None,
        domains=None,
        task_subtypes=None,
        license=None,
        annotations_creators=None,
        dialect=None,
        modalities=["text", "video"],
        sample_creation=None,
        bibtex_citation=None,
    )

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        files = [str(self.folder / f"{number}.mp4") for number in range(len(TEXTS))]
        shown = [{"path": None, "bytes": Path(file).read_bytes()} for file in files] if self.as_bytes else files
        features = Features({"id": Value("string"), "video": VideoFeature()})
        names = [str(number) for number in range(len(TEXTS))]
        corpus = Dataset.from_dict({"id": names, "video": shown}, features=features)
        queries = Dataset.from_dict({"id": names, "text": TEXTS})
        relevant = {name: {name: 1} for name in names}
        split = RetrievalSplitData(corpus=corpus, queries=queries, relevant_docs=relevant, top_ranked=None)
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("squares")
    for number in range(len(TEXTS)):
        write_video(folder / f"{number}.mp4", scene(number, 1.5))
    return folder


@pytest.fixture(scope="module")
def encoder(model: Path) -> EncoderProtocol:
    return load(model, device="cpu")


def encode(encoder: Any, rows: list[dict[str, Any]]) -> np.ndarray:
    def collate(batch: list[dict[str, Any]]) -> dict[str, list[Any]]:
        return {key: [row[key] for row in batch] for key in batch[0]}

    some: Any = rows  # which are no dataset to a type checker
    loader = DataLoader(some, batch_size=2, collate_fn=collate)
    return encoder.encode(loader, task_metadata=Squares.metadata, hf_split="test", hf_subset="default")


@pytest.mark.parametrize("as_bytes", [False, True])
def test_a_task_has_our_scores(as_bytes: bool, folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Squares, "folder", folder, raising=False)
    monkeypatch.setattr(Squares, "as_bytes", as_bytes)
    encoder = load(model, "us/tiny", "cpu")
    result = mteb.evaluate(encoder, Squares(), cache=None, co2_tracker=False, show_progress_bar=False)
    (scores,) = result.task_results[0].scores["test"]
    retrieval = VideoRetrieval.from_pretrained(model, "cpu")
    similarity = retrieval.similarity(TEXTS, [folder / f"{number}.mp4" for number in range(len(TEXTS))])
    ours = retrieval_metrics(similarity)
    assert 0 < ours["r5"] < 100
    for k in (1, 5):
        assert scores[f"recall_at_{k}"] == round(ours[f"r{k}"] / 100, 5)  # as mteb rounds
    assert result.model_name == "us/tiny" and result.model_revision == fingerprint(model)


def test_vectors_are_those_of_search(encoder: EncoderProtocol, embedder: Embedder, folder: Path) -> None:
    assert isinstance(encoder, TempMeEncoder) and isinstance(encoder, EncoderProtocol)
    picture = Image.fromarray(scene(3, 0.5)[0])
    files = [folder / "0.mp4", folder / "1.mp4", folder / "2.mp4"]
    for key, given in (("text", TEXTS[:3]), ("video", files), ("image", [picture])):
        found = encode(encoder, [{key: one} for one in given])
        expected = np.stack([embedder.query(one).vector for one in given])
        assert found.dtype == np.float32 and found.shape == (len(given), embedder.width)
        np.testing.assert_allclose(found, expected, atol=1e-6)
    similar = encoder.similarity(torch.from_numpy(found), torch.from_numpy(found))
    assert float(similar[0, 0]) == pytest.approx(1, abs=1e-5)


def test_what_it_does_not_take(encoder: EncoderProtocol, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected one of video, image, text, each input by itself; got text, video"):
        encode(encoder, [{"text": "a", "video": folder / "0.mp4"}])
    with pytest.raises(ValueError, match=r"expected videos as a column of datasets\.Video, or their paths; got int"):
        encode(encoder, [{"video": 3}])
    with pytest.raises(ValueError, match="none"):
        load(tmp_path / "none")


def test_mteb_loads_it_by_what_it_knows(model: Path, encoder: EncoderProtocol) -> None:
    pytest.importorskip("torchcodec")  # which mteb asks for with each model of videos
    loaded = model_meta(model).load_model(device="cpu")
    np.testing.assert_array_equal(encode(loaded, [{"text": "a"}]), encode(encoder, [{"text": "a"}]))


def test_the_page_runs(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """With a task that is not downloaded in the place of the one that is named."""
    monkeypatch.setattr(Squares, "folder", folder, raising=False)
    monkeypatch.setattr(mteb, "get_tasks", lambda tasks: [Squares()])
    monkeypatch.setenv("MTEB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "runs" / "demo" / "tempme-seed0").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "tempme-seed0" / "best").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    exec(code_of(Path(__file__).parents[2] / "docs" / "mteb.md", "mteb"), {})
    assert float(capsys.readouterr().out.splitlines()[-1]) == 0.11111
