"""Searching: the stages against numpy, what is found by what, filters, and where in a hit the query is."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from search.search_runs import SETTINGS, save_model, scene

import tempme_vl.search
from tempme_vl import VideoRetrieval
from tempme_vl.data.splits import Video
from tempme_vl.data.video import VideoError, read_frames
from tempme_vl.search import Embedder, IndexFolderError, SearchIndex
from tempme_vl.search import query as searching
from tempme_vl.search.embed import EmbeddedQuery
from tempme_vl.search.files import VideoFile
from tempme_vl.search.store import Row, Store

TEXTS = ["a red ball moves left", "two things in turn", "a square"]


def exported(index: SearchIndex, folder: Path) -> dict[str, np.ndarray]:
    index.export(folder / "rows.npz")
    with np.load(folder / "rows.npz") as rows:
        return dict(rows)


@pytest.mark.parametrize("text", TEXTS)
def test_exact_search_is_brute_force(text: str, index: SearchIndex, model: Path, tmp_path: Path) -> None:
    rows = exported(index, tmp_path)
    query = VideoRetrieval.from_pretrained(model).encode_text([text])[0].numpy()
    scores = rows["vectors"] @ query
    order = np.argsort(-scores)
    hits = index.search(text, k=5)
    assert [(hit.path, hit.segment) for hit in hits] == [(rows["path"][i], rows["segment"][i]) for i in order[:5]]
    np.testing.assert_allclose([hit.score for hit in hits], scores[order[:5]], atol=1e-6)
    assert all(hit.score == hit.coarse for hit in hits) and set(hits.seconds) == {"embed", "coarse"}


def test_vectors_are_those_of_the_model(index: SearchIndex, videos: Path, model: Path, tmp_path: Path) -> None:
    rows = exported(index, tmp_path)
    parts = [
        Video("v", videos / path, start, end)
        for path, start, end in zip(rows["path"], rows["start"], rows["end"], strict=True)
    ]
    expected = VideoRetrieval.from_pretrained(model).encode_video(parts)
    assert len(parts) == len(index) == 7
    np.testing.assert_allclose(rows["vectors"], expected, atol=1e-5)


def test_a_video_and_a_part_of_one_find_themselves(index: SearchIndex, videos: Path) -> None:
    for fine in ("none", "maxsim"):
        (first, second) = index.search(videos / "a.mp4", k=2, fine=fine)
        assert first.path == "a.mp4" and first.score == pytest.approx(1, abs=1e-3) and second.score < 0.999
    part = Video("part", videos / "deep" / "er" / "c.mp4", 1.5, 3.5)
    first = index.search(part)[0]
    assert (first.path, first.start, first.end) == ("deep/er/c.mp4", 1.5, 3.5)
    with pytest.raises(VideoError, match=r"broken\.mp4"):
        index.search(videos / "broken.mp4")


def test_a_picture_finds_its_video(index: SearchIndex, videos: Path) -> None:
    for path in ("a.mp4", "deep/b.mp4", "d'quoted.mp4"):
        pixels = read_frames(videos / path, 1).pixels[0]
        assert index.search(Image.fromarray(pixels))[0].path == path


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ("path LIKE 'deep/%'", {"deep/b.mp4", "deep/er/c.mp4"}),
        ("duration < 1.75", {"a.mp4"}),
        ("end > 4 AND segment = 2", {"deep/er/c.mp4"}),
        ("path = 'd''quoted.mp4' AND start > 0", {"d'quoted.mp4"}),
        ("size < 0", set()),
    ],
)
def test_a_filter_holds_before_the_best_are_taken(where: str, found: set[str], index: SearchIndex) -> None:
    for fine in ("none", "maxsim"):
        assert {hit.path for hit in index.search("a ball", k=3, where=where, fine=fine)} == found


@pytest.mark.parametrize("where", ["nothing = 1", "path LIKE", "path; DROP TABLE segments", "size = 'many'"])
def test_a_filter_that_cannot_be_read_is_named(where: str, index: SearchIndex) -> None:
    with pytest.raises(ValueError, match=r"the filter .* cannot be used: .* It may name path, segment, start"):
        index.search("a ball", where=where)
    assert len(index) == 7


def token_rows(index: SearchIndex, text: str) -> dict[tuple[str, int], float]:
    """MaxSim of a text's one vector with all merged tokens, of the front end's own output."""
    model = index.embedder.model
    query = index.embedder.retrieval.encode_text([text])[0]
    found = {}
    for hit in index.search(text, k=100):
        reading = index.embedder.retrieval.reader(Video("v", index.file(hit), hit.start, hit.end))
        with torch.no_grad():
            output = model.frontend(reading.video[None])
            tokens = model.frontend.head(model.frontend.norm(output.tokens))[0]
        found[hit.path, hit.segment] = float((tokens / tokens.norm(dim=-1, keepdim=True) @ query).max())
    return found


def test_the_second_stage_ranks_by_the_nearest_token(index: SearchIndex) -> None:
    for text in TEXTS:
        scores = token_rows(index, text)
        hits = index.search(text, k=7, fine="maxsim")
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        for hit in hits:  # float16
            assert hit.score == pytest.approx((hit.coarse + scores[hit.path, hit.segment]) / 2, abs=2e-3)
        assert set(hits.seconds) == {"embed", "coarse", "fine"}
    few = index.search(TEXTS[0], k=2, fine="maxsim", candidates=3)
    first = {(hit.path, hit.segment) for hit in index.search(TEXTS[0], k=3)}
    assert len(few) == 2 and {(hit.path, hit.segment) for hit in few} <= first


def test_tokens_of_one_byte_rank_as_those_of_two(
    index: SearchIndex, videos: Path, embedder: Embedder, tmp_path: Path
) -> None:
    tempme_vl.search.build(videos, tmp_path / "int8", embedder, tokens="int8", **SETTINGS)
    small = tempme_vl.search.open(tmp_path / "int8", embedder)
    for query in (*TEXTS, videos / "deep" / "b.mp4"):
        large, other = (
            {(hit.path, hit.segment): hit.score for hit in one.search(query, k=7, fine="maxsim")}
            for one in (index, small)
        )
        assert large.keys() == other.keys() and large != other
        for key in large:
            assert other[key] == pytest.approx(large[key], abs=5e-3)
        ranks = [np.argsort(np.argsort([scores[key] for key in large])) for scores in (large, other)]
        assert np.corrcoef(*ranks)[0, 1] > 0.9


def test_words_are_compared_where_the_head_compares_words(videos: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "maxsim", head="maxsim")
    tempme_vl.search.build(videos, tmp_path / "index", model, **SETTINGS)
    index = tempme_vl.search.open(tmp_path / "index")
    retrieval = VideoRetrieval.from_pretrained(model)
    hits = index.search(TEXTS[0], k=7, fine="maxsim")
    parts = [Video("v", index.file(hit), hit.start, hit.end) for hit in hits]
    expected = retrieval.similarity([TEXTS[0]], parts)[0]
    np.testing.assert_allclose([hit.score for hit in hits], expected, atol=2e-3)


def test_where_a_picture_is_in_a_hit(index: SearchIndex, videos: Path) -> None:
    """Masks are those of the front end's own trace, and together hold every patch once."""
    hit = index.search(videos / "a.mp4")[0]
    model = index.embedder.model
    reading = index.embedder.retrieval.reader(Video("v", videos / "a.mp4", hit.start, hit.end))
    with torch.no_grad():
        output = model.frontend(reading.video[None], trace_source=True)
    assert output.source is not None
    source, size = output.source[0].unflatten(0, (4, 17)), output.size[0, :, 0]
    every = index.locate(videos / "a.mp4", hit, top=1000)
    with_patches = source[:, 1:].unique()
    assert 0 < len(with_patches) < len(size)  # CLS tokens are left out
    assert every.patches.shape == (len(with_patches), 4, 4, 4) and every.resize == "shortest"
    np.testing.assert_array_equal(every.patches.sum(axis=0), 1)
    np.testing.assert_allclose(every.times, reading.times)
    for number, frames, patches in zip(every.tokens, every.frames, every.patches, strict=True):
        holds = (source == number).numpy()
        np.testing.assert_array_equal(patches.reshape(4, 16), holds[:, 1:])
        np.testing.assert_array_equal(frames, holds.any(1))
        assert holds.sum() == size[number]
    best = index.locate("a ball", hit, top=3)
    assert best.scores.tolist() == sorted(best.scores.tolist(), reverse=True) and len(best.tokens) == 3
    assert best.heat().max() <= best.scores[0] and ((best.heat() != 0) == best.patches.any(axis=0)).all()


