"""Options of text grounding; plain data, read from a command line without importing torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tempme_vl.command_line import FIRST_WORD, Command, Example


@dataclass(frozen=True)
class GroundOptions:
    """Show where in a video a retrieval model sees what a phrase says.

    Every merged token that leaves the tower holds patches of the video, its region. The regions whose tokens are most
    similar to the phrase are drawn on the frames, each in a colour of its own. Written for TESTA's figure 4, of which
    no code was published: that single tokens are compared, projected as the video is, is this package's reading.
    """

    video: Path = field(metadata=FIRST_WORD)
    """A video, or a picture as a still one."""
    phrase: str = field(metadata=FIRST_WORD)
    """What is looked for."""
    checkpoint: Path
    """Folder that a retrieval model's save_pretrained wrote, such as a training run's OUTPUT/best."""
    out: Path
    """The picture, NAME.png; NAME.json beside it has the regions and their scores."""
    regions: int = 3
    """How many are drawn."""
    side: int = 224
    """Least pixels of a drawn frame, which is enlarged in whole steps."""
    start: float | None = None
    """Seconds: where the part of the video begins that is looked at."""
    end: float | None = None
    """Seconds: where it ends."""
    decode_timeout: float | None = 60.0
    """Seconds after which the decoder is ended; None decodes without a guard."""


GROUND = Command(
    "ground",
    GroundOptions,
    "tempme_vl.evaluation.ground_command:main",
    (
        Example("TempMe's tokens", 'a.mp4 "a red square" --checkpoint runs/motion-tempme/best --out a.png'),
        Example("one region of TESTA's", 'a.mp4 "a dog" --checkpoint runs/testa/best --out a.png --regions 1'),
    ),
)
