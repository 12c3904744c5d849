"""The motion data set: only the order of frames tells a video from its reversal, and the files are MSRVTT's."""

import csv
import dataclasses
import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from tempme_vl.data import motion, rendered
from tempme_vl.data.drawing import COLORS
from tempme_vl.data.motion import DIRECTIONS, SHAPES, MoveVideo, OrderVideo, Thing, render_frames
from tempme_vl.data.rendered import write_video

SMALL = {"num_train": 40, "num_test": 12, "num_order_train": 10, "num_order_val": 4, "num_order_test": 4}
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
ODD = Thing("magenta", "triangle", x=3.3, y=-2.7, radius=10.6)


def decode(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def annotations(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir() if path.suffix in (".json", ".csv")}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return motion.render_motion(tmp_path_factory.mktemp("motion"), **SMALL)


def reversible_videos():
    for direction, opposite in OPPOSITE.items():
        video = MoveVideo(ODD, direction, extent=12.3, background="navy")
        yield pytest.param(video, dataclasses.replace(video, direction=opposite), id=direction)
    other = Thing("yellow", "cross", x=-4.1, y=6.2, radius=9.4)
    yield pytest.param(OrderVideo(ODD, other, "black"), OrderVideo(other, ODD, "black"), id="order")


@pytest.mark.parametrize(("video", "opposite"), reversible_videos())
def test_reversed_video_holds_the_same_frames(video, opposite, tmp_path):
    frames, reverse = render_frames(video), render_frames(opposite)
    assert frames.shape == (rendered.NUM_FRAMES, rendered.SIZE, rendered.SIZE, 3) and frames.dtype == np.uint8
    assert np.array_equal(frames[::-1], reverse)
    assert not np.array_equal(frames, reverse)

    write_video(tmp_path / "video.mp4", frames)
    write_video(tmp_path / "reverse.mp4", reverse)
    decoded, decoded_reverse = decode(tmp_path / "video.mp4"), decode(tmp_path / "reverse.mp4")
    assert np.array_equal(decoded[::-1], decoded_reverse), "compression gives the direction of time away"
    assert np.abs(decoded.astype(int) - frames).mean() < 4, "compression changes the picture too much"


@pytest.mark.parametrize(
    "indices",
    [
        pytest.param(np.linspace(0, 15, 8).astype(int), id="linspace"),
        pytest.param(np.arange(0, 16, 2), id="segment-start"),
        pytest.param(np.arange(8) * 2 + np.array([0, 1, 1, 0, 1, 0, 0, 1]), id="segment-random"),
        pytest.param(np.arange(16), id="all"),
    ],
)
@pytest.mark.parametrize(("video", "opposite"), reversible_videos())
def test_sampled_frames_do_not_depend_on_the_direction(video, opposite, indices):
    def as_set(video):
        return Counter(frame.tobytes() for frame in render_frames(video)[indices])

    assert as_set(video) == as_set(opposite)


def test_object_moves_the_way_it_is_called():
    for direction, (dx, dy) in DIRECTIONS.items():
        frames = render_frames(MoveVideo(ODD, direction, extent=12.0, background="black")).astype(float).sum(-1)
        weights = frames - frames.min()
        total = weights.sum((1, 2))
        pixel = np.arange(rendered.SIZE)
        x = (weights.sum(1) * pixel).sum(1) / total
        y = (weights.sum(2) * pixel).sum(1) / total
        assert (x[-1] - x[0], y[-1] - y[0]) == pytest.approx((24 * dx, 24 * dy), abs=0.2)


def test_shapes_and_colors_differ_at_half_the_size():
    pictures = {}
    for shape in SHAPES:
        frame = render_frames(MoveVideo(Thing("red", shape, 0, 0, 9.0), "left", 10.0, "black"))[8, ..., 0]
        pictures[shape] = frame.reshape(32, 2, 32, 2).mean((1, 3)) > 100
    for a, b in [(a, b) for a in SHAPES for b in SHAPES if a < b]:
        differing = (pictures[a] ^ pictures[b]).sum()
        assert differing > 0.15 * pictures[a].sum(), f"{a} and {b} look alike"
    palette = np.array([*COLORS.values(), *motion.BACKGROUNDS.values()], dtype=float)
    distances = np.linalg.norm(palette[:, None] - palette[None], axis=-1)
    assert distances[np.triu_indices(len(palette), 1)].min() > 90


def test_objects_stay_in_view():
    def area(video):
        frames = render_frames(video).astype(float)
        return np.abs(frames - motion.BACKGROUNDS[video.background]).sum((1, 2, 3))

    for _, video in motion.draw_motion(0, 100, 0, 20, 0, 0):
        visible = area(video)
        if isinstance(video, MoveVideo):
            assert visible.min() > 0.9 * visible.max()
        else:
            first, second = (dataclasses.replace(thing, x=0, y=0) for thing in (video.first, video.second))
            centred = OrderVideo(first, second, video.background)
            assert (visible > 0.98 * area(centred)).all()


def test_layout_is_that_of_msrvtt(root):
    data = json.loads((root / "MSRVTT_data.json").read_text())
    videos = {video["video_id"]: video for video in data["videos"]}
    assert len(videos) == len(data["videos"]) == sum(SMALL.values())
    assert {f"{name}.mp4" for name in videos} == {path.name for path in (root / "videos").iterdir()}
    assert all(video["video_id"] == f"video{video['id']}" for video in data["videos"])

    train9k = [row["video_id"] for row in read_csv(root / "MSRVTT_train.9k.csv")]
    train7k = [row["video_id"] for row in read_csv(root / "MSRVTT_train.7k.csv")]
    test = read_csv(root / "MSRVTT_JSFUSION_test.csv")
    assert (root / "MSRVTT_JSFUSION_test.csv").read_text().startswith("key,vid_key,video_id,sentence\n")
    assert len(train9k) == 40 and len(train7k) == 31 and len(test) == 12
    assert set(train7k) < set(train9k) and not set(train9k) & {row["video_id"] for row in test}
    assert {videos[row["video_id"]]["split"] for row in test} == {"test"}

    captions: dict[str, list[str]] = {}
    for sentence in data["sentences"]:
        captions.setdefault(sentence["video_id"], []).append(sentence["caption"])
    assert len({sentence["sen_id"] for sentence in data["sentences"]}) == len(data["sentences"])
    assert captions.keys() == videos.keys()
    assert all(len(captions[name]) == 1 for name in train9k)
    assert [captions[row["video_id"]] for row in test] == [[row["sentence"]] for row in test]

    frames = decode(root / "videos" / f"{train9k[0]}.mp4")
    assert frames.shape == (rendered.NUM_FRAMES, rendered.SIZE, rendered.SIZE, 3)
    with av.open(str(root / "videos" / "video0.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec.name, stream.average_rate) == ("h264", rendered.FPS)
        assert stream.frames == rendered.NUM_FRAMES


def test_captions_of_one_video_say_what_it_was_rendered_from():
    video = MoveVideo(ODD, "up", 11.0, "brown")
    for caption in video.captions():
        assert {"magenta", "triangle", "up"} <= set(caption.split())
    order = OrderVideo(ODD, Thing("blue", "ring", 0, 0, 9.0), "black").captions()
    assert all(
        ("magenta triangle" in caption) and ("blue ring" in caption) and ("black" in caption) for caption in order
    )


def test_all_test_captions_differ():
    entries = motion.draw_motion(0, 1, 96, 0, 0, 0)
    captions = {video.captions()[0] for split, video in entries if split == "test"}
    assert len(captions) == 96
    with pytest.raises(ValueError, match="only 96"):
        motion.draw_motion(0, 1, 97, 0, 0, 0)


def test_train_directions_are_balanced_and_independent_of_the_place():
    entries = motion.draw_motion(0, 4000, 0, 0, 0, 0)
    moves = [video for _, video in entries if isinstance(video, MoveVideo)]
    counts = Counter(video.direction for video in moves)
    assert min(counts.values()) > 900
    for a, b in (("left", "right"), ("up", "down")):
        for quantity in (lambda c: c.thing.x, lambda c: c.thing.y, lambda c: c.thing.radius, lambda c: c.extent):
            means = [np.mean([quantity(video) for video in moves if video.direction == d]) for d in (a, b)]
            assert abs(means[0] - means[1]) < 0.8


def test_questions_split_by_video_and_order_is_not_in_the_question(root):
    parts = {name: json.loads((root / f"{name}_qa.json").read_text()) for name in ("train", "val", "test")}
    data = json.loads((root / "MSRVTT_data.json").read_text())
    first_caption: dict[str, list[str]] = {}
    for sentence in data["sentences"]:
        first_caption.setdefault(sentence["video_id"], sentence["caption"].split())
    ids = {name: {pair["video_id"] for pair in pairs} for name, pairs in parts.items()}
    assert not ids["train"] & ids["val"] and not ids["train"] & ids["test"] and not ids["val"] & ids["test"]
    assert sum(map(len, ids.values())) == sum(SMALL.values())
    test_ids = {int(row["video_id"][5:]) for row in read_csv(root / "MSRVTT_JSFUSION_test.csv")}
    assert test_ids <= ids["test"]

    pairs = [pair for part in parts.values() for pair in part]
    assert len({pair["id"] for pair in pairs}) == len(pairs)
    for pair in pairs:
        assert pair.keys() == {"answer", "category_id", "id", "question", "video_id"}
        words = first_caption[f"video{pair['video_id']}"]
        assert pair["answer"] in [*words, *motion.BACKGROUNDS] and " " not in pair["answer"]
        if "appears" in pair["question"]:  # order captions: "a C S then a C S on a ..."
            position = 1 if pair["question"].endswith("first") else 5
            assert pair["answer"] == words[position + ("shape" in pair["question"])]
        if "way" in pair["question"]:
            assert pair["answer"] in DIRECTIONS
    kinds = {pair["question"] for pair in pairs}
    assert {"which way does the object move", "which color appears first", "which shape appears last"} <= kinds


def test_every_question_has_a_kind_that_says_whether_it_needs_time(root):
    pairs = [pair for name in ("train", "val", "test") for pair in json.loads((root / f"{name}_qa.json").read_text())]
    kinds = {question: motion.question_kind(question) for question in {pair["question"] for pair in pairs}}
    assert set(kinds.values()) == {"direction", "order", "color", "shape", "background"}
    assert len(kinds) == 8, "all questions that there are"
    possible = {
        "direction": set(DIRECTIONS),
        "order": {*COLORS, *SHAPES},
        "color": set(COLORS),
        "shape": set(SHAPES),
        "background": set(motion.BACKGROUNDS),
    }
    for pair in pairs:
        kind = kinds[pair["question"]]
        assert pair["answer"] in possible[kind]
        # category 1 are the videos of two things in turn; their questions are all about the order
        assert (kind == "order") == (pair["category_id"] == 1)
    # a video played backwards keeps the answers that need no time, and changes the others
    video = MoveVideo(ODD, "left", 12.3, "navy")
    reverse = dataclasses.replace(video, direction="right")
    for forth, back in zip(*(c.questions(np.random.default_rng(1)) for c in (video, reverse)), strict=True):
        assert forth[0] == back[0]
        assert (forth[1] != back[1]) == (motion.question_kind(forth[0]) == "direction")


def test_same_seed_same_data_set(root, tmp_path):
    again = motion.render_motion(tmp_path / "again", **SMALL)
    assert annotations(again) == annotations(root)
    for name in ("video0.mp4", "video45.mp4", "video69.mp4"):
        assert np.array_equal(decode(again / "videos" / name), decode(root / "videos" / name))
    other = motion.render_motion(tmp_path / "other", seed=1, **SMALL)
    assert annotations(other)["MSRVTT_JSFUSION_test.csv"] != annotations(root)["MSRVTT_JSFUSION_test.csv"]


def test_finished_data_set_is_left_alone(root):
    times = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    motion.render_motion(root, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == times


def test_other_parameters_are_refused(root):
    with pytest.raises(ValueError, match="other parameters"):
        motion.render_motion(root, **{**SMALL, "num_test": 11})
    with pytest.raises(ValueError, match="training video"):
        motion.render_motion(root, num_train=0)


def test_somebody_elses_folder_is_refused(tmp_path):
    (tmp_path / "MSRVTT_data.json").write_text("precious")
    with pytest.raises(ValueError, match="holds no motion data set rendered earlier"):
        motion.render_motion(tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["MSRVTT_data.json"]


@pytest.mark.timeout(20)
def test_what_is_no_folder_or_no_description_is_named(tmp_path, root):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file: expected a folder"):
        motion.render_motion(tmp_path / "file", **SMALL)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / ".motion.lock")
    with pytest.raises(ValueError, match=r"\.motion\.lock: expected a regular file; this is a named pipe"):
        motion.render_motion(tmp_path / "pipe", **SMALL)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "motion.json").write_text('{"name": "mot')
    with pytest.raises(ValueError, match=r"motion\.json: Unterminated string"):
        motion.render_motion(tmp_path / "cut", **SMALL)


def test_killed_rendering_is_made_complete(root, tmp_path):
    many = {**SMALL, "num_train": 1000}  # some seconds, so that the kill comes in the middle
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=motion.render_motion, args=(tmp_path,), kwargs=many)
    process.start()
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("videos/*.mp4"))) < 100:
        assert time.monotonic() < deadline and process.is_alive()
        time.sleep(0.002)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "motion.json").exists()

    # What the killed run left, videos beyond the wanted number included, must not survive.
    motion.render_motion(tmp_path, **SMALL)
    assert annotations(tmp_path) == annotations(root)
    names = {path.name for path in (tmp_path / "videos").iterdir()}
    assert names == {path.name for path in (root / "videos").iterdir()}
    assert all(len(decode(tmp_path / "videos" / name)) == rendered.NUM_FRAMES for name in names)


def test_processes_may_render_at_the_same_time(root, tmp_path):
    fork = multiprocessing.get_context("fork")
    target = tmp_path / "shared"
    processes = [fork.Process(target=motion.render_motion, args=(target,), kwargs=SMALL) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert annotations(target) == annotations(root)
    assert len(list((target / "videos").iterdir())) == sum(SMALL.values())
