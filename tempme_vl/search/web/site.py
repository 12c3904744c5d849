"""What the REST interface and the page both do: search, show where tokens come from, ask."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool

from tempme_vl.data.splits import Video
from tempme_vl.search.hits import Hit
from tempme_vl.search.web.engine import Engine, Search
from tempme_vl.search.web.interface import Fine, Query
from tempme_vl.search.web.media import Media, NotThere
from tempme_vl.search.web.models import (
    Answer,
    Answers,
    HitFound,
    PatchFrame,
    Question,
    RegionsAnswer,
    SearchAnswer,
    Status,
)
from tempme_vl.search.web.overlay import boxes
from tempme_vl.search.web.reindexing import Reindexing
from tempme_vl.search.web.uploads import Upload, Uploads


@dataclass(frozen=True)
class Site:
    """The parts of a server.

    Attributes:
        token: that reindexing asks for; None: nobody may.
        max_upload: bytes.
    """

    engine: Engine
    media: Media
    uploads: Uploads
    reindexing: Reindexing
    token: str | None
    max_upload: int

    def upload(self, upload_id: str) -> Upload:
        """A file that was sent.

        Raises:
            NotThere: it is no longer kept.
        """
        if upload := self.uploads.get(upload_id):
            return upload
        raise NotThere(f"no upload {upload_id!r}; it is kept for a while only: send the file again")

    async def search(self, q: str, upload: Upload | None, k: int, where: str = "", fine: Fine = "none") -> SearchAnswer:
        """The best segments for a text or, if there is one, for an upload.

        Raises:
            ValueError: neither of them, or see `SearchIndex.search`.
        """
        key, query = await self._query(q, upload)
        hits, times, kept = await self.engine.search(query, Search(key, k, where.strip() or None, fine))
        found = [HitFound.model_validate(vars(hit)) for hit in hits]
        return SearchAnswer(hits=found, times=times, kept=kept, upload=upload.id if upload else None)

    async def regions(self, q: str, upload: Upload | None, path: str, segment: int, tokens: int) -> RegionsAnswer:
        """Where the nearest tokens of a segment come from.

        Raises:
            ValueError: as `search`, or see `SearchIndex.locate`.
            NotThere: a path that the index does not have.
            VideoError: a file that cannot be read.
        """
        file = self.media.file(path)
        _, query = await self._query(q, upload)
        hit = Hit(path, 0.0, 0.0, 0.0, 0.0, segment, 0.0, 0)  # which it is, its path and number say
        found, times = await self.engine.locate(query, hit, tokens)
        first = await run_in_threadpool(self.media.picture, file, float(found.times[0]), 240)
        size = first.width, first.height
        marks, heat = found.patches.max(axis=0), found.heat()
        frames = [
            PatchFrame(time=float(at), score=float(warm.max()), boxes=boxes(mask, *size, found.resize))
            for at, mask, warm in zip(found.times, marks, heat, strict=True)
            if mask.any()
        ]
        return RegionsAnswer(width=size[0], height=size[1], scores=found.scores.tolist(), frames=frames, times=times)

    async def ask(self, asked: Question) -> Answers:
        """What the question answering model says about each segment.

        Raises:
            NotThere: as `regions`, or the server has no such model.
            VideoError: a file that cannot be read.
        """
        if self.engine.asker is None:
            raise NotThere("no question answering model: start the server with --qa-checkpoint")
        videos = [Video(one.path, self.media.file(one.path), one.start, one.end) for one in asked.segments]
        said, times = await self.engine.ask(asked.question, videos)
        answers = [
            Answer(**dict(segment), answer=best.text, score=best.score)
            for segment, best in zip(asked.segments, said, strict=True)
        ]
        return Answers(answers=answers, times=times)

    def status(self) -> Status:
        """What is served."""
        index = self.engine.index
        return Status(
            videos=len(index.paths),
            index=dict(index.facts()),
            tokens=index.has_tokens,
            matching=index.has_fusion,
            questions=self.engine.asker is not None,
            max_upload_bytes=self.max_upload,
            reindexing=self.reindexing.state,
        )

    async def _query(self, q: str, upload: Upload | None) -> tuple[str, Query]:
        """A query and its name."""
        if upload is not None:
            query = await run_in_threadpool(upload.picture) if upload.image else upload.file
            return f"upload {upload.id}", query
        if not q.strip():
            raise ValueError("expected a text in q, or a file; got neither")
        return f"text {q.strip()}", q.strip()
