"""The application of a server: its parts put together, and errors as answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from tempme_vl import __version__
from tempme_vl.data.video import VideoError
from tempme_vl.search.web.api import api
from tempme_vl.search.web.engine import Asker, Busy, Engine
from tempme_vl.search.web.interface import Index
from tempme_vl.search.web.limits import guard
from tempme_vl.search.web.media import Media, NotThere
from tempme_vl.search.web.page import pages
from tempme_vl.search.web.reindexing import Reindexing
from tempme_vl.search.web.site import Site
from tempme_vl.search.web.uploads import Uploads

FORM = 1 << 12  # bytes of a form around a file


def create_app(
    index: Index,
    build: Callable[[], str],
    *,
    asker: Asker | None = None,
    token: str | None = None,
    max_upload: int = 64 << 20,
    hosts: Sequence[str] = ("*",),
) -> FastAPI:
    """The server of an index: REST below /api, a page at /.

    Args:
        build: brings it up to date, and says what it did.
        asker: answers questions; None: nobody does.
        token: that reindexing asks for; None: it is refused.
        max_upload: bytes of a file.
        hosts: names under which the server may be asked; "*" for any.
    """
    engine = Engine(index, asker)
    media, uploads = Media(index), Uploads()
    site = Site(engine, media, uploads, Reindexing(build), token, max_upload)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        engine.close()
        uploads.close()

    # the pages that FastAPI has for its description load their scripts from elsewhere; ours is in pages
    app = FastAPI(title="Video search", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.include_router(api(site))
    pages(app, site)
    guard(app, hosts, dict.fromkeys(("/api/search", "/search"), max_upload + FORM))
    for kind, status in ((NotThere, 404), (Busy, 503), (ValueError, 400)):
        app.add_exception_handler(kind, _answers(status))
    return app


def _answers(status: int) -> Callable[[Request, Exception], JSONResponse]:
    def answer(request: Request, error: Exception) -> JSONResponse:
        # which does not tell where the file lies
        text = f"the video cannot be read: {error.cause}" if isinstance(error, VideoError) else str(error)
        return JSONResponse({"detail": text}, status)

    return answer
