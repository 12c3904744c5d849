"""Options of the commands of video search; plain data, read from a command line without importing torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tempme_vl.command_line import FIRST_WORD, Command, Example, short


@dataclass(frozen=True)
class IndexOptions:
    """Index the videos of a folder and of all folders below it, for tempme-vl search.

    Run again, it reads only files that are new or changed since, and drops those that are gone. Files that cannot be
    read are listed and left out. It can be ended at any moment, and goes on when it is run again.
    """

    folder: Path = field(metadata=FIRST_WORD)
    """The videos."""
    out: Path
    """Folder of the index."""
    checkpoint: str | None = None
    """Folder of a retrieval model, or its name on the Hugging Face hub. Default: the model of the index; for a new
    one runs/demo/tempme-seed0/best, the demo's, which knows moving shapes alone."""
    tokens: Literal["none", "float16", "int8"] | None = None
    """How merged tokens are kept, for --fine and to show what was found. Default: float16."""
    segment_seconds: float | None = None
    """Longer videos are cut into segments. Default: 30."""
    overlap: float | None = None
    """Seconds that a segment shares with the one before it. Default: 5."""
    scenes: bool | None = None
    """Whether segments end at cuts from one scene to another; each file is read twice for it. Default: not."""
    batch_size: int = 8
    """Segments that the model takes at once."""
    workers: int = 1
    """Decoders beside the model."""
    decode_timeout: float | None = 60.0
    """Seconds that decoding may take for each ten minutes of a file; None decodes without a guard."""
    memory: float | None = 2.0
    """GiB that decoding one file may take."""
    retry_broken: bool = False
    """Also try files again that could not be read before and have not changed since."""
    moved: bool = False
    """FOLDER is where the indexed folder lies now."""
    ann: bool = False
    """Make an index of the vectors, for the approximate search --ann of tempme-vl search; for 10,000 segments or
    more."""
    device: str | None = None
    """Default: a GPU where there is one."""
    ray: str | None = None
    """Decode and encode on a Ray cluster: auto, the one that this machine is part of; HOST:PORT of its head; or local,
    one of this machine alone. All machines must have FOLDER and the model in the same place."""
    json: bool = False
    """Print the report as JSON."""


@dataclass(frozen=True)
class SearchOptions:
    """Search an index of videos by a text, a picture or a video."""

    index: Path = field(metadata=FIRST_WORD)
    """Folder of the index."""
    text: str | None = field(default=None, metadata=FIRST_WORD)
    """What to look for."""
    image: Path | None = None
    """Or a picture."""
    clip: Path | None = None
    """Or a video file."""
    k: int = field(default=10, metadata=short("-k"))
    """The most hits."""
    where: str | None = None
    """Only segments that this holds of, in SQL: path, segment, start, end, duration (seconds), size (bytes) and
    modified (nanoseconds since 1970), such as "path LIKE 'kitchen/%' AND duration < 60"."""
    fine: Literal["none", "maxsim", "matching"] = "none"
    """Rank the best candidates anew. maxsim: by the nearest merged tokens; matching: by UMT's or TESTA's layers that
    see a text and a segment together."""
    candidates: int = 100
    """Segments that --fine ranks."""
    ann: bool = False
    """Approximate first stage; the index must have been made with --ann."""
    checkpoint: str | None = None
    """Where the model of the index lies now. Default: where it lay."""
    device: str | None = None
    """Default: a GPU where there is one."""
    json: bool = False
    """Print a JSON list."""


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """Vectors of texts, videos and pictures, by a retrieval model: one each, L2-normalised, in one space."""

    out: Path
    """The .npz file: texts (T,) and text_vectors (T, E), files (V,) and file_vectors (V, E), float32."""
    checkpoint: str | None = None
    """Folder of a retrieval model, or its name on the Hugging Face hub. Default: the demo's, as of tempme-vl index."""
    texts: tuple[str, ...] = ()
    """Texts."""
    files: tuple[Path, ...] = ()
    """Videos, whole, and pictures; those that cannot be read are listed and left out."""
    device: str | None = None
    """Default: a GPU where there is one."""
    json: bool = False
    """Print the report as JSON."""


@dataclass(frozen=True)
class AskOptions:
    """Answer a question by the segments of an index that fit it best."""

    index: Path = field(metadata=FIRST_WORD)
    """Folder of the index."""
    question: str = field(metadata=FIRST_WORD)
    """What to answer."""
    qa_checkpoint: str
    """Folder of a question answering model, or its name on the Hugging Face hub; or of a retrieval model, which chooses
    among --answers."""
    k: int = field(default=3, metadata=short("-k"))
    """Segments that are asked."""
    find: str | None = None
    """What to search for. Default: the question."""
    answers: tuple[str, ...] = ()
    """Choose among these. Default: the model's own answers, or what it writes."""
    where: str | None = None
    """Only segments that this holds of, as in tempme-vl search."""
    fine: Literal["none", "maxsim", "matching"] = "none"
    """As in tempme-vl search."""
    checkpoint: str | None = None
    """Where the model of the index lies now. Default: where it lay."""
    device: str | None = None
    """Default: a GPU where there is one."""
    json: bool = False
    """Print a JSON list."""


INDEX = Command(
    "index",
    IndexOptions,
    "tempme_vl.search.commands:index",
    (
        Example("a folder", "/data/videos --out /data/index --checkpoint runs/demo/tempme-seed0/best"),
        Example("what is new there since", "/data/videos --out /data/index"),
        Example(
            "less space",
            "/data/videos --out /data/index --checkpoint runs/demo/tempme-seed0/best --tokens int8",
        ),
        Example(
            "by scenes",
            "/data/videos --out /data/index --checkpoint runs/demo/tempme-seed0/best --scenes",
        ),
        Example(
            "on the machines of a Ray cluster",
            "/data/videos --out /data/index --checkpoint runs/demo/tempme-seed0/best --ray auto",
        ),
    ),
)
SEARCH = Command(
    "search",
    SearchOptions,
    "tempme_vl.search.commands:search",
    (
        Example("by a text", '/data/index "a red circle moves left" -k 5'),
        Example("by a picture, as JSON", "/data/index --image photo.jpg --json"),
        Example("in one folder, in two stages", '/data/index "a dog" --where "path LIKE \'pets/%\'" --fine maxsim'),
    ),
)
EMBED = Command(
    "embed",
    EmbedOptions,
    "tempme_vl.search.commands:embed",
    (
        Example(
            "texts and videos",
            "--checkpoint runs/demo/tempme-seed0/best --texts 'a dog' 'a cat' --files a.mp4 b.mp4 --out vectors.npz",
        ),
    ),
)
ASK = Command(
    "ask",
    AskOptions,
    "tempme_vl.search.commands:ask",
    (
        Example(
            "the three best segments",
            "/data/index 'what color is the car' --qa-checkpoint runs/motion-decoder-tempme/best",
        ),
    ),
)
COMMANDS = (INDEX, SEARCH, EMBED, ASK)
