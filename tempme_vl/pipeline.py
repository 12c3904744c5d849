"""From video files to answers, and to vectors that texts are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from tempme_vl.data.questions import tokenized
from tempme_vl.data.reader import VideoReader
from tempme_vl.data.splits import Video
from tempme_vl.data.transforms import VideoTransform
from tempme_vl.data.video import Frames, read_frames
from tempme_vl.data.videoqa import Question
from tempme_vl.frontend import VisualFrontend
from tempme_vl.hub import find_folder
from tempme_vl.pretrained import load_kind
from tempme_vl.tasks.qa import VideoQAModel, load_qa_model
from tempme_vl.tasks.qa.zero_shot import ZeroShotQA
from tempme_vl.tasks.retrieval import AnyRetrievalModel, RetrievalConfig, RetrievalModel, load_retrieval_model
from tempme_vl.tasks.similarity.base import in_blocks
from tempme_vl.tasks.testa.pretraining import TestaPretrainingConfig
from tempme_vl.tasks.testa.retrieval import TestaRetrievalConfig
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


class ScoredAnswer(NamedTuple):
    """An answer and how good it is, 0 to 1.

    The score is a share of what the model compared: the question's options, or the answers that it can give (of a
    decoder, those that it scored whole). Of an answer that a model wrote it is the probability of its words.
    """

    text: str
    score: float


class VideoQA:
    """A question answering model with what reads its videos.

        qa = VideoQA.from_pretrained("runs/motion-decoder-tempme/best")
        qa.answer("a.mp4", "which way does the object move")
        qa.best_answers(["a.mp4", "b.mp4"], ["which way does the object move"] * 2, top_k=3)

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
        kinds = RetrievalConfig, UMTRetrievalConfig, TestaRetrievalConfig, TestaPretrainingConfig
        if load_kind(directory) in [config.kind for config in kinds]:
            return cls(ZeroShotQA(load_retrieval_model(directory), answers), device, timeout)
        if answers:
            raise ValueError(f"the model in {directory} has its own answers; only a retrieval model needs them given")
        return cls(load_qa_model(directory), device, timeout)

    @property
    def answers(self) -> tuple[str, ...]:
        """Those the model can give; empty if it writes them freely or only chooses among options."""
        return self.model.answers

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
        part = Video(str(video), Path(video), start, end)
        ((best,),) = self.best_answers([part], [question], [options])
        return best.text

    @torch.inference_mode()
    def best_answers(
        self,
        videos: Sequence[str | Path | Video],
        questions: Sequence[str],
        options: Sequence[Sequence[str]] | None = None,
        top_k: int = 1,
        batch_size: int = 8,
    ) -> list[list[ScoredAnswer]]:
        """The best answers to many questions, with their scores.

        Args:
            videos: the video of each question: a file, or a part of it, `Video(name, path, start, end)` in seconds. One
                that several questions are about is read and encoded once.
            questions: as many.
            options: of each question, to choose among; an empty one, or none at all, for the model's own answers.
            top_k: answers to a question, the best one first; fewer where there are fewer. A model that writes gives
                one.
            batch_size: videos, and questions about them, at once.

        Returns:
            a list of answers for each question.

        Raises:
            VideoError: a file that cannot be read.
            ValueError: another number of videos or options than questions; a model that needs options, or other ones.
        """
        if isinstance(videos, str | Path | Video) or isinstance(questions, str):
            raise ValueError("expected a list of videos and a list of questions: give [video], [question]")
        choices: list[tuple[str, ...]] = [()] * len(questions) if options is None else list(map(tuple, options))
        if not len(videos) == len(questions) == len(choices):
            counts = f"{len(videos)} videos, {len(questions)} questions and {len(choices)} times options"
            raise ValueError(f"expected a video (and options) for each question; got {counts}")
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1; got {top_k}")
        of_video: dict[Video, list[int]] = {}  # the numbers of the questions about each
        for number, video in enumerate(videos):
            of_video.setdefault(_part(video), []).append(number)
        asked = self._tokenized(questions, choices)  # before any video is read
        found: dict[int, list[ScoredAnswer]] = {}
        for some in _batches(list(of_video), batch_size):
            kept = self._encode(some)
            here = [(number, row) for row, part in enumerate(some) for number in of_video[part]]
            for choosing in (True, False):
                of_a_kind = [(number, row) for number, row in here if bool(choices[number]) == choosing]
                for pairs in _batches(of_a_kind, batch_size):
                    numbers, rows = zip(*pairs, strict=True)
                    batch = self._stacked([asked[number] for number in numbers])
                    said = self.model({name: value[list(rows)] for name, value in kept.items()} | batch)
                    for number, row, scores in zip(
                        numbers, said["prediction"].tolist(), said["scores"].cpu(), strict=True
                    ):
                        found[number] = self._best(row, scores, choices[number], top_k)
        return [found[number] for number in range(len(questions))]

    def _tokenized(self, questions: Sequence[str], choices: Sequence[tuple[str, ...]]) -> list[dict[str, Tensor]]:
        """The options of all filled up to the most that any has."""
        most, none = max(map(len, choices), default=0), Video("", Path())
        return [
            tokenized(self.model.tokenize, Question("", none, text, (), options), None, most if options else 0)
            for text, options in zip(questions, choices, strict=True)
        ]

    def _encode(self, parts: Sequence[Video]) -> dict[str, Tensor]:
        """What the model keeps of videos."""
        frames = [self.reader(part).video for part in parts]
        encoded = self.model(
            self._stacked([{"video": video, "frame_mask": torch.ones(len(video))} for video in frames])
        )
        return {name: encoded[name] for name in self.model.kept}

    def _stacked(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([row[name] for row in rows]).to(self.device) for name in rows[0]}

    def _best(self, prediction: list[int], scores: Tensor, options: Sequence[str], top_k: int) -> list[ScoredAnswer]:
        if self.model.writes and not options:
            return [ScoredAnswer(self.model.text(prediction), scores.item())]
        order = scores.argsort(descending=True, stable=True)[:top_k].tolist()
        considered = [number for number in order if scores[number] > 0]
        texts = [options[number] if options else self.model.text([number]) for number in considered]
        return [ScoredAnswer(text, scores[number].item()) for text, number in zip(texts, considered, strict=True)]


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
        self.head = model.head if isinstance(model, RetrievalModel) else None

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
        """(T, E) float32 on the CPU, L2-normalised; longer texts are cut as captions were in training.

        Of a model whose head compares single words or tokens what that has of texts, such as (T, L, E).
        """
        return self._text_parts(texts, batch_size)["text"]

    def encode_video(self, videos: Sequence[str | Path | Video], batch_size: int = 8) -> Tensor:
        """(V, E) float32 on the CPU, L2-normalised; UMT's are the mean of normalised frames, not normalised again.

        Of a model whose head compares single tokens what that has of videos, such as (V, M, E).

        Args:
            videos: files, or parts of them: `Video(name, path, start, end)`, in seconds.

        Raises:
            VideoError: a file that cannot be read.
        """
        return self._video_parts(videos, batch_size)["video"]

    def similarity(self, texts: Sequence[str] | Tensor, videos: Sequence[str | Path | Video] | Tensor) -> Tensor:
        """(T, V), by which evaluation ranks, of cosines -1 to 1; of either side the embeddings may be given instead.

        Raises:
            VideoError: a file that cannot be read.
            ValueError: embeddings for a head that compares more than these.
        """
        text = {"text": texts} if isinstance(texts, Tensor) else self._text_parts(texts)
        video = {"video": videos} if isinstance(videos, Tensor) else self._video_parts(videos)
        if self.head is None or self.head.products:
            return text["text"] @ video["video"].T
        if missing := {*self.head.text_parts, *self.head.video_parts} - {*text, *video}:
            names = ", ".join(sorted(missing))
            raise ValueError(f"the head {self.head.name!r} also compares {names}: give texts and videos themselves")
        return in_blocks(self.head.similarity, text, video, self.device)

    def _text_parts(self, texts: Sequence[str], batch_size: int = 64) -> dict[str, Tensor]:
        if isinstance(texts, str):
            raise ValueError(f"expected a list of texts; got the text {texts!r}: give [text]")
        return self._encode(("text",) if self.head is None else self.head.text_parts, texts, self._words, batch_size)

    def _video_parts(self, videos: Sequence[str | Path | Video], batch_size: int = 8) -> dict[str, Tensor]:
        if isinstance(videos, str | Path):
            raise ValueError(f"expected a list of videos; got {str(videos)!r}: give [video]")
        parts = ("video",) if self.head is None else self.head.video_parts
        return self._encode(parts, list(map(_part, videos)), self._frames, batch_size)

    def _words(self, text: str) -> dict[str, Tensor]:
        ids, mask = self.tokenizer(text)
        return {"text_ids": ids, "text_mask": mask}

    def _frames(self, video: Video) -> dict[str, Tensor]:
        frames = self.reader(video).video
        return {"video": frames, "frame_mask": torch.ones(len(frames))}

    @torch.inference_mode()
    def _encode(
        self, parts: Sequence[str], items: Sequence[T], prepare: Callable[[T], dict[str, Tensor]], batch_size: int
    ) -> dict[str, Tensor]:
        """The parts that are compared, on the CPU: what the model gives, or what its input holds."""
        rows: dict[str, list[Tensor]] = {name: [] for name in parts}
        for some in _batches(items, batch_size):
            made = [prepare(item) for item in some]
            batch = {name: torch.stack([one[name] for one in made]).to(self.device) for name in made[0]}
            found = {**batch, **self.model(batch)}
            for name in parts:
                rows[name].append(found[name].float().cpu())
        none = torch.empty(0, self.model.frontend.shape.embed_dim)
        return {name: torch.cat(some) if some else none for name, some in rows.items()}


def _part(video: str | Path | Video) -> Video:
    return video if isinstance(video, Video) else Video(str(video), Path(video))


def _shown(frontend: VisualFrontend) -> str:
    schedule = frontend.schedule
    given = schedule.input_tokens
    return f"{schedule.method}: {schedule.frames} frames, {schedule.output_tokens} of {given} tokens"


def _reader(frontend: VisualFrontend, sampling: str, timeout: float | None) -> VideoReader:
    transform = VideoTransform(frontend.preprocessing, normalize=False)
    return VideoReader(frontend.schedule.frames, transform, sampling=sampling, timeout=timeout, on_broken="raise")


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    if size < 1:
        raise ValueError(f"batch_size must be at least 1; got {size}")
    return (items[first : first + size] for first in range(0, len(items), size))
