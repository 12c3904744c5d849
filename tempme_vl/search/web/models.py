"""What the REST interface takes and gives, as its OpenAPI description has it."""

from __future__ import annotations

from pydantic import BaseModel, Field


class Segment(BaseModel):
    """A part of an indexed video."""

    path: str = Field(description="relative to the indexed folder")
    start: float = Field(ge=0, description="seconds")
    end: float = Field(ge=0, description="seconds")


class HitFound(Segment):
    """A segment that was found."""

    segment: int = Field(description="its number in the file")
    score: float = Field(
        description="the higher the better, -1 to 1, or with fine=matching a logit; by it hits are ranked"
    )
    coarse: float = Field(description="of the first stage")
    duration: float = Field(description="of the file, in seconds")


class Answered(BaseModel):
    """What every answer of a model says."""

    times: dict[str, float] = Field(description="milliseconds by stage, of which 'waiting' is for other requests")


class SearchAnswer(Answered):
    """The best segments, the best first."""

    hits: list[HitFound]
    kept: bool = Field(description="whether hits and times are those of the same search shortly before")
    upload: str | None = Field(None, description="names the file that was sent, for a while, instead of q")


class PatchFrame(BaseModel):
    """The parts of one frame that the nearest tokens hold."""

    time: float = Field(description="seconds of the video")
    score: float = Field(description="of the best token that holds something of it")
    boxes: list[tuple[float, float, float, float]] = Field(description="left, top, width, height in pixels")


class RegionsAnswer(Answered):
    """Where the tokens of a segment that are nearest to the query come from."""

    width: int = Field(description="of the video's frames, in pixels")
    height: int
    scores: list[float] = Field(description="of the tokens, the nearest first")
    frames: list[PatchFrame] = Field(description="those of which these tokens hold something, in order")


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
    index: dict[str, str | int | float] = Field(description="rows, model and versions, as the index tells them")
    tokens: bool = Field(description="whether there are single tokens, for fine=maxsim and for regions")
    matching: bool = Field(description="whether there is fine=matching, for texts: the model's own score of a match")
    questions: bool = Field(description="whether POST /api/ask answers")
    max_upload_bytes: int
    reindexing: str = Field(description="'not asked for', 'running', or what the last one did")
