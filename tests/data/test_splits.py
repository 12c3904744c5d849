import os
from pathlib import Path

import pytest

from tempme_vl.data.splits import (
    RetrievalSplit,
    Video,
    find_annotations,
    holdout_validation,
    locate_videos,
    missing_videos,
    video_stem,
)


def split(captions: list[list[str]]) -> RetrievalSplit:
    videos = tuple(Video(f"v{i}", Path(f"v{i}.mp4")) for i in range(len(captions)))
    return RetrievalSplit("toy/train", videos, tuple(map(tuple, captions)), max_words=5, num_frames=3)


def test_pairs_list_every_caption_once():
    ragged = split([["a", "b"], ["c"], ["d", "e", "f"]])
    assert ragged.num_captions == 6
    assert [ragged.captions[video][caption] for video, caption in ragged.pairs] == list("abcdef")


def test_invalid_splits_are_rejected():
    video = Video("v0", Path("v0.mp4"))
    for videos, captions, message in (
        ((video,), (), "1 videos but captions of 0"),
        ((), (), "no videos"),
        ((video,), ((),), "no caption or an empty one: v0"),
        ((video,), (("fine", " "),), "no caption or an empty one: v0"),
        ((video, video), (("a",), ("b",)), "more than once: v0"),
    ):
        with pytest.raises(ValueError, match=f"toy/test: .*{message}"):
            RetrievalSplit("toy/test", videos, captions)


def test_holdout_divides_whole_videos_and_keeps_the_rest():
    whole = split([[f"caption {i} {k}" for k in range(4)] for i in range(50)])
    train, val = holdout_validation(whole, 12, seed=3)
    assert len(val.videos) == val.num_captions == 12
    assert {*train.videos, *val.videos} == set(whole.videos) and len(train.videos) == 38
    by_id = dict(zip((video.video_id for video in whole.videos), whole.captions, strict=True))
    assert all(by_id[video.video_id] == texts for video, texts in zip(train.videos, train.captions, strict=True))
    assert all(texts[0] in by_id[video.video_id] for video, texts in zip(val.videos, val.captions, strict=True))
    assert (val.max_words, val.num_frames) == (5, 3)
    assert "12 held out, seed 3" in val.name and "without 12 held out, seed 3" in train.name
    assert holdout_validation(whole, 12, seed=3) == (train, val)
    assert holdout_validation(whole, 12, seed=4)[1] != val


def test_held_out_captions_are_unique_where_possible():
    # Greedy in file order would give the first video "same", leaving the second without a caption of its own.
    whole = split([["same", "only here"], ["same"], ["same", "and here"], ["train"]])
    for seed in range(20):
        _, val = holdout_validation(whole, 3, seed)
        assert len({texts[0] for texts in val.captions}) == 3
    _, val = holdout_validation(split([["twin"], ["twin"], ["other"]]), 2, seed=0)
    assert val.num_captions == 2


@pytest.mark.parametrize("num_videos", [0, 4, 5])
def test_holding_out_none_or_all_is_an_error(num_videos):
    with pytest.raises(ValueError, match="toy/train has 4 videos; expected to hold out 1 to 3"):
        holdout_validation(split([["a"], ["b"], ["c"], ["d"]]), num_videos, seed=0)


