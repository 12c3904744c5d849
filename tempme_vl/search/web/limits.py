"""What every answer and every request is held to, before the application sees it: the host, sizes, headers."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SMALL = 1 << 16  # bytes of a request without a file
HEADERS = {
    # scripts, styles and pictures of this server alone, none of them written inside a page
    "content-security-policy": (
        "default-src 'none'; img-src 'self'; media-src 'self'; script-src 'self'; style-src 'self'; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


def guard(app: FastAPI, hosts: Sequence[str], uploads: dict[str, int]) -> None:
    """Puts the limits around an application.

    Args:
        hosts: names that a request may ask for; "*" for any. A page elsewhere whose name is made to lead to this
            machine asks for its own name, and is refused with 400.
        uploads: by path, the most bytes of its requests; those of other paths have 64 KiB.
    """
    app.add_middleware(Sizes, uploads=uploads)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    app.add_middleware(SafeHeaders)


class Sizes:
    """Refuses a request that is too large with 413: by the length that it tells, else as soon as more has come."""

    def __init__(self, app: ASGIApp, uploads: dict[str, int]) -> None:
        self.app, self.uploads = app, uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        most, came = self.uploads.get(scope["path"], SMALL), 0
        told = Headers(scope=scope).get("content-length", "0")
        refused = f"expected at most {most} bytes; send less"
        if not told.isdecimal() or int(told) > most:
            return await JSONResponse({"detail": refused}, 413, {"connection": "close"})(scope, receive, send)

        async def counted() -> Message:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > most:
                raise HTTPException(413, refused, {"connection": "close"})
            return message

        await self.app(scope, counted, send)


class SafeHeaders:
    """Adds `HEADERS` to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, sent)
