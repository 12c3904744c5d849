"""What a comparison shows and writes: comparison.json, .md and .svg, a page's section, and lmms-eval's commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tempme_vl.data.reader import broken_videos
from tempme_vl.data.videoqa import QASplit
from tempme_vl.evaluation.folder import with_section
from tempme_vl.evaluation.intervals import LEVEL
from tempme_vl.evaluation.options import VideoLLMCompareOptions
from tempme_vl.evaluation.videollm.answers import Facts, Store
from tempme_vl.evaluation.videollm.lmms import lmms_script
from tempme_vl.evaluation.videollm.rows import HOST, Case
from tempme_vl.evaluation.videollm.session import BROKEN_FILE, Session
from tempme_vl.evaluation.videollm.table import (
    Compared,
    Run,
    beside_host,
    kinds_markdown,
    main_markdown,
    picture,
    refusals_markdown,
)
from tempme_vl.evaluation.videollm.times import Turns
from tempme_vl.reports import provenance, show, write_json, write_whole

REPORT, TEXT, PICTURE, SCRIPT = "comparison.json", "comparison.md", "comparison.svg", "lmms_eval.sh"


def write_comparison(
    options: VideoLLMCompareOptions,
    split: QASplit,
    session: Session,
    cases: Sequence[Case],
    turns: Mapping[Case, Turns],
) -> None:
    """Shows the tables, and writes them, the plot, and what they are made of."""
    facts = {case: known for case in cases if (known := session.store.facts(case)) is not None}
    rows = table(session.store, facts, turns)
    refused = {case: known.refused for case, known in facts.items() if known.refused is not None}
    setting = _setting(options, split, session)
    parts = [_about(setting, rows), main_markdown(rows), kinds_markdown(rows), refusals_markdown(refused)]
    shown = "\n\n".join(part for part in parts if part)
    show(f"\n{shown}")
    report = {
        "setting": setting,
        "rows": [asdict(row) for row in rows],
        "refused": {case.name: why for case, why in refused.items()},
        **provenance(),
    }
    folder, drawn = options.output, picture(rows)
    write_json(folder / REPORT, report)
    write_whole(folder / PICTURE, drawn.encode())
    made = ", ".join([report["date"][:10], *(f"{name} {version}" for name, version in report["versions"].items())])
    section = f"{shown}\n\n![accuracy against tokens and time]({{}})\n\n{made}."
    title = "# Compression methods side by side\n"
    write_whole(folder / TEXT, f"{title}\n{section.replace('{}', PICTURE)}\n".encode())
    if options.page is not None:
        beside = options.page.with_name(f"{options.page.stem}_videollm_{options.dataset}.svg")
        write_whole(beside, drawn.encode())
        before = options.page.read_text() if options.page.is_file() else title
        text = section.replace("{}", beside.name)
        write_whole(options.page, with_section(before, options.dataset, text, "videollm-compare").encode())
    if options.lmms_tasks:
        script = lmms_script(options.host, session.about["trained"], options.lmms_tasks, facts)
        write_whole(folder / SCRIPT, script.encode())


def table(store: Store, facts: Mapping[Case, Facts], turns: Mapping[Case, Turns]) -> list[Compared]:
    """A line for each case that was asked; the host is the first."""

    def run(case: Case) -> Run:
        found = [store.answers(case, host) for host in range(store.hosts)]
        return Run(case, facts[case], [of_one for of_one in found if of_one is not None], turns[case])

    runs = [run(case) for case in facts if case in turns]
    (host,) = (run for run in runs if run.case.row.method == HOST)
    return [beside_host(run, host) for run in runs]


def _setting(options: VideoLLMCompareOptions, split: QASplit, session: Session) -> dict[str, Any]:
    about = session.about
    return {
        "hosts": list(options.host),
        **about,
        "data": split.name,
        "note": split.note,
        "questions": len(split.questions),
        "seed": options.seed,
        "retention": list(options.retention),
        "batch_size": options.batch_size,
        "broken_videos": broken_videos(session.store.folder / BROKEN_FILE),
        **session.timing,
    }


def _about(setting: Mapping[str, Any], rows: Sequence[Compared]) -> str:
    """What the numbers are of, in paragraphs."""
    count, broken = len(setting["hosts"]), len(setting["broken_videos"])
    several = f", means over {count} hosts trained alike" if count > 1 else ""
    asked = (
        f"{setting['model']} ({', '.join(setting['hosts'])}; {setting['dtype']}){several}, without training a method; "
        f"{setting['data']}, {setting['questions']} questions, {setting['num_frames']} frames of "
        f"{setting['image_size']} x {setting['image_size']} pixels ({setting['sampling']}), prompt "
        f"`{setting['prompt']!r}`, greedy, at most {setting['answer_tokens']} tokens."
    )
    asked += f" {broken} videos could not be read; questions about them count as wrong." if broken else ""
    over = "questions and hosts" if count > 1 else "questions"
    read = (
        f"Accuracy: answers that equal one of a question's after normalising, with the {LEVEL} % interval of a "
        f"bootstrap over {over}; the difference to the host is paired by question. Tokens marked as measured are the "
        "mean over the questions, where the data decide; GFLOPs (a multiply-add is 1): of the tower computed, of "
        "reading the whole prompt by its mean length."
    )
    timed = (
        f"Times: medians of {setting['repeats']} turns, all rows in turn, each turn with another question, "
        f"{setting['new_tokens']} tokens written, reading of files left out; in brackets the median ratio to the host "
        f"in the same turn. The encoder's are from frames to inputs of the language model; {setting['device']}, "
        f"{setting['threads']} threads."
    )
    timed += "" if rows[0].memory is not None else " Peak memory is measured on a GPU only."
    note = [setting["note"]] if setting["note"] else []
    return "\n\n".join([asked, *note, read, timed])
