"""What an index of very many clips takes: arithmetic from measured rates, which one replaces by one's own.

    python eval/search_cost.py --clips 100000000
    python eval/search_cost.py --clips 1000000 --tokens int8 --gpus 1 --gpu-rate 300

A clip is 15 seconds, one segment, 12 frames of it, CLIP's B/16 with TempMe, 127 merged tokens (docs/search.md).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from tempme_vl.command import above_zero, at_least, run
from tempme_vl.command_line import Command
from tempme_vl.reports import finish, format_columns

BYTES = {"none": 2_502, "int8": 63_893, "float16": 122_822}  # a clip
CODE = 281  # bytes of a vector in the index for --ann
READ = 256 * 4096  # vectors that an approximate search looks at, at most: partitions, and what they hold


@dataclass(frozen=True)
class Options:
    """Machines, hours and bytes of an index, from rates."""

    clips: int = 100_000_000
    tokens: Literal["none", "int8", "float16"] = "none"
    """How merged tokens are kept."""
    gpus: int = 8
    """That encode at once."""
    decode_seconds: float = 0.134
    """CPU seconds of a clip: 57 real clips (docs/benchmarks.md)."""
    gpu_rate: float = 1208.0
    """Clips a second of a GPU: the tower of B/16 in bfloat16 on an H100 (docs/benchmarks.md)."""
    encode_seconds: float = 3.28
    """CPU seconds of a clip: B/16, two threads, four at a time (docs/benchmarks.md)."""
    write_seconds: float = 0.001
    """Of the one writer for a clip (docs/search.md)."""
    exact_ms: float = 2.0
    """Of an exact search, for a thousand clips (docs/search.md)."""
    json: Path | None = None
    """Also write all numbers to this file."""


def main(options: Options) -> None:
    at_least(1, clips=options.clips, gpus=options.gpus)
    above_zero(gpu_rate=options.gpu_rate, decode_seconds=options.decode_seconds)
    rows = calculated(options)
    shown = format_columns([{"what": name, "is": f"{value:,.4g}"} for name, value in rows.items()])
    finish(shown, {"rates": {**asdict(options), "json": str(options.json)}, "rows": rows}, options.json)


def calculated(options: Options) -> dict[str, float]:
    """What so many clips take."""
    clips, hour = options.clips, 3600.0
    encoding = clips / options.gpu_rate / options.gpus / hour
    return {
        "CPU hours of decoding": clips * options.decode_seconds / hour,
        "GPU hours of encoding": clips / options.gpu_rate / hour,
        "or CPU hours of encoding": clips * options.encode_seconds / hour,
        f"hours of encoding with {options.gpus} GPUs": encoding,
        "CPU cores that keep up with them": options.gpu_rate * options.gpus * options.decode_seconds,
        "hours of the writer": clips * options.write_seconds / hour,
        "MB a second that come to the writer": options.gpu_rate * options.gpus * BYTES[options.tokens] / 1e6,
        "GB of the index": clips * BYTES[options.tokens] / 1e9,
        "GB more with --ann": clips * CODE / 1e9,
        "s of an exact search": clips / 1000 * options.exact_ms / 1000,
        "MB that an approximate search reads": min(clips, READ) * CODE / 1e6,
    }


if __name__ == "__main__":
    run(Command("", Options, main))
