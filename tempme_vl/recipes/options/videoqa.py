"""Options of the video QA recipe (tempme_vl/recipes/videoqa.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from tempme_vl.command_line import Command, Example, first_look, named_value
from tempme_vl.data.datasets import ASKED
from tempme_vl.data.options import EMBEDDED
from tempme_vl.recipes.options.presets import preset
from tempme_vl.recipes.options.shared import VisualOptions
from tempme_vl.registries import DATASETS
from tempme_vl.tasks.heads import HeadNames, options_of, read_options
from tempme_vl.tasks.qa.options import NAMED, DecoderOptions, LLMOptions

OF_HEADS = {field.name for kind in NAMED.values() for field in fields(kind)}


@dataclass(frozen=True)
class Options(DecoderOptions, LLMOptions, VisualOptions):
    """Train a front end with a head that answers questions.

    The defaults shown are those of the data set and the model: --help together with --data-root, --dataset or --model
    shows its own. The options in use are written to OUTPUT/options.json.
    """

    dataset: Annotated[str, ASKED] = "msrvtt_qa"
    """Default: motion, the embedded data set; msrvtt_qa as soon as --data-root is given."""
    head: Annotated[str, HeadNames("qa")] = "classifier"
    """classifier: one of the answers; decoder: ranks the answers, or writes freely (--rule generate); llm: a language
    model writes, and its answers are compared without case, punctuation and leading articles; and those of installed
    packages."""
    head_options: tuple[str, ...] = ()
    """NAME=VALUE of a head that has others than those below."""
    num_answers: int = 1500
    """The most frequent answers of the training split, which are those that the model can give. Questions whose
    options differ are answered by choosing among these."""
    vocabulary: str | None = None
    """BERT's words: a folder with vocab.txt or a hub name; default: those of the training questions and answers."""

    def of_head(self) -> dict[str, Any]:
        """What the head is told: its options that stand above by themselves, and those of --head-options."""
        known = {field.name for field in fields(options_of(self.head))}
        given = {name: getattr(self, name) for name in known & OF_HEADS}
        return given | dict(map(named_value, self.head_options))


def defaults(arguments: Sequence[str]) -> dict[str, Any]:
    """The defaults of the data set, the model and the head that a command line names."""
    given = first_look(arguments, ("dataset", "data-root", "model", "method", "head"))
    dataset = given.dataset or (EMBEDDED if given.data_root is None else "msrvtt_qa")
    model = given.model or ("open_clip:tiny" if DATASETS[dataset].rendered else Options.model)
    found = preset("videoqa", Options, model, dataset, arguments)
    head = given.head or found.get("head", Options.head)
    return {
        **found,
        **_of_its_own(head),
        "dataset": dataset,
        "model": model,
        "output": Path("runs") / f"{dataset}-{head}-{given.method or found.get('method', Options.method)}",
    }


def _of_its_own(head: str) -> dict[str, Any]:
    """Defaults of a head that are others than those of the recipe, such as a language model's number of words."""
    if head not in HeadNames("qa"):
        return {}  # which is refused where all options are read
    usual = {field.name: field.default for field in fields(Options)}
    own = [field for field in fields(options_of(head)) if field.name in OF_HEADS and field.default is not MISSING]
    return {field.name: field.default for field in own if field.default != usual[field.name]}


def checked(options: Options) -> Options:
    """Raises:
    ValueError: there is no such way of tuning, or options that the head does not have.
    """
    options.tuned()  # both say what is wrong before anything starts
    read_options(options.head, options.of_head())
    return options


VIDEOQA = Command(
    "train videoqa",
    Options,
    "tempme_vl.recipes.videoqa:main",
    (
        Example("a first try, on any machine: renders its own small data set; 16 minutes on 2 CPU cores"),
        Example(
            "MSRVTT-QA with UMT B/16 and its decoder",
            "--data-root /data/msrvtt --model umt:b16 --pretrained b16_25m.pth --deepspeed-config zero2",
            gpus=8,
        ),
        Example("your own questions", "--dataset jsonl --annotations questions.jsonl --video-root videos/"),
    ),
    defaults,
    checked,
    without=("chunks",),
)
