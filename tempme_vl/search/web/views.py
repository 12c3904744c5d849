"""What the page shows, as values for its templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote, urlencode

from tempme_vl.search.web.interface import Fine
from tempme_vl.search.web.models import HitFound, SearchAnswer, Status


@dataclass(frozen=True)
class State:
    """What an address of the page says."""

    q: str
    upload: str
    k: int
    where: str
    fine: Fine
    hit: int | None

    @property
    def asked(self) -> bool:
        """Whether there is a query."""
        return bool(self.q or self.upload)

    def link(self) -> str:
        """The address; what is as by default is left out."""
        default = State("", "", 12, "", "none", None)
        values = {name: value for name, value in vars(self).items() if value != vars(default)[name]}
        return f"/?{urlencode(values)}" if values else "/"


@dataclass(frozen=True)
class Card:
    """A segment in the list; `level` is its score between the lowest and the highest of the list, 8 to 100."""

    name: str
    folder: str
    picture: str
    link: str
    span: str = ""
    score: str = ""
    level: float = 0
    current: bool = False


@dataclass(frozen=True)
class Player:
    """The segment that is played.

    Attributes:
        opened: whether a visitor chose it; else it is the first, and does not play by itself.
        asks: what names the segment and the query, for parts of the page that are loaded later.
    """

    path: str
    name: str
    folder: str
    start: float
    end: float
    span: str
    file: str
    source: str
    poster: str
    rank: int
    opened: bool
    before: str
    after: str
    asks: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Frame:
    """A frame with the shade around what the best tokens came from."""

    time: float
    label: str
    picture: str
    shade: str

    @classmethod
    def of(cls, path: str, time: float, shade: str) -> Frame:
        return cls(time, clock(time), _picture(path, time, 240), shade)


@dataclass(frozen=True)
class Stage:
    """Of a search: its share of the whole as a bar from `left`, both in percent."""

    name: str
    time: str
    left: float
    width: float


def form(state: State, name: str, status: Status) -> dict[str, Any]:
    """Values of the form, `name` being that of an upload."""
    rankings: dict[Fine, str] = {"none": "vectors"}
    if status.tokens:
        rankings["maxsim"] = "tokens"
    if status.matching and not state.upload:
        rankings["matching"] = "matching"
    without = replace(state, upload="", hit=None).link()
    return {**vars(state), "name": name, "rankings": rankings, "without_upload": without}


def browsed(paths: Sequence[str]) -> dict[str, Any]:
    """The page without a query."""
    cards = [Card(*_names(path), _picture(path, 0, 480), _file(path)) for path in paths]
    return {"title": "Video search", "cards": cards}


def results(state: State, answer: SearchAnswer) -> dict[str, Any]:
    """The page with an answer; the first hit is in the player where none was chosen."""
    chosen = min(state.hit or 1, max(len(answer.hits), 1))
    links = [replace(state, hit=number).link() for number in range(1, len(answer.hits) + 1)]
    scores = [hit.score for hit in answer.hits]
    cards = [
        Card(
            *_names(hit.path),
            _picture(hit.path, hit.start, 480),
            link,
            span(hit),
            f"{hit.score:.3f}",
            _level(hit.score, scores),
            number == chosen,
        )
        for number, (hit, link) in enumerate(zip(answer.hits, links, strict=True), 1)
    ]
    total = sum(answer.times.values())
    return {
        "title": f"{state.q or 'Your file'} - Video search",
        "cards": cards,
        "player": _player(state, answer.hits[chosen - 1], chosen, links) if cards else None,
        "total": _milliseconds(total),
        "stages": _stages(answer.times),
        "kept": answer.kept,
    }


def facts(status: Status) -> list[tuple[str, str]]:
    """What the foot of the page tells of the index."""
    plain = {"videos": status.videos, **status.index}
    return [(name, f"{value:,}" if isinstance(value, int) else str(value)) for name, value in plain.items()]


def timed(times: Mapping[str, float]) -> str:
    """Stages in a line."""
    return " · ".join(f"{name} {_milliseconds(time)}" for name, time in times.items() if time >= 0.05)


def span(hit: HitFound) -> str:
    """From when to when."""
    exact = any(abs(seconds - round(seconds)) >= 0.05 for seconds in (hit.start, hit.end))
    return f"{clock(hit.start, exact)} \N{EN DASH} {clock(hit.end, exact)}"


def clock(seconds: float, exact: bool = True) -> str:
    """1:02:03, or with tenths 2:03.4."""
    tenths = round(seconds * 10) if exact else round(seconds) * 10
    minutes, rest = divmod(tenths, 600)
    second = f"{rest / 10:04.1f}" if exact else f"{rest // 10:02d}"
    return f"{minutes // 60}:{minutes % 60:02d}:{second}" if minutes >= 60 else f"{minutes}:{second}"


def _player(state: State, hit: HitFound, rank: int, links: Sequence[str]) -> Player:
    asks = {"path": hit.path, "segment": str(hit.segment), "q": state.q, "upload": state.upload}
    name, folder = _names(hit.path)
    return Player(
        path=hit.path,
        name=name,
        folder=folder,
        start=hit.start,
        end=hit.end,
        span=span(hit),
        file=_file(hit.path),
        source=f"{_file(hit.path)}#t={hit.start:g}",  # browsers begin there by themselves
        poster=_picture(hit.path, hit.start, 960),
        rank=rank,
        opened=state.hit is not None,
        before=links[rank - 2] if rank > 1 else "",
        after=links[rank] if rank < len(links) else "",
        asks=tuple((key, value) for key, value in asks.items() if value),
    )


def _stages(times: Mapping[str, float]) -> list[Stage]:
    total, left, stages = sum(times.values()) or 1.0, 0.0, []
    for name, time in times.items():
        share = 100 * time / total
        stages.append(Stage(name, _milliseconds(time), round(left, 2), round(share, 2)))
        left += share
    return stages


def _level(score: float, scores: Sequence[float]) -> float:
    low, high = min(scores), max(scores)
    return round(8 + 92 * (score - low) / (high - low), 1) if high > low else 100.0


def _milliseconds(time: float) -> str:
    return f"{time / 1e3:.1f} s" if time >= 1e3 else f"{time:.0f} ms" if time >= 10 else f"{time:.1f} ms"


def _names(path: str) -> tuple[str, str]:
    """A file's name, and the folder it is in, empty for the indexed one itself."""
    whole = PurePosixPath(path)
    return whole.name, "" if whole.parent == PurePosixPath(".") else str(whole.parent)


def _file(path: str) -> str:
    return f"/api/videos/{quote(path)}"


def _picture(path: str, time: float, width: int) -> str:
    return f"/api/thumbnail?{urlencode({'path': path, 'time': f'{time:g}', 'width': width})}"
