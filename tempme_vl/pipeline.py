"""From a video file and a question to an answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from tempme_vl.data.reader import ClipReader
from tempme_vl.data.splits import Clip
from tempme_vl.data.transforms import ClipTransform, Preprocess
from tempme_vl.pretrained import load_kind
from tempme_vl.tasks.qa import VideoQAModel, load_qa_model
from tempme_vl.tasks.qa.zero_shot import ZeroShotQA
from tempme_vl.tasks.retrieval import RETRIEVAL, load_retrieval_model
from tempme_vl.tasks.umt_retrieval import UMT_RETRIEVAL


class VideoQA:
    """A question answering model with what reads its videos.

        qa = VideoQA.from_pretrained("runs/motion-decoder-tempme/best")
        qa.answer("clip.mp4", "which way does the object move")

    Args:
        model: trained to answer questions, or a retrieval model that does so zero-shot.
        device: where it runs.
        timeout: seconds a decoder may take before it is ended; None decodes in this process without a limit.
    """

    def __init__(
        self, model: VideoQAModel | ZeroShotQA, device: str | torch.device = "cpu", timeout: float | None = 60.0
    ):
        self.model, self.device = model.to(device).eval(), torch.device(device)
        preprocess = Preprocess.from_dict(model.frontend.config["preprocess"])
        self.reader = ClipReader(
            model.frontend.schedule.frames,
            ClipTransform(preprocess),
            sampling=model.input["sampling"],
            timeout=timeout,
            on_broken="raise",
        )

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        answers: Sequence[str] = (),
        device: str | torch.device = "cpu",
        timeout: float | None = 60.0,
    ) -> VideoQA:
        """Reads the folder of a model.

        Args:
            directory: what `save_pretrained` of a question answering or a retrieval model wrote.
            answers: those that a retrieval model tries where a question has no options.

        Raises:
            ValueError: a folder of another kind of model; answers for a model that has its own.
        """
        if load_kind(directory) in RETRIEVAL | UMT_RETRIEVAL:
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
        asked["video"] = self.reader(Clip(str(video), Path(video), start, end)).video
        asked["frame_mask"] = torch.ones(len(asked["video"]))
        prediction = self.model({name: value[None].to(self.device) for name, value in asked.items()})["prediction"]
        (row,) = prediction.tolist()
        return options[row[0]] if options else self.model.text(row)
