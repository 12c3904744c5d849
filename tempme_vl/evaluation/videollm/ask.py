"""A video-language model's answers to the questions of a split, and how many tokens it read for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from tempme_vl.data.reader import VideoReader
from tempme_vl.data.retrieval import EvalVideos
from tempme_vl.data.transforms import Preprocess, VideoTransform
from tempme_vl.data.videoqa import QASplit
from tempme_vl.evaluation.encode import encode_all
from tempme_vl.tasks.videollm import VideoLLM


@dataclass(frozen=True)
class Asked:
    """What a model answered.

    Attributes:
        prompts: of all questions, by their ids.
        predictions: by question id. Questions about videos that could not be read, and those that nothing was written
            to, have no answer.
        visual_tokens, prompt_tokens: by question id, those of the video, and all of the prompt with it, that the
            language model read, the mean over its layers; none for a video that could not be read.
        layer_tokens: all that each of its layers read, the mean over the questions; () if no video could be read.
    """

    prompts: Mapping[str, str]
    predictions: Mapping[str, str]
    visual_tokens: Mapping[str, int]
    prompt_tokens: Mapping[str, int]
    layer_tokens: tuple[float, ...] = ()


def as_they_are(image_size: int, augment: str = "none") -> VideoTransform:
    """Square uint8 frames: a host's own preprocessing does the rest."""
    return VideoTransform(Preprocess(image_size), augment, normalize=False)


class NumberedVideos(Dataset):
    """Videos with the number of each."""

    def __init__(self, videos: EvalVideos):
        self.videos = videos

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.videos[index], "number": index}


def ask(
    model: VideoLLM,
    encode: Any,
    split: QASplit,
    reader: VideoReader,
    device: torch.device,
    batch_size: int,
    workers: int,
) -> Asked:
    """Written answers to a split, all ranks together.

    Args:
        encode: the model or its DeepSpeed engine.
        batch_size: questions of one `Compressed.prepare`.
    """
    encode.eval()
    prompts = {q.question_id: model.tokenize(q.question, None, q.options)["prompt"] for q in split.questions}
    in_order = list(prompts.values())

    def write(batch: Mapping[str, Any]) -> Mapping[str, Any]:
        asked = [in_order[number] for number in batch["number"].tolist()]
        written = encode({"video": batch["video"], "times": batch["times"], "prompt": asked})
        read, layers = model.compressed.read, model.compressed.layer_tokens
        return {**written, "read": torch.tensor(read), "layers": torch.tensor(layers)}

    videos = NumberedVideos(EvalVideos([question.video for question in split.questions], reader))
    keep = ("prediction", "read", "valid", "layers")
    found = encode_all(write, videos, device, keep, batch_size, workers, label="questions")
    rows = zip(prompts, *(found[name].tolist() for name in keep[:3]), strict=True)
    valid = {question_id: (row, read) for question_id, row, read, is_valid in rows if is_valid}
    answers = {question_id: model.text(row) for question_id, (row, _) in valid.items()}
    return Asked(
        prompts,
        {question_id: text for question_id, text in answers.items() if text},
        {question_id: read[0] for question_id, (_, read) in valid.items()},
        {question_id: read[1] for question_id, (_, read) in valid.items()},
        tuple(found["layers"][found["valid"].bool()].double().mean(0).tolist()) if valid else (),
    )
