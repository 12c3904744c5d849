"""Each reader on small files in its data set's public layout."""

import json

import pytest

from tempme_vl.data.datasets import CAPTIONED, load_split


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def write_msrvtt(root):
    videos = [{"video_id": f"video{i}", "split": "test" if i >= 4 else "train"} for i in range(6)]
    sentences = [
        {"video_id": f"video{i}", "caption": f"caption {i} {k}", "sen_id": 3 * i + k}
        for k in range(3)
        for i in range(6)
    ]
    write(root / "MSRVTT_data.json", {"videos": videos, "sentences": sentences})
    write(root / "MSRVTT_train.9k.csv", "video_id\nvideo0\nvideo2\nvideo1\n")
    write(root / "MSRVTT_train.7k.csv", "video_id\r\nvideo1\r\n")
    write(
        root / "MSRVTT_JSFUSION_test.csv",
        'key,vid_key,video_id,sentence\nret0,msr5,video5,"a, b"\nret1,msr4,video4,c\n',
    )


@pytest.mark.parametrize("folder", ["", "annotations", "msrvtt_data"])
def test_msrvtt(tmp_path, folder):
    write_msrvtt(tmp_path / folder)
    train = load_split("msrvtt", tmp_path, "train_9k")
    assert train.name == "msrvtt/train_9k"
    assert [video.video_id for video in train.videos] == ["video0", "video2", "video1"]
    assert train.captions[1] == ("caption 2 0", "caption 2 1", "caption 2 2")
    assert train.videos[0].path == tmp_path / "videos" / "video0.mp4"
    assert (train.max_words, train.num_frames) == (32, 12)
    assert [video.video_id for video in load_split("msrvtt", tmp_path, "train_7k").videos] == ["video1"]
    test = load_split("msrvtt", tmp_path, "test_1k")
    assert (test.videos[0].video_id, test.captions) == ("video5", (("a, b",), ("c",)))
    full = load_split("msrvtt", tmp_path, "test_full")
    assert [video.video_id for video in full.videos] == ["video4", "video5"] and full.num_captions == 6


def test_msrvtt_videos_are_found_by_stem(tmp_path):
    write_msrvtt(tmp_path)
    write(tmp_path / "MSRVTT_Videos" / "video5.webm", "")
    videos = load_split("msrvtt", tmp_path, "test_1k").videos
    assert [video.path.name for video in videos] == ["video5.webm", "video4.mp4"]
    elsewhere = load_split("msrvtt", tmp_path, "test_1k", video_root=tmp_path).videos
    assert elsewhere[0].path == tmp_path / "MSRVTT_Videos" / "video5.webm"


def test_msrvtt_mistakes_are_named(tmp_path):
    write_msrvtt(tmp_path)
    write(tmp_path / "MSRVTT_train.9k.csv", "video_id\nvideo0\nvideo99\n")
    with pytest.raises(ValueError, match="1 videos have no caption or an empty one: video99"):
        load_split("msrvtt", tmp_path, "train_9k")
    write(tmp_path / "MSRVTT_train.7k.csv", "name\nvideo0\n")
    with pytest.raises(ValueError, match=r"7k\.csv: expected the columns video_id; found \['name'\]"):
        load_split("msrvtt", tmp_path, "train_7k")
    write(tmp_path / "MSRVTT_JSFUSION_test.csv", "video_id,sentence\nvideo4,a\nvideo4,b\n")
    with pytest.raises(ValueError, match=r"test\.csv, line 3: video4 again"):
        load_split("msrvtt", tmp_path, "test_1k")
    write(tmp_path / "MSRVTT_data.json", [])
    with pytest.raises(ValueError, match=r'expected \{"videos"'):
        load_split("msrvtt", tmp_path, "test_full")


def test_msvd(tmp_path):
    write(tmp_path / "captions_msvd.json", {"x_1_2": ["a", "b"], "y_3_4": ["c"], "z_5_6": ["d"]})
    write(tmp_path / "test_list.txt", "y_3_4\nx_1_2\n")
    test = load_split("msvd", tmp_path, "test")
    assert [video.video_id for video in test.videos] == ["y_3_4", "x_1_2"]
    assert test.captions == (("c",), ("a", "b"))
    write(tmp_path / "train_list.txt", "z_5_6\nw\n")
    with pytest.raises(ValueError, match=r"train_list\.txt: 1 ids have no captions in .*captions_msvd\.json, e\.g\. w"):
        load_split("msvd", tmp_path, "train")


