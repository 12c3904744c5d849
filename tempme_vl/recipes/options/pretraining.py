"""Options of TESTA's pre-training (tempme_vl/recipes/pretraining.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tempme_vl.command_line import Command, Example, first_look, named_value
from tempme_vl.data.datasets import CAPTIONED, texts_of
from tempme_vl.data.options import EMBEDDED
from tempme_vl.recipes.options.presets import PRESETS, preset
from tempme_vl.recipes.options.shared import RecipeOptions, TowerOptions
from tempme_vl.schema import read


@dataclass(frozen=True)
class Options(TowerOptions, RecipeOptions):
    """Pre-train TESTA on pictures and videos with texts: contrast, matching and captions, weighted 1 : 1 : 1.

    The defaults shown are those of the model: --help together with --model shows its own. The last epoch is exported:
    `train retrieval` and `train videoqa` start from it as --pretrained OUTPUT/best. A file whose name is a picture's
    is a video whose frames are all that picture. The options in use are written to OUTPUT/options.json.
    """

    dataset: Annotated[str, CAPTIONED] = "pairs"
    """pairs: --annotations, a JSON list of path and caption or a folder of such; or any with captions. Default: motion,
    the embedded data set; pairs as soon as --annotations is given."""
    train_split: str = "train"
    """Of the data set."""
    model: str = "testa:b16"
    """testa:b16; testa:tiny trains from scratch in minutes."""
    pretrained: str = "none"
    """A public file of BLIP or TESTA, the OUTPUT/best of another run, or "none" for random weights."""
    temporal_scaling: bool = False
    """A learnt factor of each frame in the attention over time; frames then cannot merge. What is trained further
    leaves it out, as TESTA does."""
    vocabulary: str | None = None
    """A folder with vocab.txt or a hub name; default: the words of the texts."""
    max_words: int = 30
    """Words kept of a text, start and end included."""
    warmup_steps: int = 0
    """Steps in which the rate rises, instead of the share --warmup."""
    contrast_options: tuple[str, ...] = ()
    """NAME=VALUE of contrast with a momentum copy: queue=32, its places, a multiple of --batch-size; momentum=0.995;
    distill=0.4, reached over the first two epochs."""

    def of_contrast(self) -> dict[str, Any]:
        """What contrast is told."""
        return dict(map(named_value, self.contrast_options))


def defaults(arguments: Sequence[str]) -> dict[str, Any]:
    """The defaults of the data set and the model that a command line names.

    Raises:
        ValueError: an unknown data set.
    """
    given = first_look(arguments, ("dataset", "annotations", "model"))
    dataset = given.dataset or (EMBEDDED if given.annotations is None else "pairs")
    model = given.model or ("testa:tiny" if dataset == EMBEDDED else Options.model)
    return {
        **preset("pretraining", Options, model, dataset, arguments),
        "dataset": dataset,
        "model": model,
        "train_split": texts_of(dataset, "captions").usual.train,
        "output": Path("runs") / f"{dataset}-pretraining",
    }


def checked(options: Options) -> Options:
    """Raises:
    ValueError: another model than TESTA's, or options that miss each other.
    """
    models = [name for name in PRESETS["pretraining"] if ":" in name]
    if options.model not in models:
        raise ValueError(f"expected a --model that has pre-training, {' or '.join(models)}; got {options.model!r}")
    options.source()
    from tempme_vl.tasks.testa.model import ContrastOptions  # which imports torch

    read(ContrastOptions, options.of_contrast(), "--contrast-options")
    return options


PRETRAINING = Command(
    "train pretraining",
    Options,
    "tempme_vl.recipes.pretraining:main",
    (
        Example("a first try, on any machine: renders its own small data set"),
        Example(
            "TESTA's setting, from BLIP",
            "--annotations pairs/ --model testa:b16 --pretrained model_base_capfilt_large.pth --deepspeed-config zero2",
            gpus=8,
        ),
    ),
    defaults,
    checked,
)
