"""Whether every fast path gives what the plain one gives, in float32 and bfloat16, on the device that is there.

python eval/fast_paths.py
TRITON_INTERPRET=1 python eval/fast_paths.py --small    # on a CPU, kernels by Triton's interpreter
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tempme_vl.command import run
from tempme_vl.command_line import Command
from tempme_vl.evaluation.fast_paths import LARGE, SMALL, agreements, format_agreements
from tempme_vl.evaluation.measure import device_name
from tempme_vl.reports import finish


@dataclass(frozen=True)
class Options:
    """Compare every fast path with the plain one; any that differs by more than it may is an error."""

    small: bool = False
    """A tiny model and few tokens, for a CPU."""
    json: Path | None = None
    """Also write all numbers to this file."""


def main(options: Options) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = agreements(device, SMALL if options.small else LARGE)
    report = {"device": device_name(device), "agreements": [{**asdict(one), "holds": one.holds} for one in found]}
    finish(f"{device_name(device)}, torch {torch.__version__}\n{format_agreements(found)}", report, options.json)
    if wrong := [f"{one.path} ({one.dtype})" for one in found if not one.holds]:
        raise ValueError(f"{len(wrong)} of {len(found)} fast paths differ from the plain ones: {', '.join(wrong)}")


if __name__ == "__main__":
    run(Command("", Options, main))