def test_activitynet_joins_sentences_and_rounds_the_duration_up(tmp_path):
    video = {"duration": 82.73, "timestamps": [[0, 9], [9, 99]], "sentences": ["A woman dances.", " She ends. "]}
    write(tmp_path / "val_1.json", {"v_abc": video})
    val = load_split("activitynet", tmp_path, "val_1")
    assert val.captions == (("A woman dances. She ends.",),)
    assert (val.videos[0].video_id, val.videos[0].start, val.videos[0].end) == ("v_abc", 0.0, 83.0)
    assert (val.max_words, val.num_frames) == (64, 64)


def test_didemo_from_paragraphs_or_single_descriptions(tmp_path):
    entries = [
        {"video": "1@N_2_ab.mov", "description": "first."},
        {"video": "3@N_4_cd.m4v", "description": "other"},
        {"video": "1@N_2_ab.mp4", "description": " second"},
    ]
    write(tmp_path / "val_data.json", entries)
    val = load_split("didemo", tmp_path, "val")
    assert [video.video_id for video in val.videos] == ["1@N_2_ab", "3@N_4_cd"]
    assert val.captions == (("first. second",), ("other",))
    assert {(video.start, video.end) for video in val.videos} == {(0.0, 31.0)}
    assert (val.max_words, val.num_frames) == (64, 64)
    rows = 'success,video_path,starts,ends,text,formatted_data\nTrue,/some/where/1@N_2_ab.avi,t,t,"a, b",x\n'
    write(tmp_path / "didemo_val_label.tmass.csv", rows)
    assert load_split("didemo", tmp_path, "val").captions == (("a, b",),)


def test_lsmdc(tmp_path):
    video = "3086_UGLY_TRUTH_00.23.23.000-00.23.28.886"
    line = f'{video}\t00.23.23.000\t00.23.28.886\t00.23.23.000\t00.23.28.886\tSOMEONE says "stop.\n'
    write(tmp_path / "LSMDC16_challenge_1000_publictect.csv", line)
    write(tmp_path / "videos" / "3086_UGLY_TRUTH" / f"{video}.avi", "")
    test = load_split("lsmdc", tmp_path, "test")
    assert test.captions == (('SOMEONE says "stop.',),)
    assert test.videos[0].path == tmp_path / "videos" / "3086_UGLY_TRUTH" / f"{video}.avi"
    write(tmp_path / "LSMDC16_challenge_1000_publictect.csv", line + "half a line\n")
    with pytest.raises(ValueError, match=r"publictect\.csv, line 2: expected video, 4 times and a sentence"):
        load_split("lsmdc", tmp_path, "test")


def test_unknown_names_list_the_known_ones(tmp_path):
    with pytest.raises(
        ValueError,
        match="unknown data set 'kinetics'; expected one of motion, detail, events, msrvtt, msvd, activitynet, didemo",
    ):
        load_split("kinetics", tmp_path, "train")
    for dataset in set(CAPTIONED) - {"jsonl", "pairs"}:
        with pytest.raises(ValueError, match=f"{dataset} has no split 'all'; known: train"):
            load_split(dataset, tmp_path, "all")


@pytest.mark.parametrize(
    ("dataset", "split", "expected"),
    [
        ("msrvtt", "train_9k", "MSRVTT_data.json, MSRVTT_train.9k.csv"),
        ("msvd", "test", "captions_msvd.json, test_list.txt"),
        ("activitynet", "val_1", "val_1.json"),
        ("didemo", "test", "didemo_test_label.tmass.csv"),
        ("lsmdc", "train", "LSMDC16_annos_training.csv"),
    ],
)
def test_a_wrong_folder_lists_files_expected_and_found(tmp_path, dataset, split, expected):
    write(tmp_path / "readme.md", "")
    with pytest.raises(ValueError, match=f"expected {expected} .*found there: readme.md"):
        load_split(dataset, tmp_path, split)
