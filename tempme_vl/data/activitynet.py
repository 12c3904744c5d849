"""ActivityNet Captions (Krishna et al., ICCV 2017) as paragraph retrieval: a whole video and all its sentences."""

from __future__ import annotations

import math

from tempme_vl.data.dataset import DataSet, Place, SplitNames, Texts
from tempme_vl.data.files import (
    AnnotationError,
    as_file_id,
    as_seconds,
    as_text,
    as_texts,
    each_object,
    errors_at,
    load_json,
)
from tempme_vl.data.splits import RetrievalSplit, find_either, make_split, video_stem
from tempme_vl.messages import shown

FILES = {"train": ("train.json",), "val_1": ("val_1.json", "val.json")}
VIDEO_FOLDERS = ("Activity_Videos", "Videos")


def read_split(place: Place, split: str) -> RetrievalSplit:
    """Reads train.json or val_1.json: `{id: {"duration", "timestamps", "sentences"}}`; 10,009 and 4,917 videos.

    The caption is all sentences joined by a space, the video 0 to ceil(duration) seconds; 64 words, 64 frames.
    "val_1" is what papers test on. The public id lists hold a few ids without annotations, and are not needed.
    Or, as TESTA has them, train.json or val.json: `[{"video", "caption": [sentences]}]`, of whole files.
    """
    path = find_either(place.root, FILES[split], ("captions",))
    data = load_json(path)
    captions: dict[str, list[str]] = {}
    if isinstance(data, list):
        for video_id, caption in each_object(str(path), data, _entry):
            captions.setdefault(video_id, []).append(caption)
        return make_split(f"activitynet/{split}", path, captions, place, VIDEO_FOLDERS)
    if not isinstance(data, dict):
        raise AnnotationError(f'{path}: expected {{id: {{"duration", "timestamps", "sentences"}}}}; got {shown(data)}')
    times: dict[str, tuple[float, float]] = {}
    for video_id, video in data.items():
        with errors_at(f"{path}, entry {shown(video_id)}"):
            captions[as_file_id(video_id)] = [_paragraph(video)]
            times[video_id] = (0.0, float(math.ceil(_duration(video))))
    return make_split(f"activitynet/{split}", path, captions, place, VIDEO_FOLDERS, times)


def _entry(entry: dict[str, object]) -> tuple[str, str]:
    """The id of a video and its paragraph, of TESTA's layout."""
    name = as_text("video", entry.get("video"))
    sentences = as_texts("caption", entry.get("caption"))
    return as_file_id(video_stem(name)), " ".join(sentence.strip() for sentence in sentences)


def _paragraph(video: object) -> str:
    if not isinstance(video, dict):
        raise ValueError(f"expected a JSON object; got {shown(video)}")
    sentences = as_texts("sentences", video.get("sentences"))
    timestamps = video.get("timestamps", sentences)  # not used; another number of them means that some are lost
    if not isinstance(timestamps, list | tuple) or len(timestamps) != len(sentences):
        raise ValueError(f"{len(sentences)} sentences need as many timestamps; got {shown(timestamps)}")
    return " ".join(sentence.strip() for sentence in sentences)


def _duration(video: dict[str, object]) -> float:
    seconds = as_seconds("duration", video.get("duration"))
    if not seconds:
        raise ValueError("'duration' must be more than 0 seconds")
    return seconds


DATASET = DataSet(
    title="ActivityNet Captions (Krishna et al., ICCV 2017), paragraphs",
    files="train.json and val_1.json, or train.json and val.json as TESTA has them",
    captions=Texts(read_split, tuple(FILES), SplitNames(test="val_1", holdout=500)),
    max_words=64,
    num_frames=64,
)
