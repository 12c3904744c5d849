"""The commands of video search as one calls them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from search.search_runs import LENGTHS, SETTINGS, scene

import tempme_vl.search
from tempme_vl import VideoQA, VideoRetrieval, cli
from tempme_vl.recipes.demo import Options
from tempme_vl.search import Embedder, SearchIndex

Said = pytest.CaptureFixture[str]


def test_index_and_search_as_json(videos: Path, model: Path, tmp_path: Path, capsys: Said) -> None:
    out = tmp_path / "index"
    sizes = ["--segment-seconds", "2", "--overlap", "0.5"]
    cli.main(["index", str(videos), "--out", str(out), "--checkpoint", str(model), *sizes, "--json", "--device", "cpu"])
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert sorted(report["added"]) == sorted(LENGTHS) and (report["files"], report["segments"]) == (4, 7)
    assert [one["path"] for one in report["broken"]] == ["broken.mp4"] and report["others"] == 1
    assert "indexing: 100%" in said.err and "B/s" in said.err and "7 segments" in said.err
    cli.main(["search", str(out), "a red ball moves left", "-k", "3", "--json", "--fine", "maxsim"])
    said = capsys.readouterr()
    hits = json.loads(said.out)
    expected = tempme_vl.search.open(out).search("a red ball moves left", k=3, fine="maxsim")
    assert [(hit["path"], hit["start"], hit["end"]) for hit in hits] == [(h.path, h.start, h.end) for h in expected]
    assert [hit["score"] for hit in hits] == pytest.approx([hit.score for hit in expected], abs=1e-6)
    assert all(f"{stage} " in said.err for stage in ("embed", "coarse", "fine"))


def test_reports_to_read(videos: Path, made: Path, capsys: Said) -> None:
    cli.main(["index", str(videos), "--out", str(made)])
    said = capsys.readouterr().out
    assert said.startswith("4 files, 7 segments: 0 files added, 0 changed, 4 as before, 0 gone, 1 not taken, in ")
    assert "\nnot taken: broken.mp4: Invalid data" in said and said.endswith("\nno videos by their endings: 1\n")
    cli.main(["search", str(made), "a ball", "-k", "1"])
    head, line = capsys.readouterr().out.splitlines()
    assert head.split() == ["score", "start", "end", "path"] and line.split()[-1] in LENGTHS


def test_search_by_a_picture_and_a_video(videos: Path, made: Path, tmp_path: Path, capsys: Said) -> None:
    Image.fromarray(scene(1, 2.0)[0]).save(tmp_path / "picture.png")
    for given in (["--image", str(tmp_path / "picture.png")], ["--clip", str(videos / "deep" / "b.mp4")]):
        cli.main(["search", str(made), *given, "--json"])
        assert json.loads(capsys.readouterr().out)[0]["path"] == "deep/b.mp4"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["search", "INDEX"], "expected one of a text, --image FILE and --clip FILE; got 0 of them"),
        (["search", "INDEX", "a", "--clip", "b.mp4"], "got 2 of them"),
        (["search", "INDEX", "--image", "NOTES"], "notes.txt cannot be read as a picture"),
        (["search", "INDEX", "--clip", "none.mp4"], "none.mp4: No such file or directory"),
        (["search", "nowhere", "a"], "expected the folder of an index; nowhere has no index.json"),
        (["search", "INDEX", "a", "-k", "0"], "k and candidates of 1 or more; got 0 and 100"),
        (["index", "nowhere", "--out", "INDEX"], "expected a folder of videos; nowhere is not there"),
        (["index", "VIDEOS", "--out", "INDEX", "--workers", "0"], "--workers must be 1 or more; got 0"),
        (["embed", "--checkpoint", "MODEL", "--out", "x.npz"], "expected --texts, --files or both"),
    ],
)
def test_a_mistake_is_one_line(
    given: list[str], said: str, videos: Path, made: Path, model: Path, capsys: Said
) -> None:
    places = {"INDEX": made, "VIDEOS": videos, "MODEL": model, "NOTES": videos / "notes.txt"}
    with pytest.raises(SystemExit) as end:
        cli.main([str(places.get(word, word)) for word in given])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line


def test_texts_and_files_as_vectors(videos: Path, model: Path, tmp_path: Path, capsys: Said) -> None:
    out = tmp_path / "vectors.npz"
    files = [str(videos / name) for name in ("a.mp4", "broken.mp4", "deep/b.mp4")]
    texts = ["a red ball", "a square"]
    cli.main(["embed", "--checkpoint", str(model), "--texts", *texts, "--files", *files, "--out", str(out), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (report["texts"], report["files"]) == (2, 2) and report["broken"][0]["path"] == files[1]
    retrieval = VideoRetrieval.from_pretrained(model)
    with np.load(out) as found:
        assert found["texts"].tolist() == texts and found["files"].tolist() == [files[0], files[2]]
        np.testing.assert_allclose(found["text_vectors"], retrieval.encode_text(texts), atol=1e-6)
        np.testing.assert_allclose(found["file_vectors"], retrieval.encode_video([files[0], files[2]]), atol=1e-5)


def test_a_question_is_asked_of_the_best_segments(index: SearchIndex, made: Path, model: Path, capsys: Said) -> None:
    colors = ("red", "blue", "green")
    given = ["ask", str(made), "what color is it", "--qa-checkpoint", str(model), "-k", "2", "--json"]
    cli.main([*given, "--answers", *colors, "--find", "a ball"])
    answers = json.loads(capsys.readouterr().out)
    hits = index.search("a ball", k=2)
    qa = VideoQA.from_pretrained(model)
    assert [(one["path"], one["start"]) for one in answers] == [(hit.path, hit.start) for hit in hits]
    for one, hit in zip(answers, hits, strict=True):
        expected = qa.answer(index.file(hit), "what color is it", colors, hit.start, hit.end)
        assert one["answer"] == expected and 0 < one["answer_score"] <= 1
    assert tempme_vl.search.ask(index, "what color", qa, answers=colors, where="size < 0") == []


def test_a_missing_package_is_named(videos: Path, embedder: Embedder, tmp_path: Path) -> None:
    import sys

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "lancedb", None)
        with pytest.raises(ImportError, match=r"pip install 'tempme_vl\[search\]'"):
            tempme_vl.search.build(videos, tmp_path / "index", embedder, **SETTINGS)


def test_the_demos_model_is_taken_where_none_is_named(
    videos: Path, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    index, embed = ["index", str(videos), "--out", "index"], ["embed", "--texts", "a ball", "--out", "one.npz"]
    for command in (index, embed):
        with pytest.raises(SystemExit):
            cli.main(command)
        assert "no runs/demo/tempme-seed0/best here either" in capfd.readouterr().err
    demo = Options()
    best = demo.output / f"tempme-seed{demo.seed}" / "best"
    best.parent.mkdir(parents=True)
    best.symlink_to(model)
    for command in (index, embed):
        cli.main([*command, "--device", "cpu"])
        said = capfd.readouterr()
        assert "it knows shapes that move and nothing else" in said.err and "demo" not in said.out
    assert tempme_vl.search.open("index").search("a ball", k=1)[0].path in LENGTHS
    cli.main([*index, "--device", "cpu"])
    assert "shapes" not in capfd.readouterr().err  # the index knows its model
