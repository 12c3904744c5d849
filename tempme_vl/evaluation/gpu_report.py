"""What `eval/gpu.py` found, as Markdown for docs/benchmarks.md and as CSV with the columns of timm's benchmarks."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tempme_vl.evaluation.regressions import measured_of
from tempme_vl.reports import write_whole


def timm_rows(report: Mapping[str, Any], kind: Literal["infer", "train"]) -> list[dict[str, object]]:
    """Rows as timm's results/benchmark-infer-*.csv and -train-*.csv name their columns; a sample is a video, a step
    time in milliseconds, and infer_gmacs are of one video. Activations and weights are not counted."""
    rows = []
    for measured in measured_of(report):
        setting, train = measured["setting"], measured["setting"]["what"].startswith("full")
        if train != (kind == "train"):
            continue
        for row in measured["rows"]:
            named: dict[str, object] = {
                "model": f"{setting['model']} {row['name']}",
                f"{kind}_img_size": setting["image_size"],
                f"{kind}_batch_size": setting["batch"],
                f"{kind}_samples_per_sec": round(setting["batch"] / row["seconds"], 2),
                f"{kind}_step_time": round(1e3 * row["seconds"], 3),
            }
            rows.append(named if train else {**named, "infer_gmacs": round(row["gflops"], 2)})
    return rows


def write_csv(file: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """The columns of the first row; an empty file without rows."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    if rows:
        writer.writeheader()
    writer.writerows(rows)
    write_whole(file, text.getvalue().encode())


def format_report(report: Mapping[str, Any]) -> str:
    """Markdown tables of all parts, and those that did not end well by name."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    said = "Tiny models: their times mean nothing." if report["small"] else ""
    lines = [f"{report['device']}, {report['date'][:10]}, {versions}. {said}".strip()]
    for name, done in report["parts"].items():
        shown = [] if done["report"] is None else list(_table(done["report"]))
        ended = f"{done['status']}, {done['seconds']:.0f} s"
        lines += ["", f"### {name} ({ended})", "", *shown]
    return "\n".join(lines)


def _table(found: Any) -> Iterator[str]:
    """Of the report of a part, whichever it is."""
    if isinstance(found, list):  # of heads
        rounded = (f"{row['pairs_per_second']:.0f} ({row['ratio']:.2f})" for row in found)
        pairs = zip(found, rounded, strict=True)
        yield from _markdown([{"head": row["head"], "tokens": row["tokens"], "pairs/s": text} for row, text in pairs])
    elif "agreements" in found:
        rows = found["agreements"]
        wrong = [row for row in rows if not row["holds"]]
        yield f"{len(rows) - len(wrong)} of {len(rows)} fast paths agree with the plain ones."
        yield from _markdown(wrong)
    elif "measured" in found:
        for measured in found["measured"]:
            setting = measured["setting"]
            videos = f"{setting['batch']} videos x {setting['frames']} frames of {setting['image_size']} px"
            yield f"{setting['model']}, {videos}, {setting['what']}, {setting['dtype']}:"
            yield ""
            yield from _markdown([_measured_row(row, setting["batch"]) for row in measured["rows"]])
    else:
        yield from _markdown([_stage_row(row) for row in found["rows"]])


def _measured_row(row: Mapping[str, Any], batch: int) -> dict[str, object]:
    memory, merging = row["memory"], row["merging"]
    return {
        "": row["name"],
        "GFLOPs": f"{row['gflops']:.4g}",
        "ms": f"{1e3 * row['seconds']:.1f}",
        "of the first": f"{row['ratio']:.3f}",
        "videos/s": f"{batch / row['seconds']:.0f}",
        "peak MiB": "" if memory is None else f"{memory['peak'] / 2**20:.0f}",
        "merging": "" if merging is None else f"{merging:.3f}",
    }


def _stage_row(row: Mapping[str, Any]) -> dict[str, object]:
    """Of a video-language model: the time to the first token is all before decoding."""
    seconds = row["seconds"]
    return {
        "": row["row"],
        "visual tokens": row["tokens"],
        "tower, s": f"{seconds['tower']:.3f} ({row['ratios']['tower']:.2f})",
        "prefill, s": f"{seconds['prefill']:.3f} ({row['ratios']['prefill']:.2f})",
        "tower and prefill, s": f"{seconds['tower'] + seconds['prefill']:.3f}",
        "end to end, s": f"{seconds['total']:.3f} ({row['ratios']['total']:.2f})",
        "extrapolated, s": f"{seconds['at_depth']:.3f}" if "at_depth" in seconds else "",
    }


def _markdown(rows: Sequence[Mapping[str, object]]) -> Iterator[str]:
    if not rows:
        return
    yield f"| {' | '.join(rows[0])} |"
    yield f"|{'---|' * len(rows[0])}"
    for row in rows:
        yield f"| {' | '.join(map(str, row.values()))} |"