def test_threads_may_search_at_once(index: SearchIndex, videos: Path) -> None:
    names = ["a.mp4", "deep/b.mp4", "d'quoted.mp4"] * 4
    queries = [videos / name for name in names]
    expected = {name: index.search(videos / name, k=3) for name in set(names)}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda query: index.search(query, k=3), queries))
    for name, hits in zip(names, found, strict=True):
        assert [hit.path for hit in hits] == [hit.path for hit in expected[name]]


def test_names_with_quotes_are_names(index: SearchIndex) -> None:
    hit = index.search("a ball", where="segment = 1 AND path LIKE 'd''%'")[0]
    assert hit.path == "d'quoted.mp4" and index.locate("a ball", hit).times[0] >= 1.0


def test_the_nearest_token_is_where_the_query_is(index: SearchIndex, videos: Path) -> None:
    hit = index.search(videos / "a.mp4")[0]
    query = index.embedder.query(videos / "a.mp4")
    assert query.parts is not None
    every = index.locate(query, hit, top=1000).tokens
    assert 0 < len(every) < len(query.parts)
    for number in every:
        one = EmbeddedQuery(query.vector, query.parts[number : number + 1])
        found = index.locate(one, hit, top=1)
        assert found.scores[0] == pytest.approx(1, abs=1e-3)
        twins = np.flatnonzero((query.parts @ query.parts[number]) > 0.999)
        assert found.tokens[0] in twins


