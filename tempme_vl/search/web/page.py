"""The page: a form, ranked segments as cards, a player. Rendered here; every state of it is an address.

The little that a browser has to do itself (the shade over a playing video, keys, parts loaded later) is static/page.js.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, File, Form, Query, UploadFile
from fastapi.responses import HTMLResponse, RedirectResponse
from jinja2 import Environment, FileSystemLoader
from starlette.concurrency import run_in_threadpool
from starlette.staticfiles import StaticFiles

from tempme_vl.data.video import VideoError
from tempme_vl.search.web import views
from tempme_vl.search.web.api import LONGEST, Hits, Number, Text, Time, Tokens, UploadId, Where
from tempme_vl.search.web.engine import Busy
from tempme_vl.search.web.interface import Fine
from tempme_vl.search.web.media import NotThere
from tempme_vl.search.web.models import Question, SearchAnswer, Segment
from tempme_vl.search.web.overlay import svg_shade
from tempme_vl.search.web.site import Site
from tempme_vl.search.web.views import State

HERE = Path(__file__).parent
BROWSED = 24  # videos on the page without a query
Chosen = Annotated[int | None, Query(ge=1, le=100, description="the number of the result that is played")]


def pages(app: FastAPI, site: Site) -> None:
    """The page at /, what it loads later, and a description of the REST interface at /docs."""
    templates = Environment(loader=FileSystemLoader(HERE / "templates"), autoescape=True, trim_blocks=True)

    def shown(template: str, code: int = 200, **values: Any) -> HTMLResponse:
        return HTMLResponse(templates.get_template(template).render(values), code, {"cache-control": "no-store"})

    app.mount("/static", StaticFiles(directory=HERE / "static"))
    _search_page(app, site, shown)
    _fragments(app, site, shown)

    @app.get("/docs", include_in_schema=False)
    async def reference() -> HTMLResponse:
        return shown("reference.html", description=app.openapi())


def _search_page(app: FastAPI, site: Site, shown: Any) -> None:
    @app.get("/", include_in_schema=False)
    async def page(
        q: Text = "", upload: UploadId = "", k: Hits = 12, where: Where = "", fine: Fine = "none", hit: Chosen = None
    ) -> HTMLResponse:
        state = State(q.strip(), upload, k, where.strip(), fine, hit)
        name, problem, code = "", "", 200
        answer = SearchAnswer(hits=[], kept=False, times={}, upload=None)
        try:
            sent = site.upload(upload) if upload else None
            name = sent.name if sent else ""
            if state.asked:
                answer = await site.search(state.q, sent, k, state.where, fine)
        except (NotThere, Busy, ValueError) as error:
            problem, code = _in_words(error), _code(error)
        values = (
            views.results(state, answer)
            if state.asked
            else views.browsed(list(islice(site.engine.index.paths, BROWSED)))
        )
        status = site.status()
        values |= {"problem": problem, "status": status, "facts": views.facts(status)}
        return shown("page.html", code, form=views.form(state, name, status), asked=state.asked, **values)

    @app.post("/search", include_in_schema=False)
    async def send(
        file: Annotated[UploadFile, File()],
        k: Annotated[int, Form(ge=1, le=100)] = 12,
        where: Annotated[str, Form(max_length=LONGEST)] = "",
        fine: Annotated[Fine, Form()] = "none",
    ) -> RedirectResponse:
        upload = await run_in_threadpool(site.uploads.add, file.filename or "file", file.file)
        return RedirectResponse(State("", upload.id, k, where.strip(), fine, None).link(), 303)


def _fragments(app: FastAPI, site: Site, shown: Any) -> None:
    @app.get("/regions", include_in_schema=False)
    async def regions(
        path: str, segment: Number, q: Text = "", upload: UploadId = "", tokens: Tokens = 4
    ) -> HTMLResponse:
        try:
            found = await site.regions(q, site.upload(upload) if upload else None, path, segment, tokens)
        except (NotThere, Busy, ValueError) as error:
            return shown("problem.html", _code(error), problem=_in_words(error))
        size = found.width, found.height
        frames = [views.Frame.of(path, one.time, svg_shade(one.boxes, *size)) for one in found.frames]
        return shown("strip.html", width=size[0], height=size[1], frames=frames, times=views.timed(found.times))

    @app.get("/ask", include_in_schema=False)
    async def ask(
        path: str, start: Time, end: Time, question: Annotated[str, Query(min_length=1, max_length=LONGEST)]
    ) -> HTMLResponse:
        try:
            asked = Question(question=question, segments=[Segment(path=path, start=start, end=end)])
            said = await site.ask(asked)
        except (NotThere, Busy, ValueError) as error:
            return shown("problem.html", _code(error), problem=_in_words(error))
        (best,) = said.answers
        return shown("answer.html", answer=best.answer, score=f"{best.score:.0%}", times=views.timed(said.times))


def _code(error: Exception) -> int:
    return 404 if isinstance(error, NotThere) else 503 if isinstance(error, Busy) else 400


def _in_words(error: Exception) -> str:
    return error.cause if isinstance(error, VideoError) else str(error)
