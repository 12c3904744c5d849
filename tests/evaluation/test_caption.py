"""The command that writes captions, and how many it says are known ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tempme_vl.cli import main
from tempme_vl.data.motion import MoveVideo, Thing, render_frames
from tempme_vl.data.rendered import write_video
from tempme_vl.data.transforms import VideoTransform
from tempme_vl.data.video import read_frames
from tempme_vl.tasks.testa import TestaPretrainingModel, create_testa_pretraining_model
from tempme_vl.tasks.testa.captioning import caption_loss
from tempme_vl.text.tokenizers import word_vocabulary

TEXTS = {"red.mp4": "A red square's path.", "blue.mp4": "the blue ring"}
TINY: dict[str, Any] = {"method": "none", "num_frames": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos with a caption each, and a model that has learned these."""
    folder = tmp_path_factory.mktemp("captions")
    for name, color, shape in (("red.mp4", "red", "square"), ("blue.mp4", "blue", "ring")):
        write_video(folder / name, render_frames(MoveVideo(Thing(color, shape, 0.0, 0.0, 12.0), "left", 15.0, "black")))
    lines = [{"file": name, "caption": text} for name, text in TEXTS.items()]
    (folder / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    learned(folder).save_pretrained(folder / "model")
    return folder


def learned(folder: Path) -> TestaPretrainingModel:
    torch.manual_seed(0)
    words = word_vocabulary(TEXTS.values(), blip=True)
    model = create_testa_pretraining_model("testa:tiny", words, **TINY)
    transform, tokenize = VideoTransform(model.frontend.preprocessing), model.words.tokenizer(16)
    frames = [read_frames(folder / name, 2, sampling="uniform", timeout=None, fit=transform.fit) for name in TEXTS]
    video = torch.stack([transform(one.pixels) for one in frames])
    ids, masks = map(torch.stack, zip(*map(tokenize, TEXTS.values()), strict=True))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        caption_loss(model.decoder, model.frontend.norm(model.frontend(video).tokens), ids, masks).backward()
        optimizer.step()
    return model


def captions(folder: Path, *given: str) -> dict[str, Any]:
    report = folder / "report.json"
    usual = ["--checkpoint", str(folder / "model"), "--decode-timeout", "none", "--json", str(report)]
    main(["caption", *given, *usual, "--least-words", "1", "--most-words", "12"])
    return json.loads(report.read_text())


@pytest.mark.parametrize("beams", ["1", "3"])
def test_captions_of_files(folder: Path, beams: str, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(folder / name) for name in TEXTS]
    report = captions(folder, *files, "--beams", beams, "--batch-size", "1")
    said = ["a red square ' s path .", "the blue ring"]
    assert report["captions"] == [{"video": file, "caption": text} for file, text in zip(files, said, strict=True)]
    assert "red.mp4: a red square ' s path ." in capsys.readouterr().out and "equal" not in report


def test_those_of_a_data_set_are_compared_with_its_own(folder: Path) -> None:
    lines = folder / "others.jsonl"
    others = [
        {"file": "red.mp4", "captions": ["a dog", TEXTS["red.mp4"]]},
        {"file": "blue.mp4", "caption": "the blue ring moves"},  # with a word that the model does not know
        {"file": "lost.mp4", "caption": "the blue ring"},
    ]
    lines.write_text("".join(json.dumps(line) + "\n" for line in others))
    given = ["--dataset", "jsonl", "--annotations", str(lines), "--video-root", str(folder)]
    report = captions(folder, *given)
    assert (report["equal"], report["videos"]) == (1, 3) and report["percent"] == pytest.approx(100 / 3)
    assert [one["caption"] for one in report["captions"]] == ["a red square ' s path .", "the blue ring", None]
    assert list(report["broken_videos"]) == ["lost.mp4"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "expected videos in front of the options, or --dataset"),
        (["a.mp4", "--dataset", "jsonl"], "expected videos in front of the options, or --dataset"),
        (["a.mp4", "--beams", "0"], "--beams"),
        (["lost.mp4"], "lost.mp4"),
    ],
)
def test_what_cannot_be_described_is_refused(
    folder: Path, given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        captions(folder, *given)
    assert message in capsys.readouterr().err
