"""The events data set: the order of events is all that tells a video from 23 others."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from tempme_vl.data import msrvtt, sampling
from tempme_vl.data.dataset import Place
from tempme_vl.data.drawing import COLORS
from tempme_vl.data.events import EVENTS, FRAMES, HOLD, ORDERS, SIZE, EventsVideo, _draw_videos, render_events

SHOWN = ((0, 7), (3, 8), (5, 9), (1, 10))  # events and the seeds of their pictures


def bag(frames: np.ndarray) -> Counter[bytes]:
    return Counter(frame.tobytes() for frame in frames)


def test_a_video_shows_its_events_in_order() -> None:
    video = EventsVideo(SHOWN)
    frames = video.frames()
    assert frames.shape == (FRAMES, SIZE, SIZE, 3) == (96, 32, 32, 3) and frames.dtype == np.uint8
    assert len(bag(frames)) == FRAMES // HOLD  # all pictures differ
    for part, (event, _) in zip(np.split(frames, len(SHOWN)), SHOWN, strict=True):
        color = COLORS[EVENTS[event][0]]
        assert all((frame == color).all(-1).sum() > 20 for frame in part)
    assert video.captions() == ["red square then yellow cross then cyan ring then green ring"]


@pytest.mark.parametrize("rule", [sampling.uniform, sampling.strided])
@pytest.mark.parametrize("count", [32, 96])
def test_other_orders_hold_the_same_frames_however_many_are_sampled(rule, count: int) -> None:
    taken = rule(FRAMES, count)
    bags = [bag(EventsVideo(order).frames()[taken]) for order in itertools.permutations(SHOWN)]
    assert len(bags) == ORDERS == 24 and all(one == bags[0] for one in bags)
    assert set(bags[0].values()) == {HOLD * count // FRAMES}


def test_compression_tells_nothing_of_the_order(tmp_path: Path) -> None:
    from tempme_vl.data.rendered import write_video

    found = []
    for name, order in (("one.mp4", SHOWN), ("other.mp4", SHOWN[::-1])):
        write_video(tmp_path / name, EventsVideo(order).frames())
        with av.open(str(tmp_path / name)) as container:
            found.append(np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]))
    assert len(found[0]) == FRAMES and bag(found[0]) == bag(found[1])
    assert not np.array_equal(*found)


def test_the_test_has_all_orders_of_the_same_events_and_training_is_balanced() -> None:
    videos = _draw_videos(0, 2000, 96)
    test = [video for split, video in videos if split == "test"]
    for group in range(0, 96, ORDERS):
        orders = [video.events for video in test[group : group + ORDERS]]
        assert set(orders) == set(itertools.permutations(orders[0]))
    assert len({video.captions()[0] for video in test}) == 96
    train = [video for split, video in videos if split == "train"]
    assert len(train) == 1900 and len({seed for video in train for _, seed in video.events}) == 4 * 1900
    for place in range(4):
        counts = Counter(video.events[place][0] for video in train)
        assert len(counts) == len(EVENTS) == 6 and max(counts.values()) < 1.3 * min(counts.values())
    assert _draw_videos(0, 2000, 96) == videos != _draw_videos(1, 2000, 96)


def test_its_files_are_msrvtts_without_questions(tmp_path: Path) -> None:
    root = render_events(tmp_path / "data", num_train=5, num_test=24)
    split = msrvtt.read_split(Place(root), "test_1k")
    assert len(set(split.captions)) == len(split.videos) == 24
    assert all(video.path.is_file() for video in split.videos) and not list(root.glob("*_qa.json"))
    about = json.loads((root / "events.json").read_text())
    assert (about["name"], about["frames"], about["size"]) == ("events", 96, 32)
    with pytest.raises(ValueError, match="holds the events data set of other parameters"):
        render_events(root, num_train=6, num_test=24)


@pytest.mark.parametrize("num_test", [25, 384])
def test_half_a_set_of_orders_is_refused(tmp_path: Path, num_test: int) -> None:
    with pytest.raises(ValueError, match=f"a multiple of 24, 360 at most; got num_test={num_test}"):
        render_events(tmp_path / "data", num_train=5, num_test=num_test)
