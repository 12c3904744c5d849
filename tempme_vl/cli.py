"""The command `tempme-vl`, or `python -m tempme_vl.cli`: the scripts of recipes/ and eval/, from an installed package.

Under the launcher: deepspeed --num_gpus 8 --module tempme_vl.cli train retrieval --data-root /data/msrvtt
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from tempme_vl import __version__
from tempme_vl.command import ending, run
from tempme_vl.command_line import Command
from tempme_vl.evaluation.caption_options import CAPTION
from tempme_vl.evaluation.ground_options import GROUND
from tempme_vl.evaluation.options import COMPARE, EFFICIENCY, EVAL_RETRIEVAL, EVAL_VIDEOQA, VIDEOLLM_COMPARE
from tempme_vl.export.options import EXPORT
from tempme_vl.recipes.demo import DEMO
from tempme_vl.recipes.options.cache import CACHE_BUILD
from tempme_vl.recipes.options.pretraining import PRETRAINING
from tempme_vl.recipes.options.retrieval import PEFT, RETRIEVAL
from tempme_vl.recipes.options.videollm import VIDEOLLM
from tempme_vl.recipes.options.videoqa import VIDEOQA
from tempme_vl.search.options import COMMANDS as SEARCHING
from tempme_vl.search.serve import SERVE

MODULE = "tempme_vl.cli"
COMMANDS: tuple[Command[Any], ...] = (
    *(RETRIEVAL, PEFT, VIDEOQA, VIDEOLLM, PRETRAINING),
    *(EVAL_RETRIEVAL, EVAL_VIDEOQA, GROUND, CAPTION),
    *(COMPARE, VIDEOLLM_COMPARE, EFFICIENCY, CACHE_BUILD, EXPORT, DEMO),
    *(*SEARCHING, SERVE),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command that the first words name.

    Args:
        arguments: default: those of the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    # the deepspeed launcher puts it before them
    launched = [given.pop(0)] if given and given[0].startswith(("--local_rank", "--local-rank")) else []
    for command in COMMANDS:
        words = command.name.split()
        if given[: len(words)] == words:
            return run(command, [*launched, *given[len(words) :]], MODULE)
    if given == ["--version"]:
        return print(f"tempme-vl {__version__}")
    words = [word for word in given if word not in ("-h", "--help")]
    known = [command for command in COMMANDS if command.name.split()[: len(words)] == words]
    if known and (len(words) < len(given) or not words):
        return print(overview(known))

    def refuse() -> None:
        names = ", ".join(command.name for command in known or COMMANDS)
        raise ValueError(f"expected one of {names}; got {' '.join(given)!r} (--help says what they do)")

    return ending(refuse)


def overview(commands: Sequence[Command[Any]]) -> str:
    """What there is, a line a command."""
    lines = [f"  {command.name:<18}{command.about.splitlines()[0]}" for command in commands]
    return "\n".join(
        [
            "usage: tempme-vl COMMAND [options]",
            "",
            "Videos as very few visual tokens: train, evaluate and count.",
            "",
            *lines,
            "",
            "tempme-vl COMMAND --help lists a command's options; on several GPUs:",
            f"  deepspeed --num_gpus 8 --module {MODULE} train retrieval --data-root /data/msrvtt",
        ]
    )


if __name__ == "__main__":
    main()
