"""Retrieval splits as torch datasets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from video_files import different, write_video

from tempme_vl.data.reader import VideoReader
from tempme_vl.data.retrieval import EvalCaptions, EvalVideos, TrainPairs, caption_id
from tempme_vl.data.splits import RetrievalSplit, Video
from tempme_vl.data.transforms import Preprocess, VideoTransform
from tempme_vl.tasks.losses import contrastive_loss
from tempme_vl.text.tokenizers import CLIPTokenizer
from tempme_vl.training.sampler import StepSampler

CAPTIONS = (("a dog runs", "a dog"), ("a cat sleeps",), ("A dog",), ("a broken one",))


@pytest.fixture
def split(tmp_path: Path) -> RetrievalSplit:
    paths = [write_video(tmp_path / f"{name}.mp4", num_frames=n) for name, n in (("a", 20), ("b", 30), ("c", 25))]
    (tmp_path / "d.mp4").write_bytes(b"no video")
    videos = [Video(path.stem, path) for path in (*paths, tmp_path / "d.mp4")]
    return RetrievalSplit("test/train", tuple(videos), CAPTIONS)


@pytest.fixture
def reader(tmp_path: Path) -> VideoReader:
    transform = VideoTransform(Preprocess(image_size=16), "randaugment")
    return VideoReader(4, transform, timeout=None, broken_log=tmp_path / "broken.jsonl", cache="memory")


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(value, right[key]) if isinstance(value, torch.Tensor) else value == right[key]
        for key, value in left.items()
    )


def test_every_caption_is_a_pair_with_its_video(split: RetrievalSplit, reader: VideoReader) -> None:
    pairs = TrainPairs(split, reader, CLIPTokenizer(6))
    items = [pairs[0, index] for index in range(len(pairs))]
    assert [item["name"] for item in items] == ["a#0", "a#1", "b#0", "c#0", "d#0"]
    assert [item["video_id"] for item in items] == [0, 0, 1, 2, 3]
    assert [item["valid"] for item in items] == [1, 1, 1, 1, 0]
    assert items[1]["text_id"] == items[3]["text_id"] == caption_id("a dog")
    assert len({item["text_id"] for item in items}) == 4
    for item in items:
        assert (item["video"].shape, item["frame_mask"].tolist()) == ((4, 3, 16, 16), [1] * 4)
        assert item["text_ids"].shape == item["text_mask"].shape == (6,)
    plain = replace(reader, transform=VideoTransform(Preprocess(image_size=16)))
    for item, video in zip(items, [split.videos[item["video_id"]] for item in items], strict=True):
        assert torch.equal(item["times"], plain(video).times)
        assert item["times"].shape == (4,) and item["times"].diff().gt(0).all()


def test_a_sample_depends_on_seed_epoch_and_index_alone(split: RetrievalSplit, reader: VideoReader) -> None:
    first, second = (TrainPairs(split, reader, CLIPTokenizer(6), seed=3) for _ in range(2))
    _ = [second[1, index] for index in range(3)]  # what was read before does not matter
    assert same(first[0, 2], second[0, 2])
    other_seed = TrainPairs(split, reader, CLIPTokenizer(6), seed=4)
    assert different([first[epoch, 2]["video"] for epoch in range(4)]) == 4
    assert different([part[0, 2]["video"] for part in (first, other_seed)]) == 2
    assert different([first[0, index]["video"] for index in (0, 1)]) == 2, "two captions of one video"


def test_neighbouring_seeds_share_no_epoch(tmp_path: Path) -> None:
    """Nor does anything else that sums up alike: every seed, epoch and caption has draws of its own."""
    long = Video("long", write_video(tmp_path / "long.mp4", num_frames=120))
    split = RetrievalSplit("test/train", (long,), (("a", "b"),))
    reader = VideoReader(6, VideoTransform(Preprocess(image_size=16)), "segment", timeout=None, on_broken="raise")
    parts = [TrainPairs(split, reader, CLIPTokenizer(6), seed) for seed in range(2)]
    videos = [part[epoch, index]["video"] for part in parts for epoch in range(2) for index in range(2)]
    assert different(videos) == 8


def test_loader_processes_give_the_same_batches(split: RetrievalSplit, reader: VideoReader) -> None:
    def batches(workers: int) -> list[dict[str, Any]]:
        sampler = StepSampler(5, 2, 2, seed=0)
        pairs = TrainPairs(split, reader, CLIPTokenizer(6))
        return list(DataLoader(pairs, batch_sampler=sampler, num_workers=workers))

    alone, parallel = batches(0), batches(2)
    assert len(alone) == 4
    assert all(same(left, right) for left, right in zip(alone, parallel, strict=True))


def test_a_video_that_could_not_be_read_leaves_the_loss(split: RetrievalSplit, reader: VideoReader) -> None:
    pairs = TrainPairs(split, reader, CLIPTokenizer(6))
    (batch,) = DataLoader(pairs, batch_size=5, sampler=[(0, index) for index in range(5)])
    assert batch["valid"].tolist() == [1, 1, 1, 1, 0]
    video, text = (torch.nn.functional.normalize(torch.randn(5, 8), dim=-1) for _ in range(2))
    video.requires_grad_()
    text.requires_grad_()
    ids, valid = (batch["video_id"], batch["text_id"]), batch["valid"].bool()
    loss = contrastive_loss(video, text, torch.tensor(10.0), *ids, valid)
    without = contrastive_loss(video[:4], text[:4], torch.tensor(10.0), ids[0][:4], ids[1][:4])
    torch.testing.assert_close(loss, without)
    loss.backward()
    assert video.grad is not None and text.grad is not None
    assert not video.grad[4].any() and not text.grad[4].any()
    assert video.grad[:4].any(dim=1).all()


def test_evaluation_keeps_order_and_place(split: RetrievalSplit, reader: VideoReader) -> None:
    plain = replace(reader, transform=VideoTransform(Preprocess(image_size=16)))
    videos, captions = EvalVideos(split.videos, plain), EvalCaptions(split, CLIPTokenizer(6))
    assert [videos[index]["valid"] for index in range(len(videos))] == [1, 1, 1, 0]
    assert torch.equal(videos[1]["times"], plain(split.videos[1]).times)
    assert len(captions) == 5
    assert captions.video_of_caption == [0, 0, 1, 2, 3]
    ids, mask = CLIPTokenizer(6)("a cat sleeps")
    assert same(captions[2], {"text_ids": ids, "text_mask": mask})


def test_caption_id_tells_captions_apart() -> None:
    assert caption_id("A dog runs ") == caption_id("a dog runs")
    texts = [f"caption {i}" for i in range(1000)]
    assert len({caption_id(text) for text in texts}) == 1000
    # fixed, since ranks and resumed runs must agree; a torch int64
    assert caption_id("a dog runs") == -5957876977829557608
    assert all(-(2**63) <= caption_id(text) < 2**63 for text in texts)
