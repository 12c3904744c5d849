"""What the REST interface takes and gives, as its OpenAPI description has it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


class Segment(BaseModel):
    """A part of an indexed video."""

    path: str = Field(description="relative to the indexed folder")
    start: float = Field(ge=0, description="seconds")
    end: float = Field(ge=0, description="seconds")


class Hit(Segment):
    """A segment that was found."""

    score: float = Field(description="the higher the better")


class Answered(BaseModel):
    """What every answer of a model says."""

    times: dict[str, float] = Field(description="milliseconds by stage, of which 'waiting' is for other requests")


class SearchAnswer(Answered):
    """The best segments, the best first."""

    hits: list[Hit]
    kept: bool = Field(description="whether hits and times are those of the same search shortly before")
    upload: str | None = Field(None, description="names the file that was sent, for a while, instead of q")


class PatchFrame(BaseModel):
    """The parts of one frame that the best tokens were merged from."""

    time: float = Field(description="seconds of the video")
    boxes: list[tuple[float, float, float, float]] = Field(description="left, top, width, height in pixels")


class RegionsAnswer(Answered):
    """Where the best tokens of a segment come from."""

    width: int = Field(description="of the video's frames, in pixels")
    height: int
    frames: list[PatchFrame]


class Question(BaseModel):
    """A question about segments."""

    question: str = Field(min_length=1, max_length=500)
    segments: list[Segment] = Field(min_length=1, max_length=10)


class Answer(Segment):
    """What the model says about one segment."""

    answer: str
    score: float = Field(description="0 to 1")


class Answers(Answered):
    """In the order of the segments."""

    answers: list[Answer]


class Status(BaseModel):
    """What is served."""

    videos: int
    index: dict[str, Any] = Field(description="rows, model and versions, as the index tells them")
    tokens: bool = Field(description="whether there are single tokens, for fine=maxsim and for regions")
    questions: bool = Field(description="whether POST /api/ask answers")
    max_upload_bytes: int
    reindexing: str = Field(description="'no', 'running', or what the last one ended with")