def test_what_cannot_be_asked(
    index: SearchIndex, videos: Path, embedder: Embedder, model: Path, tmp_path: Path
) -> None:
    for given, said in [
        ({"k": 0}, "k and candidates of 1 or more"),
        ({"fine": "words"}, "fine must be 'none', 'maxsim' or 'matching'; got 'words'"),
        ({"exact": False}, "no index of its vectors; run tempme-vl index with --ann"),
    ]:
        with pytest.raises(ValueError, match=said):
            index.search("a ball", **given)
    with pytest.raises(ValueError, match="got an empty one"):
        index.search("  ")
    with pytest.raises(ValueError, match="expected a text, a picture of Pillow, a Path or a Video; got int"):
        index.search(3)
    with pytest.raises(IndexFolderError, match=r"has no index\.json: make one with"):
        tempme_vl.search.open(tmp_path)
    other = save_model(tmp_path / "other", seed=1)
    with pytest.raises(IndexFolderError, match="made by another model"):
        tempme_vl.search.open(index.store.folder, other).search("a ball")
    tempme_vl.search.build(videos, tmp_path / "bare", embedder, tokens="none", **SETTINGS)
    bare = tempme_vl.search.open(tmp_path / "bare", embedder)
    assert [hit.path for hit in bare.search("a ball")] == [hit.path for hit in index.search("a ball")]
    for ask in (lambda: bare.search("a ball", fine="maxsim"), lambda: bare.locate("a ball", bare.search("a ball")[0])):
        with pytest.raises(IndexFolderError, match="keeps no merged tokens"):
            ask()


