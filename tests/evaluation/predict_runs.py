"""Tiny models of every kind that answers questions about videos, and what a rank does with them.

`predicted_by_rank`, `score` and `run_script` run in processes of their own.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any, Protocol

import torch

from tempme_vl.data.datasets import load_questions
from tempme_vl.data.motion import render_motion
from tempme_vl.data.videoqa import QASplit, answer_vocabulary
from tempme_vl.evaluation.options import EVAL_VIDEOQA
from tempme_vl.evaluation.predict import predict
from tempme_vl.pipeline import VideoQA
from tempme_vl.tasks.qa.create import create_qa_model
from tempme_vl.tasks.retrieval import create_retrieval_model
from tempme_vl.text.tokenizers import word_vocabulary
from tempme_vl.training import distributed

COMMAND = Path(__file__).parents[2] / "eval" / "videoqa.py"
FRAMES = 4
TEMPME: dict[str, Any] = {"method": "tempme", "num_frames": FRAMES, "clip_position_std": 0.5}
TEMPME |= {"r": 1, "merge_layers": (2, 3), "merge_frames": (2, 2), "cross_percent": 30, "intra_percent": 10}
TRAINED = ("classifier", "choice", "decoder", "writer")  # a choice has no list of answers; a writer generates
ZERO_SHOT = ("retrieval", "umt_retrieval")
# 6 videos of a moving thing with 3 questions each, one of two things in turn with 2
NUM_VIDEOS, NUM_QUESTIONS = 7, 20


class Saveable(Protocol):
    def save_pretrained(self, directory: Path) -> None: ...


def render_few(root: Path) -> Path:
    """MSRVTT-QA's layout; the test videos are video20 ... video25, and video29."""
    return render_motion(root, num_train=20, num_test=6, num_order_train=2, num_order_val=1, num_order_test=1)


def read(root: Path, split: str = "test") -> QASplit:
    return load_questions("msrvtt_qa", root, split)


def create(kind: str, train: QASplit) -> Saveable:
    """A model with random weights that knows the words and the answers of a split."""
    words = word_vocabulary(text for q in train.questions for text in (q.question, *q.answers, *q.options))
    torch.manual_seed(0)
    if kind == "retrieval":
        return create_retrieval_model("open_clip:tiny", None, **TEMPME)
    if kind == "umt_retrieval":
        return create_retrieval_model("umt:tiny", None, vocabulary=words, mode="per_frame", **TEMPME)
    head = "classifier" if kind in ("classifier", "choice") else "decoder"
    answers = answer_vocabulary(train) if kind in ("classifier", "decoder") else ()
    return create_qa_model("open_clip:tiny", words, head, answers, **TEMPME)


def predicted(folder: Path, root: Path, answers: tuple[str, ...], batch_size: int, log: Path) -> dict[str, str]:
    """Answers to the test questions of a model that `create` made; broken videos are recorded."""
    qa = VideoQA.from_pretrained(folder, answers, timeout=None)
    qa.reader.on_broken, qa.reader.broken_log = "record", log
    return predict(qa.model, qa.model, read(root), qa.reader, qa.device, batch_size, workers=0)


def predicted_by_rank(*args: Any) -> dict[str, str]:
    distributed.initialize()
    return predicted(*args)


def score(arguments: list[str]) -> None:
    """eval/videoqa.py's command line."""
    EVAL_VIDEOQA.load()(EVAL_VIDEOQA.parse(arguments))


def run_script(script: Path, arguments: list[str | Path]) -> None:
    """A script as the deepspeed launcher calls it on each rank."""
    sys.argv = [str(script), *(str(argument) for argument in arguments), f"--local_rank={os.environ['LOCAL_RANK']}"]
    runpy.run_path(str(script), run_name="__main__")
