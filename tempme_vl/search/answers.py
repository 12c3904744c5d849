"""Questions answered by a question answering model about the segments of an index that fit them best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tempme_vl.data.splits import Video
from tempme_vl.pipeline import VideoQA
from tempme_vl.search.hits import Hit
from tempme_vl.search.options import AskOptions
from tempme_vl.search.query import Fine, SearchIndex


@dataclass(frozen=True)
class Answer:
    """What a model says of a segment; `score`: see `tempme_vl.pipeline.ScoredAnswer`."""

    hit: Hit
    text: str
    score: float


def ask(
    index: SearchIndex,
    question: str,
    qa: VideoQA,
    k: int = 3,
    *,
    find: str | None = None,
    answers: Sequence[str] = (),
    where: str | None = None,
    fine: Fine = "none",
) -> list[Answer]:
    """Answers by the k best segments, the best first.

    Args:
        qa: what answers.
        find: what is searched for; default: the question.
        answers: to choose among; default: the model's own, or what it writes.
        where, fine: see `SearchIndex.search`.

    Raises:
        VideoError: the file of a segment is not there any more, or broken.
        ValueError: see `SearchIndex.search` and `VideoQA.best_answers`.
    """
    hits = index.search(find or question, k, where, fine)
    parts = [Video(f"{hit.path}:{hit.segment}", index.file(hit), hit.start, hit.end) for hit in hits]
    found = qa.best_answers(parts, [question] * len(hits), [tuple(answers)] * len(hits)) if hits else []
    return [Answer(hit, best.text, best.score) for hit, (best, *_) in zip(hits, found, strict=True)]


def ask_index(index: SearchIndex, options: AskOptions) -> list[Answer]:
    """`ask` of the command's options."""
    device = options.device or index.embedder.device
    qa = VideoQA.from_pretrained(options.qa_checkpoint, device=device)
    return ask(
        index,
        options.question,
        qa,
        options.k,
        find=options.find,
        answers=options.answers,
        where=options.where,
        fine=options.fine,
    )