@pytest.mark.parametrize("name", ["../secret.mp4", "/etc/passwd", "deep/../../x.mp4", "", "link.mp4", "a\0.mp4"])
def test_no_path_leads_out_of_the_folder(name: str, index: SearchIndex, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "secret.mp4").write_bytes(b"")
    (tmp_path / "videos" / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    (tmp_path / "videos" / "notes.txt").write_text("nobody's")
    moved = tempme_vl.search.open(index.store.folder, index.embedder, root=tmp_path / "videos")
    with pytest.raises(ValueError, match=r"notes\.txt is no video of"):
        moved.file("notes.txt")
    with pytest.raises(ValueError, match=r"the name of a file below the folder|a link that leads out"):
        moved.file(name)
    assert moved.file("deep/b.mp4") == tmp_path / "videos" / "deep" / "b.mp4"


def test_approximate_search(videos: Path, embedder: Embedder, tmp_path: Path) -> None:
    report = tempme_vl.search.build(videos, tmp_path / "index", embedder, ann=True, **SETTINGS)
    index = tempme_vl.search.open(tmp_path / "index", embedder)
    assert report.ann
    near, exact = (index.search("a ball", k=3, exact=exact) for exact in (False, True))
    assert near and {hit.path for hit in near} <= {hit.path for hit in index.search("a ball", k=7)}
    assert near[0].score == pytest.approx(exact[0].score, abs=1e-6)


def of_random_directions(made: Path, folder: Path, width: int, count: int) -> tuple[SearchIndex, np.ndarray]:
    """An index, and its vectors (count, width); the file of each is named by its number."""
    store = Store.create(folder, replace(Store(made).settings, width=width))
    vectors = np.random.default_rng(0).normal(size=(count, width)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    times = np.zeros(4, np.float32)
    files = [VideoFile(str(number), 1, 1) for number in range(count)]
    rows = [Row(file, 0, 0.0, 1.0, 1.0, own, b"", b"", b"", times) for file, own in zip(files, vectors, strict=True)]
    store.put(rows, [])
    return tempme_vl.search.open(folder), vectors


def missed_by(index: SearchIndex, vectors: np.ndarray, exact: bool) -> float:
    """The share of the nearest ten that 20 queries do not find."""
    missed = []
    for query in np.random.default_rng(1).normal(size=(20, vectors.shape[1])).astype(np.float32):
        query /= np.linalg.norm(query)
        best = {str(number) for number in np.argsort(-(vectors @ query))[:10]}
        hits = index.search(EmbeddedQuery(query, None), k=10, exact=exact)
        missed.append(len(best - {hit.path for hit in hits}) / 10)
        assert [hit.score for hit in hits] == pytest.approx([vectors[int(hit.path)] @ query for hit in hits], abs=1e-5)
    return float(np.mean(missed))


def test_exact_search_misses_nothing_beside_an_index_of_the_vectors(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, vectors = of_random_directions(made, tmp_path / "index", 64, 600)
    index.store.table.create_index(metric="dot", index_type="IVF_FLAT", vector_column_name="vector", num_partitions=64)
    monkeypatch.setattr(searching, "PROBES", 20)  # of 64 partitions
    assert missed_by(index, vectors, exact=True) == 0 < missed_by(index, vectors, exact=False)


@pytest.mark.parametrize(("width", "kind"), [(64, "IvfRq"), (36, "IvfFlat")])
def test_approximate_search_finds_nine_of_ten_and_their_own_scores(
    width: int, kind: str, made: Path, tmp_path: Path
) -> None:
    index, vectors = of_random_directions(made, tmp_path / "index", width, 2000)
    index.store.tidy(ann=True)
    assert [one.index_type for one in index.store.table.list_indices()] == [kind]
    assert missed_by(index, vectors, exact=False) <= 0.1


def test_rows_are_exported(index: SearchIndex, tmp_path: Path) -> None:
    import pyarrow.parquet

    rows = exported(index, tmp_path)
    assert set(rows) == {"vectors", "path", "segment", "start", "end", "duration", "size", "modified"}
    np.testing.assert_allclose(np.linalg.norm(rows["vectors"], axis=1), 1, atol=1e-6)
    index.export(tmp_path / "rows.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "rows.parquet")
    np.testing.assert_array_equal(np.stack(table.column("vector").to_pylist()).astype(np.float32), rows["vectors"])
    told = json.loads(table.schema.metadata[b"tempme_vl"])
    assert told == {"fingerprint": index.settings.fingerprint, "tokens": "float16", "fusion_width": None}
    with pytest.raises(ValueError, match=r"\.npz, \.parquet or \.faiss"):
        index.export(tmp_path / "rows.csv")


def test_what_is_added_later_is_found_by_an_open_index(videos: Path, embedder: Embedder, tmp_path: Path) -> None:
    from tempme_vl.data.rendered import write_video

    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "one.mp4", scene(1, 1.0))
    tempme_vl.search.build(tmp_path / "videos", tmp_path / "index", embedder)
    index = tempme_vl.search.open(tmp_path / "index", embedder)
    assert len(index.search("a ball")) == 1
    write_video(tmp_path / "videos" / "two.mp4", scene(2, 1.0))
    tempme_vl.search.build(tmp_path / "videos", tmp_path / "index", embedder)
    assert len(index.search("a ball")) == 2