def test_videos_are_found_by_stem_in_subfolders_and_missing_ones_listed(tmp_path):
    for name in ("videos/a.webm", "videos/train/b.AVI", "videos/c.avi.mp4", "videos/d.txt", "videos/e"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    paths = locate_videos("abcde", tmp_path, None)
    assert [str(path.relative_to(tmp_path / "videos")) for path in paths] == [
        "a.webm",
        "train/b.AVI",
        "c.avi.mp4",
        "d.mp4",
        "e",
    ]
    videos = tuple(Video(name, path) for name, path in zip("abcde", paths, strict=True))
    assert missing_videos(RetrievalSplit("toy", videos, (("x",),) * 5)) == [videos[3]]
    assert locate_videos("a", tmp_path, tmp_path / "videos/train") == [tmp_path / "videos/train/a.mp4"]


def test_ambiguous_and_absent_video_folders_are_errors(tmp_path):
    for name in ("one/a.mp4", "two/a.mp4"):
        (tmp_path / "videos" / name).parent.mkdir(parents=True)
        (tmp_path / "videos" / name).touch()
    with pytest.raises(ValueError, match=r"several files fit the video a: .*; keep one, or set video_root"):
        locate_videos("a", tmp_path, None)
    with pytest.raises(ValueError, match="elsewhere is not a folder"):
        locate_videos("a", tmp_path, tmp_path / "elsewhere")


def test_folders_behind_links_are_searched_once(tmp_path):
    elsewhere, videos = tmp_path / "disk", tmp_path / "videos"
    (elsewhere / "deep").mkdir(parents=True)
    videos.mkdir()
    for name in ("a.mp4", "deep/b.webm"):
        (elsewhere / name).touch()
    (videos / "part1").symlink_to(elsewhere)
    assert locate_videos("ab", tmp_path, None) == [videos / "part1/a.mp4", videos / "part1/deep/b.webm"]
    # circles: to the folder itself, to one above, and to one another
    (elsewhere / "deep" / "again").symlink_to(elsewhere)
    (elsewhere / "up").symlink_to(tmp_path)
    (videos / "self").symlink_to(videos)
    (videos / "lost").symlink_to(tmp_path / "nowhere")
    assert locate_videos("ab", tmp_path, None) == [videos / "part1/a.mp4", videos / "part1/deep/b.webm"]
    # the folder given may be a link too, and two links to one folder do not double its files
    (tmp_path / "linked").symlink_to(elsewhere)
    assert locate_videos("a", tmp_path, tmp_path / "linked") == [tmp_path / "linked" / "a.mp4"]
    (videos / "part2").symlink_to(elsewhere / "deep")
    assert locate_videos("b", tmp_path, None)[0].samefile(elsewhere / "deep/b.webm")


def test_links_to_one_file_are_one_video(tmp_path):
    (tmp_path / "videos" / "sub").mkdir(parents=True)
    file = tmp_path / "videos" / "sub" / "a.mp4"
    file.touch()
    (tmp_path / "videos" / "a.mp4").symlink_to(file)
    assert locate_videos("a", tmp_path, None) == [tmp_path / "videos" / "a.mp4"]
    (tmp_path / "videos" / "other").mkdir()
    (tmp_path / "videos" / "other" / "a.avi").touch()
    with pytest.raises(ValueError, match=r"several files fit the video a: .*a\.mp4, .*a\.avi"):
        locate_videos("a", tmp_path, None)


def test_a_folder_that_cannot_be_listed_is_said(tmp_path, monkeypatch, caplog):
    for name in ("videos/a.mp4", "videos/shut/b.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    scandir = os.scandir

    def refuse(path):  # whoever runs the tests may be allowed to list everything
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert locate_videos("ab", tmp_path, None) == [tmp_path / "videos/a.mp4", tmp_path / "videos/b.mp4"]
    assert "videos/shut: Permission denied; no videos are looked for there" in caplog.text
    caplog.clear()
    locate_videos("a", tmp_path / "elsewhere", None)
    assert not caplog.text, "annotations without any videos yet"


def test_stems_keep_dots_that_are_no_extension():
    assert video_stem("3086_UGLY_TRUTH_00.23.23.000-00.23.28.886.avi") == "3086_UGLY_TRUTH_00.23.23.000-00.23.28.886"
    assert video_stem("3086_UGLY_TRUTH_00.23.23.000-00.23.28.886") == "3086_UGLY_TRUTH_00.23.23.000-00.23.28.886"


def test_a_wrong_folder_lists_what_is_expected_and_found(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "b.json").touch()
    (tmp_path / "other.txt").touch()
    assert find_annotations(tmp_path, ["b.json"]) == [tmp_path / "annotations" / "b.json"]
    with pytest.raises(
        ValueError, match=r"expected a\.json, b\.json .*missing a\.json; found there: annotations/, other\.txt"
    ):
        find_annotations(tmp_path, ["a.json", "b.json"])
    with pytest.raises(ValueError, match="there is no such folder"):
        find_annotations(tmp_path / "nowhere", ["a.json"])
