"""From video files to answers, and to vectors that texts are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from tempme_vl.data.reader import VideoReader
from tempme_vl.data.splits import Video
from tempme_vl.data.transforms import VideoTransform
from tempme_vl.data.video import Frames, read_frames
from tempme_vl.frontend import VisualFrontend
from tempme_vl.hub import find_folder
from tempme_vl.pretrained import load_kind
from tempme_vl.tasks.qa import VideoQAModel, load_qa_model
from tempme_vl.tasks.qa.zero_shot import ZeroShotQA
from tempme_vl.tasks.retrieval import AnyRetrievalModel, RetrievalConfig, load_retrieval_model
from tempme_vl.tasks.umt_retrieval import UMTRetrievalConfig

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tempme_vl.hub import HubOptions

T = TypeVar("T")


def read_video(
    path: str | Path,
    num_frames: int,
    sampling: str = "fps1",
    start: float | None = None,
    end: float | None = None,
    timeout: float | None = 60.0,
) -> Frames:
    """Some frames of a video file: `.pixels` (F, H, W, 3) uint8 RGB, their `.times` (F,) in seconds, `.fps`.

    Args:
        sampling: a name in `tempme_vl.data.sampling.SAMPLING`.
        start, end: seconds, the part of the video that is looked at.
        timeout: seconds until decoding, which runs in a process of its own, is ended; None: in this process, no limit.

    Raises:
        VideoError: a file that cannot be read.
    """
    return read_frames(path, num_frames, sampling=sampling, start=start, end=end, timeout=timeout)


class VideoQA:
    """A question answering model with what reads its videos.

        qa = VideoQA.from_pretrained("runs/motion-decoder-tempme/best")
        qa.answer("video.mp4", "which way does the object move")

    Args:
        model: trained to answer questions, or a retrieval model that does so zero-shot.
        device: where it runs.
        timeout: seconds a decoder may take before it is ended; None decodes in this process without a limit.
    """

    def __init__(
        self, model: VideoQAModel | ZeroShotQA, device: str | torch.device = "cpu", timeout: float | None = 60.0
    ):
        self.model, self.device = model.to(device).eval(), torch.device(device)
        self.reader = _reader(model.frontend, model.input.sampling, timeout)

    def __repr__(self) -> str:
        given = f"{len(self.answers)} answers" if self.answers else "free answers or options"
        return f"VideoQA({type(self.model).__name__}, {given}, {_shown(self.model.frontend)}, on {self.device})"

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        answers: Sequence[str] = (),
        device: str | torch.device = "cpu",
        timeout: float | None = 60.0,
        **hub: Unpack[HubOptions],
    ) -> VideoQA:
        """Reads the folder of a model.

        Args:
            source: what `save_pretrained` of a question answering or a retrieval model wrote, or a name on the Hugging
                Face hub, "organisation/model".
            answers: those that a retrieval model tries where a question has no options.
            hub: revision, token, cache_dir, local_files_only (`tempme_vl.hub.HubOptions`).

        Raises:
            ValueError: a folder of another kind of model; answers for a model that has its own; or see
                `tempme_vl.hub.find_folder`.
        """
        directory = find_folder(source, **hub)
        if load_kind(directory) in (RetrievalConfig.kind, UMTRetrievalConfig.kind):
            return cls(ZeroShotQA(load_retrieval_model(directory), answers), device, timeout)
        if answers:
            raise ValueError(f"the model in {directory} has its own answers; only a retrieval model needs them given")
        return cls(load_qa_model(directory), device, timeout)

    @property
    def answers(self) -> tuple[str, ...]:
        """Those the model can give; empty if it writes them freely or only chooses among options."""
        return self.model.answers

    @torch.inference_mode()
    def answer(
        self,
        video: str | Path,
        question: str,
        options: Sequence[str] = (),
        start: float | None = None,
        end: float | None = None,
    ) -> str:
        """The answer to one question about a video file.

        Args:
            options: to choose among; else the model's own answers, or what it writes.
            start, end: seconds, the part of the video that is looked at; default: its beginning and end.

        Raises:
            VideoError: a file that cannot be read.
            ValueError: a model that needs options, or other ones.
        """
        asked = self.model.tokenize(question, None, options)
        asked["video"] = self.reader(Video(str(video), Path(video), start, end)).video
        asked["frame_mask"] = torch.ones(len(asked["video"]))
        prediction = self.model({name: value[None].to(self.device) for name, value in asked.items()})["prediction"]
        (row,) = prediction.tolist()
        return options[row[0]] if options else self.model.text(row)


class VideoRetrieval:
    """A retrieval model with what reads its videos and its texts.

        retrieval = VideoRetrieval.from_pretrained("runs/motion-tempme/best")
        scores = retrieval.similarity(["a red ball moves left"], ["a.mp4", "b.mp4"])

    Args:
        model: a dual encoder, or UMT's, whose embeddings alone are compared here.
        device: where it runs.
        timeout: seconds a decoder may take before it is ended; None decodes in this process without a limit.
    """

    def __init__(self, model: AnyRetrievalModel, device: str | torch.device = "cpu", timeout: float | None = 60.0):
        self.model, self.device = model.to(device).eval(), torch.device(device)
        self.tokenizer = model.words.tokenizer(model.input.max_words)
        self.reader = _reader(model.frontend, model.input.sampling, timeout)

    def __repr__(self) -> str:
        return f"VideoRetrieval({type(self.model).__name__}, {_shown(self.model.frontend)}, on {self.device})"

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        device: str | torch.device = "cpu",
        timeout: float | None = 60.0,
        **hub: Unpack[HubOptions],
    ) -> VideoRetrieval:
        """Reads the folder that `save_pretrained` of a retrieval model, or a recipe, wrote.

        Args:
            source: the folder, or a name on the Hugging Face hub, "organisation/model".
            hub: revision, token, cache_dir, local_files_only (`tempme_vl.hub.HubOptions`).

        Raises:
            ValueError: a folder of another kind of model, or a damaged one; or see `tempme_vl.hub.find_folder`.
        """
        return cls(load_retrieval_model(source, **hub), device, timeout)

    def encode_text(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """(T, E) float32 on the CPU, L2-normalised; longer texts are cut as captions were in training."""
        if isinstance(texts, str):
            raise ValueError(f"expected a list of texts; got the text {texts!r}: give [text]")
        return self._encode("text", texts, self._words, batch_size)

    def encode_video(self, videos: Sequence[str | Path | Video], batch_size: int = 8) -> Tensor:
        """(V, E) float32 on the CPU, L2-normalised; UMT's are the mean of normalised frames, not normalised again.

        Args:
            videos: files, or parts of them: `Video(name, path, start, end)`, in seconds.

        Raises:
            VideoError: a file that cannot be read.
        """
        if isinstance(videos, str | Path):
            raise ValueError(f"expected a list of videos; got {str(videos)!r}: give [video]")
        parts = [video if isinstance(video, Video) else Video(str(video), Path(video)) for video in videos]
        return self._encode("video", parts, self._frames, batch_size)

    def similarity(self, texts: Sequence[str] | Tensor, videos: Sequence[str | Path | Video] | Tensor) -> Tensor:
        """(T, V), -1 to 1, by which evaluation ranks; of either side the embeddings may be given instead."""
        text_TE = texts if isinstance(texts, Tensor) else self.encode_text(texts)
        video_VE = videos if isinstance(videos, Tensor) else self.encode_video(videos)
        return text_TE @ video_VE.T

    def _words(self, text: str) -> dict[str, Tensor]:
        ids, mask = self.tokenizer(text)
        return {"text_ids": ids, "text_mask": mask}

    def _frames(self, video: Video) -> dict[str, Tensor]:
        frames = self.reader(video).video
        return {"video": frames, "frame_mask": torch.ones(len(frames))}

    @torch.inference_mode()
    def _encode(
        self, side: str, items: Sequence[T], prepare: Callable[[T], dict[str, Tensor]], batch_size: int
    ) -> Tensor:
        rows = [torch.empty(0, self.model.frontend.shape.embed_dim)]
        for some in _batches(items, batch_size):
            made = [prepare(item) for item in some]
            batch = {name: torch.stack([one[name] for one in made]).to(self.device) for name in made[0]}
            rows.append(self.model(batch)[side].float().cpu())
        return torch.cat(rows)


def _shown(frontend: VisualFrontend) -> str:
    schedule = frontend.schedule
    given = schedule.frames * schedule.tokens
    return f"{schedule.method}: {schedule.frames} frames, {schedule.output_tokens} of {given} tokens"


def _reader(frontend: VisualFrontend, sampling: str, timeout: float | None) -> VideoReader:
    transform = VideoTransform(frontend.preprocessing)
    return VideoReader(frontend.schedule.frames, transform, sampling=sampling, timeout=timeout, on_broken="raise")


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    if size < 1:
        raise ValueError(f"batch_size must be at least 1; got {size}")
    return (items[first : first + size] for first in range(0, len(items), size))
