"""Videos as paths of files, and as `tempme_vl.read_video` reads them, in prompts."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from integrations import tiny, tiny_post

from tempme_vl import read_video
from tempme_vl.data.rendered import write_video
from tempme_vl.data.video import VideoError
from tempme_vl.integrations import Compressed, SampledVideo, compress
from tempme_vl.integrations.videos import read_sampled, sample

F = tiny.FRAMES
OTHER = tiny.video(7, frames=9)


@cache
def llava() -> Compressed:
    return compress(*tiny.build("VideoLlava"), num_frames=F, feed="embeddings", **tiny.schedule("tempme", 3))


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of 12 and of 21 frames."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(2):
        write_video(folder / f"{number}.mp4", tiny.video(number, frames=12 + 9 * number))
    return [folder / f"{number}.mp4" for number in range(2)]


def chosen(path: Path, num_frames: int = F) -> SampledVideo:
    """The first frame, the last and those evenly between, out of all that the file has."""
    every = read_video(path, 12 if path.stem == "0" else 21, sampling="uniform")
    indices = np.linspace(0, len(every.pixels) - 1, num_frames).astype(int)
    return SampledVideo(every.pixels[indices], tuple(indices.tolist()), every.fps, tuple(every.times[indices].tolist()))


def embedded(text: str | list[str], videos: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return llava().prepare(text, videos, **options)["inputs_embeds"]


def test_a_path_stands_for_its_frames(paths: list[Path]) -> None:
    one = embedded(tiny.ASK, [chosen(paths[0])])
    for videos in (paths[0], str(paths[0]), [paths[0]], [str(paths[0])], [[str(paths[0])]]):
        assert torch.equal(embedded(tiny.ASK, videos), one)
    text = ["what <video> and <video> why", "what is this", "how many <video>"]
    batch = embedded(text, [[chosen(paths[0]), OTHER], [], [chosen(paths[1])]])
    for given in ([[str(paths[0]), OTHER], [], [paths[1]]], [paths[0], OTHER, str(paths[1])]):
        assert torch.equal(embedded(text, given), batch)
    told = [None, 5.0, None]
    assert torch.equal(embedded(text, [paths[0], OTHER, paths[1]], fps=told), batch)
    assert not torch.equal(embedded(tiny.ASK, paths[1]), one)
    labelled = llava().prepare("why <video>", paths[0], labels=["red"])
    assert labelled["labels"][0, -2:].tolist() == [tiny.TOKEN["red"], 2]


def test_answers_of_paths_are_those_of_their_frames(paths: list[Path]) -> None:
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    answers = llava().answer(["why <video>", "how many <video>"], paths, **options)
    assert answers == llava().answer(["why <video>", "how many <video>"], [chosen(path) for path in paths], **options)
    assert llava().answer("why <video>", str(paths[0]), **options) == answers[:1]


def test_what_was_read_with_other_sampling_is_taken_as_it_is(paths: list[Path]) -> None:
    read = read_video(paths[1], F, sampling="segment", start=0.2)
    video = sample(read, F)
    assert np.array_equal(video.frames, read.pixels) and video.indices == tuple(read.indices.tolist())
    assert (video.times, video.fps) == (tuple(read.times), read.fps)
    more = read_video(paths[1], 3 * F, sampling="uniform")
    fewer = sample(more, F)  # the middles of equal parts
    assert np.array_equal(fewer.frames, more.pixels[1::3]) and fewer.times == tuple(more.times[1::3])
    assert torch.equal(embedded(tiny.ASK, [read]), embedded(tiny.ASK, [read.pixels]))


def test_a_file_tells_its_times(paths: list[Path]) -> None:
    smol = compress(*tiny_post.build("SmolVLM"), "none", num_frames=F)
    ask = f"why {smol.placeholder}"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ours = smol.prepare(ask, [paths[1]])
        video = chosen(paths[1])
        theirs = smol.prepare(ask, [video.frames], times=video.times)
    late = smol.prepare(ask, [video.frames], times=[60 + second for second in video.times])
    (mask, other) = (inputs["attention_mask"] for inputs in (ours, late))
    assert ours.keys() == theirs.keys() and torch.equal(mask, theirs["attention_mask"])
    words = "input_ids" if "input_ids" in ours else "inputs_embeds"
    assert torch.equal(ours[words], theirs[words])
    assert mask.shape != other.shape or not torch.equal(ours[words], late[words])
    part = read_sampled(paths[1], F, start=0.4)
    assert part.times is not None and part.fps is not None
    assert 0 <= part.times[0] < 1 / part.fps and part.indices[-1] == 20
    assert part.times[-1] == pytest.approx(chosen(paths[1]).seconds[-1] - 0.4)


def test_files_that_cannot_be_read_and_times_of_files_are_refused(paths: list[Path], tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    for videos in (tmp_path / "no.mp4", [str(tmp_path / "no.mp4")], [[tmp_path / "no.mp4"]]):
        with pytest.raises(VideoError, match=r"no\.mp4: No such file"):
            llava().prepare(tiny.ASK, videos)
    with pytest.raises(VideoError, match=r"broken\.mp4: "):
        llava().prepare(tiny.ASK, tmp_path / "broken.mp4")
    with pytest.raises(VideoError, match=r"https://example\.org/a\.mp4: .*download it first"):
        llava().prepare(tiny.ASK, "https://example.org/a.mp4")
    with pytest.raises(ValueError, match=r"the file '.*0\.mp4' tells when .* give fps of other videos alone, and None"):
        llava().prepare(tiny.ASK, paths[0], fps=25)
    read = read_video(paths[0], F)
    with pytest.raises(ValueError, match=r"frames of read_video tell when .* give times of other videos alone"):
        llava().prepare(tiny.ASK, [read], times=[0.0, 1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="expected one video for every '<video>'"):
        llava().prepare(tiny.ASK, paths)
