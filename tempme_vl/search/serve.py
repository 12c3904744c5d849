"""The command `tempme-vl serve`: a search page and a REST interface of an index."""

from __future__ import annotations

import ipaddress
import os
import socket
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from tempme_vl.command import at_least
from tempme_vl.command_line import FIRST_WORD, Command, Example

if TYPE_CHECKING:
    from fastapi import FastAPI

TOKEN = "TEMPME_VL_TOKEN"  # environment variable
NEEDED = ("fastapi", "uvicorn", "multipart", "jinja2")
LOCAL = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class ServeOptions:
    """Serve an index of videos: a page to search in a browser, and a REST interface described at /docs.

    Everything that the page needs comes from this server; no other is asked. Whoever reaches the port sees the videos:
    without --host that is this machine alone.
    """

    index: Path = field(metadata=FIRST_WORD)
    """Folder of the index."""
    host: str = "127.0.0.1"
    """Address that is listened on; 0.0.0.0 for all of this machine's."""
    port: int = 8000
    """Port; 0 for any that is free."""
    names: tuple[str, ...] = ()
    """Names that a browser may ask this server by, others are refused; * for any. Default: localhost and its addresses,
    or any with another --host."""
    checkpoint: str | None = None
    """Where the model of the index lies now. Default: where it lay."""
    qa_checkpoint: str | None = None
    """Folder of a question answering model, or its name on the Hugging Face hub: it answers what visitors ask about
    hits. Or of a retrieval model, which chooses among --answers."""
    answers: tuple[str, ...] = ()
    """Those that a retrieval model as --qa-checkpoint chooses among."""
    device: str | None = None
    """Of both models. Default: a GPU where there is one."""
    max_upload_mb: int = 64
    """The largest picture or video that a visitor may search by, in MiB."""
    token: str | None = None
    """That POST /api/reindex asks for; the environment variable TEMPME_VL_TOKEN says it without showing it in the list
    of processes. Default: reindexing is refused."""


def main(options: ServeOptions) -> None:
    """Serves until it is interrupted.

    Raises:
        ValueError: options that it cannot be, a port that is taken, or see `tempme_vl.search.open`.
        MissingPackageError: an optional package is not installed.
    """
    with _listening(options) as listener:
        application = build_app(options)
        import uvicorn

        print(f"http://{_address(options.host, listener.getsockname()[1])} (Ctrl-C ends it)", flush=True)
        server = uvicorn.Server(uvicorn.Config(application, log_level="warning", server_header=False))
        server.run(sockets=[listener])


def build_app(options: ServeOptions) -> FastAPI:
    """The application, with its models loaded; raises as `main`."""
    at_least(1, max_upload_mb=options.max_upload_mb)
    if options.answers and options.qa_checkpoint is None:
        raise ValueError("--answers needs --qa-checkpoint, a retrieval model")
    if options.token == "":
        raise ValueError("--token must not be empty; leave it out to refuse reindexing")
    from tempme_vl.search.store import MissingPackageError

    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise MissingPackageError(f"the server needs {', '.join(missing)}: pip install 'tempme_vl[search]'")
    from tempme_vl.pipeline import VideoQA
    from tempme_vl.search.query import open as open_index
    from tempme_vl.search.web.app import create_app
    from tempme_vl.search.web.served import Served

    index = open_index(options.index, options.checkpoint, options.device)
    served = Served(index)
    _ = index.embedder  # now, not with the first request: a model that does not fit ends the command
    asker = None
    if options.qa_checkpoint is not None:
        asker = VideoQA.from_pretrained(options.qa_checkpoint, options.answers, index.embedder.device)
    print(f"{len(index)} segments of {len(served.paths)} videos", flush=True)
    return create_app(
        served,
        served.bring_up_to_date,
        asker=asker,
        token=options.token or os.environ.get(TOKEN) or None,
        max_upload=options.max_upload_mb << 20,
        hosts=options.names or (LOCAL if _is_local(options.host) else ("*",)),
    )


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listening(options: ServeOptions) -> socket.socket:
    """Opened before models are loaded, so that a port that is taken is told at once."""
    if not 0 <= options.port < 1 << 16:
        raise ValueError(f"--port must be from 0, any that is free, to {(1 << 16) - 1}; got {options.port}")
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family, backlog=1024)
    except OSError as error:
        raise ValueError(f"--host {options.host} --port {options.port} cannot be listened on: {error}") from error


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


SERVE = Command(
    "serve",
    ServeOptions,
    main,
    (
        Example("on this machine", "/data/index --port 8000"),
        Example("with answers to questions", "/data/index --qa-checkpoint runs/motion-decoder-tempme/best"),
        Example("for others, who may also bring the index up to date", "/data/index --host 0.0.0.0 --token SECRET"),
    ),
)
