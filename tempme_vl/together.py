"""All ranks end when one does, and say why.

A rank that fails leaves the others waiting in a collective, for half an hour with NCCL. So every rank keeps a
connection to rank 0, on which it says why it fails. The kernel closes the connection of a process that is killed, and
its keep-alive probes notice a machine that is gone. Rank 0 decides what the cause was and tells it to all.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing.util
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from tempme_vl.processes import end_workers, when_parent_ends

LAUNCHERS = ("CROSS_SIZE", "TORCHELASTIC_RUN_ID")  # variables that deepspeed's and torch's launchers set
CONNECTING = 60.0  # seconds for all ranks to meet
COLLECTING = 1.0  # seconds between the first word of a failure and the verdict: the cause may be another rank's
PATIENCE = 10.0  # seconds in which ranks may still end by themselves after one has gone without a word
WITHOUT_A_WORD = "it ended without a word (killed, out of memory, or its machine is gone)"
LEAVING = 30.0  # seconds for a last checkpoint once the launcher is gone


def advise(text: str) -> None:
    """What a user can do should this run fail from now on; printed with the cause."""
    global _advice
    _advice = text


@dataclass
class Ranks:
    """One rank's view of all ranks.

    Attributes:
        links: connections by rank; rank 0 has all others', each other rank has that of rank 0.
        failed: what ranks said and their exit codes, in the order in which it was heard.
        lost: ranks whose connection ended without a word.
    """

    rank: int = 0
    world: int = 1
    links: dict[int, socket.socket] = field(default_factory=dict)
    failed: dict[int, tuple[str, int]] = field(default_factory=dict)
    lost: list[int] = field(default_factory=list)
    since: float | None = None
    verdict: threading.Event = field(default_factory=threading.Event)
    _unread: dict[int, bytes] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def start(self) -> None:
        threading.Thread(target=self._watch, daemon=True).start()
        os.register_at_fork(after_in_child=self._forget)
        # an interpreter's end and, unlike atexit, that of a process of multiprocessing
        multiprocessing.util.Finalize(None, self._leave, exitpriority=0)

    def fail(self, cause: str, code: int) -> None:
        """Tells the others. Comes back if it is for this rank to say the cause; else the process ends."""
        if not self.links:
            return
        with self._lock:
            self._hear(self.rank, cause, code)
            if self.rank:
                self._send(0, {"failed": cause, "code": code})
        self.verdict.wait(COLLECTING + 3)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, link in self.links.items():
                selector.register(link, selectors.EVENT_READ, rank)
            while (selector.get_map() or self.since) and not self.verdict.is_set():
                for key, _ in selector.select(timeout=0.2):
                    with self._lock:
                        if not self._read(key.data):
                            selector.unregister(key.fileobj)
                self._judge()
                if not selector.get_map():
                    time.sleep(0.2)

    def _read(self, rank: int) -> bool:
        """Takes in what a rank says; False once it will say no more."""
        try:
            data = self.links[rank].recv(65536)
        except OSError:  # keep-alive probes that nobody answers, among others
            data = b""
        if not data:
            self.lost.append(rank)
            self.since = self.since or time.monotonic()
            return False
        *lines, self._unread[rank] = (self._unread.get(rank, b"") + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "done" in message:
                return False
            if "failed" in message:
                self._hear(rank, message["failed"], message["code"])
            else:  # the verdict of rank 0
                self._end(**message)
        return True

    def _hear(self, rank: int, cause: str, code: int) -> None:
        self.failed.setdefault(rank, (cause, code))
        self.since = self.since or time.monotonic()

    def _judge(self) -> None:
        """Rank 0, and any rank that has lost it, decides once everybody had time to speak.

        A rank that went without a word is why others fail; else it is the first that spoke.
        """
        if self.since is None or (self.rank and 0 not in self.lost):
            return
        patience = COLLECTING if self.failed else PATIENCE
        if time.monotonic() < self.since + patience:
            return
        with self._lock:
            rank = self.lost[0] if self.lost else next(iter(self.failed))
            cause, code = self.failed.get(rank, (WITHOUT_A_WORD, 1))
            for other in self.links:
                self._send(other, {"rank": rank, "cause": cause, "code": code})
        self._end(rank, cause, code)

    def _end(self, rank: int, cause: str, code: int) -> None:
        """Ends this process, unless its main thread is about to say the cause itself."""
        if rank != self.rank:
            # once on every machine is enough, where there is somebody to say it
            if os.environ.get("LOCAL_RANK", "0") == "0" or 0 in self.lost:
                _say(rank, self.world, cause)
            leave_at_once(code)
        self.verdict.set()

    def _send(self, rank: int, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self.links[rank].sendall(json.dumps(message).encode() + b"\n")

    def _leave(self) -> None:
        if sys.exc_info()[0] not in (None, SystemExit):
            return  # a process of multiprocessing that fails
        with self._lock:
            for rank in self.links:
                self._send(rank, {"done": True})

    def _forget(self) -> None:
        """In a forked child: else the connection outlives this process in its loader workers."""
        for link in self.links.values():
            link.close()
        self.links = {}


_ranks, _advice = Ranks(), ""


def watch(rank: int, world: int, exchange: Any) -> None:
    """From now on this rank ends with the others and with its launcher, and an error is the last thing on the screen.

    Args:
        exchange: gives every rank's value to every rank.
    """
    global _ranks
    sys.excepthook = _end_with_cause
    if any(name in os.environ for name in LAUNCHERS):
        when_parent_ends(_launcher_gone)
    if world == 1:
        return
    links = _meet(rank, world, exchange)
    missing = [number for number, reached in enumerate(exchange(links is not None)) if not reached]
    if links is None or missing:
        if rank == 0:
            text = f"ranks {missing} and rank 0 did not meet on a port of their own: a rank that dies is noticed only"
            print(f"{text} when the process group's time is up", file=sys.stderr, flush=True)
        return
    _ranks = Ranks(rank, world, links)
    _ranks.start()


def _meet(rank: int, world: int, exchange: Any) -> dict[int, socket.socket] | None:
    """Connections between rank 0 and every other rank; None if one of this rank's did not come about."""
    if rank == 0:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        with socket.create_server(("", 0), family=family, dualstack_ipv6=both) as server:
            token = secrets.token_hex(16)
            exchange((server.getsockname()[1], token))
            links = _welcome(server, token, world - 1)
    else:
        port, token = exchange(None)[0]
        links = {}
        with contextlib.suppress(OSError):
            links[0] = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=CONNECTING)
            links[0].sendall(f"{token} {rank:08d}\n".encode())
    for link in links.values():
        link.settimeout(None)
        _keep_alive(link)
    return links if len(links) == (world - 1 if rank == 0 else 1) else None


