"""The commands that run a comparison's cases in lmms-eval, as a shell script."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from tempme_vl.evaluation.videollm.answers import Facts
from tempme_vl.evaluation.videollm.rows import Case


def lmms_script(sources: Sequence[str], trained: bool, tasks: Sequence[str], facts: Mapping[Case, Facts]) -> str:
    """A script with one command for each host and case.

    Args:
        sources: folders or names of the hosts.
        trained: whether a recipe exported them: lmms-eval then finds a folder that is compressed already.
        facts: of all cases.
    """
    lines = [
        "#!/bin/sh",
        "# by tempme-vl videollm-compare: its rows in lmms-eval (docs/lmms_eval.md)",
        "set -e",
    ]
    if trained:
        lines.append("# a recipe's export is compressed as it was trained: lmms-eval runs it in this way alone")
        return "\n".join([*lines, *(_command(source, f"pretrained={source}", tasks) for source in sources), ""])
    for case, known in facts.items():
        if known.refused is not None:
            lines.append(f"# {case.name} cannot be run: {' '.join(known.refused.split())}")
        elif case.row.method == "resolution":
            lines.append(f"# {case.name} has no command: lmms-eval reads frames as large as they are")
        else:
            for source in sources:
                lines.append(_command(f"{source} {case.name}", f"pretrained={source},{known.arguments}", tasks))
    return "\n".join([*lines, ""])


def _command(about: str, arguments: str, tasks: Sequence[str]) -> str:
    words = ["lmms-eval", "--model", "tempme_vl", "--model_args", arguments, "--tasks", ",".join(tasks)]
    return f"# {about}\n{shlex.join([*words, '--batch_size', '1'])}"
