"""The REST interface: /api/search and what belongs to it, described at /openapi.json."""

from __future__ import annotations

import hmac
from typing import Annotated

from fastapi import APIRouter, Depends, File, Form, HTTPException, Query, UploadFile
from fastapi.responses import FileResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool

from tempme_vl.search.web.interface import Fine
from tempme_vl.search.web.media import as_jpeg, media_type
from tempme_vl.search.web.models import Answers, Question, RegionsAnswer, SearchAnswer, Status
from tempme_vl.search.web.site import Site

LONGEST = 500  # characters of a text
Text = Annotated[str, Query(max_length=LONGEST)]
UploadId = Annotated[str, Query(max_length=64, description="of a file that was sent, instead of q")]
Hits = Annotated[int, Query(ge=1, le=100)]
Where = Annotated[
    str, Query(max_length=LONGEST, description="a filter in SQL, such as path LIKE 'kitchen/%' AND duration < 60")
]
Time = Annotated[float, Query(ge=0, le=1e6, description="seconds")]
Number = Annotated[int, Query(ge=0, le=1 << 30, description="of the segment, as a search tells it")]
Tokens = Annotated[int, Query(ge=1, le=64, description="the best ones")]
Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]
KEEP = {"cache-control": "private, max-age=3600"}


def api(site: Site) -> APIRouter:
    """All routes below /api."""
    router = APIRouter(prefix="/api")
    _searching(router, site)
    _files(router, site)
    _more(router, site)
    return router


def _searching(router: APIRouter, site: Site) -> None:
    @router.get("/search")
    async def search(
        q: Text = "", upload: UploadId = "", k: Hits = 10, where: Where = "", fine: Fine = "none"
    ) -> SearchAnswer:
        """The best segments for a text, or for a file that was sent before."""
        return await site.search(q, site.upload(upload) if upload else None, k, where, fine)

    @router.post("/search")
    async def search_by_file(
        file: Annotated[UploadFile, File(description="a picture or a video")],
        k: Annotated[int, Form(ge=1, le=100)] = 10,
        where: Annotated[str, Form(max_length=LONGEST)] = "",
        fine: Annotated[Fine, Form()] = "none",
    ) -> SearchAnswer:
        """The best segments for a picture or a video."""
        upload = await run_in_threadpool(site.uploads.add, file.filename or "file", file.file)
        return await site.search("", upload, k, where, fine)

    @router.get("/regions")
    async def regions(
        path: str, segment: Number, q: Text = "", upload: UploadId = "", tokens: Tokens = 4
    ) -> RegionsAnswer:
        """Where the tokens of a segment that are nearest to the query come from."""
        return await site.regions(q, site.upload(upload) if upload else None, path, segment, tokens)

    @router.post("/ask")
    async def ask(asked: Question) -> Answers:
        """Answers to a question about segments, if the server was given a model for it."""
        return await site.ask(asked)


def _files(router: APIRouter, site: Site) -> None:
    @router.get("/videos/{path:path}", response_class=FileResponse)
    async def video(path: str) -> FileResponse:
        """A file of the index, whole or in ranges."""
        file = await run_in_threadpool(site.media.file, path)
        return FileResponse(file, media_type=media_type(file), headers={"content-security-policy": "sandbox"})

    @router.get("/thumbnail", response_class=Response)
    async def thumbnail(
        path: str = "", time: Time = 0, width: Annotated[int, Query(ge=16, le=1280)] = 320, upload: UploadId = ""
    ) -> Response:
        """The frame of a video at a time, or of a file that was sent, as a JPEG."""

        def jpeg() -> bytes:
            sent = site.upload(upload) if upload else None
            if sent is not None and sent.image:
                return as_jpeg(sent.picture(), width)
            return site.media.picture(sent.file if sent else site.media.file(path), time, width).jpeg

        return Response(await run_in_threadpool(jpeg), media_type="image/jpeg", headers=KEEP)


def _more(router: APIRouter, site: Site) -> None:
    @router.get("/status")
    async def status() -> Status:
        """What is served."""
        return site.status()

    @router.post("/reindex", status_code=202)
    async def reindex(bearer: Bearer) -> Status:
        """Looks for new and changed videos; needs the token that the server was started with."""
        if site.token is None:
            raise HTTPException(403, "start the server with --token to allow it")
        given = bearer.credentials if bearer else ""
        if not hmac.compare_digest(given.encode(), site.token.encode()):
            raise HTTPException(401, "expected the server's token", {"www-authenticate": "Bearer"})
        if not site.reindexing.start():
            raise HTTPException(409, "it runs already")
        return site.status()