def _welcome(server: socket.socket, token: str, count: int) -> dict[int, socket.socket]:
    """The connections of those that know the token."""
    links: dict[int, socket.socket] = {}
    limit = time.monotonic() + CONNECTING
    with contextlib.suppress(TimeoutError):
        while len(links) < count:
            server.settimeout(max(0.01, limit - time.monotonic()))
            link, _ = server.accept()
            link.settimeout(5)
            hello = _exactly(link, len(token) + 10).decode(errors="replace").split()
            if len(hello) == 2 and secrets.compare_digest(hello[0].encode(), token.encode()):
                links[int(hello[1])] = link
            else:
                link.close()
    return links


def _exactly(link: socket.socket, count: int) -> bytes:
    data = b""
    with contextlib.suppress(OSError):
        while len(data) < count and (part := link.recv(count - len(data))):
            data += part
    return data


def _keep_alive(link: socket.socket) -> None:
    """A machine that is gone is noticed after some 20 seconds."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _end_with_cause(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """`sys.excepthook`: the others end first, then one rank says what happened, and nothing is left running."""
    interrupted = issubclass(kind, KeyboardInterrupt)
    shown = "" if interrupted else "".join(traceback.format_exception(kind, error, trace))
    end("interrupted" if interrupted else _in_one_line(kind, error), 128 + signal.SIGINT if interrupted else 1, shown)
    # a process of its own ends as any other does; should it wait for something then, the kernel ends it
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(10)


def joined() -> bool:
    """Whether this is one of several ranks that end together."""
    return bool(_ranks.links)


def end(cause: str, code: int, shown: str = "") -> None:
    """The others end first, then one rank says the cause; of several ranks none comes back from here.

    Args:
        cause: one line.
        code: exit code of all ranks.
        shown: printed before the cause, a traceback.
    """
    _ranks.fail(cause, code)
    end_workers()
    if joined():
        time.sleep(0.5)  # what the others still print comes before
    print(shown, end="", file=sys.stderr, flush=True)
    _say(_ranks.rank, _ranks.world, cause)
    if joined():
        leave_at_once(code)


def _in_one_line(kind: type[BaseException], error: BaseException) -> str:
    """The end of what Python prints: an error of a loader worker has its own traceback in its text."""
    lines = "".join(traceback.format_exception_only(kind, error)).strip().splitlines()
    return lines[-1].strip() if lines else kind.__name__


def _say(rank: int, world: int, cause: str) -> None:
    """The last words of a run."""
    who = f"rank {rank} of {world}: " if world > 1 else ""
    print(who + cause + (f"\n{_advice}" if _advice else ""), file=sys.stderr, flush=True)


def leave_at_once(code: int) -> None:
    """Ends the process whatever its other threads wait for."""
    end_workers()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _launcher_gone() -> None:
    print("the launcher is gone: this rank saves what it has and ends", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LEAVING)
    leave_at_once(128 + signal.SIGTERM)
