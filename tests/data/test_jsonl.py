import json

import pytest

from tempme_vl.data.jsonl import read_caption_lines


def write(path, *entries):
    path.write_text("\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in entries))
    return path


def test_captions_times_ids_and_splits(tmp_path):
    path = write(
        tmp_path / "mine.jsonl",
        {"file": "a.mp4", "caption": " a dog ", "split": "train", "fps": 30},
        {"file": "a.mp4", "captions": ["runs", "barks"], "split": "train"},
        "",
        {"file": "sub/b.mp4", "caption": "one", "start": 1, "end": 2.5, "split": "train"},
        {"file": "sub/b.mp4", "caption": "two", "start": 2.5, "split": "test", "id": "second"},
    )
    train = read_caption_lines(path, tmp_path / "videos", "train")
    assert train.name == "mine/train"
    assert train.captions == (("a dog", "runs", "barks"), ("one",))
    assert train.videos[0].path == tmp_path / "videos" / "a.mp4"
    assert (train.videos[1].start, train.videos[1].end) == (1.0, 2.5)
    test = read_caption_lines(path, tmp_path / "videos", "test")
    assert (test.videos[0].video_id, test.videos[0].start, test.videos[0].end) == ("second", 2.5, None)
    everything = read_caption_lines(path, tmp_path / "videos")
    assert everything.name == "mine/all" and len(everything.videos) == 3
    assert len({video.video_id for video in everything.videos}) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file": "a.mp4", "caption": "a"', "Expecting"),
        ("[1]", "expected a JSON object"),
        ({"caption": "a"}, "'file' must be a text"),
        ({"file": "a.mp4"}, "either 'caption' or 'captions'"),
        ({"file": "a.mp4", "caption": "a", "captions": ["b"]}, "either 'caption' or 'captions'"),
        ({"file": "a.mp4", "caption": " "}, "'caption' must be a text"),
        ({"file": "a.mp4", "captions": "a"}, "'captions' must be a list"),
        ({"file": "a.mp4", "captions": ["a", ""]}, "'captions' must be a list"),
        ({"file": "a.mp4", "caption": "a", "start": "1"}, "'start' must be a number of seconds"),
        ({"file": "a.mp4", "caption": "a", "end": -1}, "'end' must be a number of seconds"),
        ({"file": "a.mp4", "caption": "a", "start": 3, "end": 3}, "end must be greater than start"),
        ({"file": "good.mp4", "caption": "a", "id": "other"}, "had the id 'good.mp4' before, and now 'other'"),
    ],
)
def test_errors_name_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "mine.jsonl", {"file": "good.mp4", "caption": "fine"}, line)
    with pytest.raises(ValueError, match=rf"mine\.jsonl, line 2: .*{message}"):
        read_caption_lines(path, tmp_path)


def test_nothing_to_read_is_an_error(tmp_path):
    path = write(tmp_path / "mine.jsonl", {"file": "a.mp4", "caption": "a", "split": "train"})
    with pytest.raises(ValueError, match="no lines with split 'test'; splits found: train"):
        read_caption_lines(path, tmp_path, "test")
    with pytest.raises(ValueError, match="no lines"):
        read_caption_lines(write(tmp_path / "empty.jsonl", ""), tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        read_caption_lines(tmp_path / "none.jsonl", tmp_path)
