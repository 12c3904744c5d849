"""Retrieval splits as torch datasets: caption-video pairs to train on, videos and captions to evaluate."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tempme_vl.data.reader import VideoReader
from tempme_vl.data.sampling import sample_generator
from tempme_vl.data.splits import RetrievalSplit, Video

Tokenizer = Callable[[str], tuple[Tensor, Tensor]]  # a caption -> ids and mask (L,)


class TrainPairs(Dataset):
    """Every caption of every video with its video, addressed by (epoch, index).

    Everything random of a sample is drawn from (seed, epoch, index), so neither ranks, workers nor a resumed run
    change it.

    Items: video (F, 3, S, S) float32, frame_mask (F,), times (F,) in seconds (see `VideoInput`), text_ids and
    text_mask (L,), video_id and text_id int64 (equal for the same video, the same caption), valid 0 or 1, name.
    """

    def __init__(self, split: RetrievalSplit, reader: VideoReader, tokenizer: Tokenizer, seed: int = 0):
        self.split, self.reader, self.tokenizer, self.seed = split, reader, tokenizer, seed
        self.pairs = split.pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        video_index, caption_index = self.pairs[index]
        video, caption = self.split.videos[video_index], self.split.captions[video_index][caption_index]
        read = self.reader(video, sample_generator(self.seed, epoch, index))
        ids, mask = self.tokenizer(caption)
        return {
            "video": read.video,
            "frame_mask": torch.ones(len(read.video)),
            "times": read.times,
            "text_ids": ids,
            "text_mask": mask,
            "video_id": video_index,
            "text_id": caption_id(caption),
            "valid": int(read.valid),
            "name": f"{video.video_id}#{caption_index}",
        }


class EvalVideos(Dataset):
    """Videos in order. Items: video, frame_mask, times, valid."""

    def __init__(self, videos: Sequence[Video], reader: VideoReader):
        self.videos, self.reader = videos, reader

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> dict[str, Any]:
        read = self.reader(self.videos[index])
        return {
            "video": read.video,
            "frame_mask": torch.ones(len(read.video)),
            "times": read.times,
            "valid": int(read.valid),
        }


class EvalCaptions(Dataset):
    """All captions of a split, video by video. Items: text_ids, text_mask."""

    def __init__(self, split: RetrievalSplit, tokenizer: Tokenizer):
        self.captions = [caption for texts in split.captions for caption in texts]
        self.video_of_caption = [video for video, _ in split.pairs]
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids, mask = self.tokenizer(self.captions[index])
        return {"text_ids": ids, "text_mask": mask}


def caption_id(text: str) -> int:
    """A number that is equal for equal captions (case and outer blanks aside), the same in every process."""
    digest = hashlib.blake2b(text.strip().lower().encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
