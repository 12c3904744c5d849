"""Text grounding: the regions that are drawn are the patches of the source map."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tempme_vl.cli import main
from tempme_vl.data.motion import MoveVideo, Thing, render_frames
from tempme_vl.data.rendered import write_video
from tempme_vl.data.transforms import VideoTransform
from tempme_vl.data.video import read_frames
from tempme_vl.evaluation.ground import GAP, Region, draw_regions, find_regions, patch_owners
from tempme_vl.evaluation.ground_options import GROUND
from tempme_vl.tasks.retrieval import AnyRetrievalModel, create_retrieval_model, load_retrieval_model
from tempme_vl.text.tokenizers import word_vocabulary

PHRASE, SIDE, GRID = "a red square moves left", 32, 4
WORDS = word_vocabulary([PHRASE])
JOINS: dict[str, Any] = {"merge_layers": (2, 3), "merge_frames": (2, 2), "cross_percent": 30, "intra_percent": 10}
MODELS: dict[str, dict[str, Any]] = {
    "tempme": {"name": "open_clip:tiny", "num_frames": 4, "r": 1, **JOINS},
    "maxsim": {"name": "open_clip:tiny", "num_frames": 4, "r": 1, "head": "maxsim", "method": "tempme", **JOINS},
    "testa": {"name": "testa:tiny", "num_frames": 6, "r_temporal": [1, 0, 1, 0, 0, 0], "r_spatial": 1},
    "pruned": {"name": "testa:tiny", "num_frames": 4, "method": "testa", "r_temporal": 0, "strategy": "prune"},
    "joint": {"name": "testa:tiny", "num_frames": 4, "method": "tome", "r": 5, "attention": "joint"},
    "umt": {"name": "umt:tiny", "num_frames": 4, "method": "none", "mode": "joint"},
}


def model_of(kind: str) -> AnyRetrievalModel:
    torch.manual_seed(0)
    options = {"method": kind, **MODELS[kind]}
    if kind == "pruned":
        options["r_spatial"] = 1
    vocabulary = None if options["name"].startswith("open_clip") else WORDS
    return create_retrieval_model(options.pop("name"), vocabulary=vocabulary, **options).eval()


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("ground") / "red.mp4"
    thing = Thing("red", "square", 0.0, 0.0, 12.0)
    write_video(file, render_frames(MoveVideo(thing, "left", 15.0, "black")))
    return file


def painted(picture: Image.Image, plain: Image.Image, frames: int) -> set[tuple[int, ...]]:
    """The patches that are not as in the plain picture: whole ones, and nothing beside them."""
    found, other = (np.asarray(image).astype(int) for image in (picture, plain))
    assert found.shape == other.shape
    step = SIDE // GRID
    changed: set[tuple[int, ...]] = set()
    for frame in range(frames):
        left = frame * (SIDE + GAP)
        for row in range(GRID):
            for column in range(GRID):
                place = np.s_[row * step : (row + 1) * step, left + column * step : left + (column + 1) * step]
                differs = (found[place] != other[place]).any(-1)
                assert differs.all() or not differs.any()
                if differs.any():
                    changed.add((frame, row, column))
        found[:, left : left + SIDE] = other[:, left : left + SIDE]
    assert (found == other).all()
    return changed


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_drawn_are_the_patches_of_the_best_tokens(kind: str, video: Path, tmp_path: Path) -> None:
    model_of(kind).save_pretrained(tmp_path / "model")
    out = tmp_path / "out" / "red.png"
    given = ["--checkpoint", str(tmp_path / "model"), "--out", str(out), "--regions", "2", "--side", str(SIDE)]
    main(["ground", str(video), PHRASE, *given, "--decode-timeout", "none"])
    report = json.loads(out.with_suffix(".json").read_text())

    model = load_retrieval_model(tmp_path / "model").eval()
    frontend, frames = model.frontend, model.frontend.schedule.frames
    fit = frontend.preprocessing.fit
    pixels = read_frames(video, frames, sampling=model.input.sampling, timeout=None, fit=fit).pixels
    with torch.no_grad():
        output = frontend(VideoTransform(frontend.preprocessing)(pixels).unsqueeze(0), trace_source=True)
        ids, mask = model.words.tokenizer(model.input.max_words)(PHRASE)
        text = model({"text_ids": ids[None], "text_mask": mask[None]})["text"]
        if text.ndim == 3:
            text = text[mask[None].bool()].mean(0, keepdim=True)
        scores = F.cosine_similarity(frontend.head(frontend.norm(output.tokens[0])), text)
    owners = patch_owners(frontend, output)[0]
    assert owners.shape == (frames, GRID**2)
    # each token holds as many patches as its size says, but those in front of all
    if kind != "pruned":
        held = F.one_hot(owners.flatten(), len(scores)).sum(0)
        assert torch.equal(frontend.patches(held[None])[0], frontend.patches(output.size)[0, :, 0].long())
        assert held.sum() == frames * GRID**2
    best = sorted(set(owners[owners >= 0].tolist()), key=lambda token: -scores[token])[:2]
    assert [region["token"] for region in report["regions"]] == best
    assert [region["score"] for region in report["regions"]] == pytest.approx(scores[best].tolist(), abs=1e-5)
    expected = {
        (int(frame), int(place) // GRID, int(place) % GRID)
        for token in best
        for frame, place in (owners == token).nonzero()
    }
    assert {tuple(patch) for region in report["regions"] for patch in region["patches"]} == expected
    assert painted(Image.open(out), draw_regions(pixels, [], GRID, SIDE), frames) == expected
    assert (report["phrase"], len(report["times"]), report["grid"]) == (PHRASE, frames, [GRID, GRID])


def test_each_region_has_its_colour_and_frames_are_enlarged() -> None:
    frames = np.full((9, 8, 8, 3), 255, np.uint8)
    regions = [Region(0, 0.5, ((0, 0, 1),)), Region(1, 0.4, ((8, 1, 0),))]
    picture = np.asarray(draw_regions(frames, regions, 2, side=15))
    assert picture.shape == (16 * 2 + GAP, (16 + GAP) * 8 - GAP, 3)  # eight in a row, twice as large
    first, second = picture[0, 8], picture[16 + GAP + 8, 0]
    assert first.tolist() == [141, 182, 212] and second.tolist() == [232, 164, 173]  # half white
    picture = picture.copy()
    picture[:8, 8:16] = picture[16 + GAP + 8 :, :8] = 255
    assert (picture == 255).all()


def test_fewer_regions_where_fewer_tokens_hold_patches() -> None:
    model = create_retrieval_model(
        "open_clip:tiny",
        num_frames=2,
        method="tempme",
        r=8,
        merge_layers=(2,),
        merge_frames=(2,),
        cross_percent=50,
        intra_percent=50,
    ).eval()
    regions = find_regions(model, torch.randn(2, 3, SIDE, SIDE), PHRASE, 100)
    assert sum(len(region.patches) for region in regions) == 2 * GRID**2
    assert len(regions) < 100 and [r.score for r in regions] == sorted((r.score for r in regions), reverse=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "the following arguments are required: VIDEO, PHRASE"),
        (["a.mp4"], "the following arguments are required: PHRASE"),
        (["a.mp4", "a dog", "more"], "unknown: more"),
        (["a.mp4", "a dog", "--checkpoint", "x"], "the following arguments are required: --out"),
    ],
)
def test_the_command_line(given: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GROUND.parse(given if "--checkpoint" in given or not given else [*given, "--checkpoint", "x", "--out", "y.png"])


def test_another_ending_than_png_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["ground", "a.mp4", "a dog", "--checkpoint", "x", "--out", str(tmp_path / "a.jpg")])
    assert "--out is the name of a picture, NAME.png; got" in capsys.readouterr().err
