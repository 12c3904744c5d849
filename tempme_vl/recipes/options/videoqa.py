"""Options of the video QA recipe (tempme_vl/recipes/videoqa.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tempme_vl.command_line import Command, Example, first_look
from tempme_vl.data.datasets import ASKED
from tempme_vl.data.options import EMBEDDED
from tempme_vl.recipes.options.presets import preset
from tempme_vl.recipes.options.shared import VisualOptions
from tempme_vl.registries import DATASETS


@dataclass(frozen=True)
class Options(VisualOptions):
    """Train a front end with a head that answers questions.

    The defaults shown are those of the data set and the model: --help together with --data-root, --dataset or --model
    shows its own. The options in use are written to OUTPUT/options.json.
    """

    dataset: Annotated[str, ASKED] = "msrvtt_qa"
    """Default: motion, the embedded data set; msrvtt_qa as soon as --data-root is given."""
    head: Literal["classifier", "decoder", "llm"] = "classifier"
    """classifier: one of the answers; decoder: ranks the answers, or writes freely (--rule generate); llm: a language
    model writes, and its answers are compared without case, punctuation and leading articles."""
    num_answers: int = 1500
    """The most frequent answers of the training split, which are those that the model can give. Questions whose
    options differ are answered by choosing among these."""
    vocabulary: str | None = None
    """BERT's words: a folder with vocab.txt or a hub name; default: those of the training questions and answers."""
    text: str | None = None
    """Size of the text side: bert-base, bert-large or tiny; default: UMT's own, bert-base for CLIP."""
    text_pretrained: str | None = None
    """A BERT that the text side starts from: a folder with model.safetensors or a hub name."""
    max_words: int = 25
    """Word pieces kept of a question, [CLS] included."""
    answer_words: int = 5
    """Word pieces kept of an answer, [CLS] and [SEP] included."""
    rule: Literal["likelihood", "umt", "generate"] | None = None
    """How the decoder answers: by log p(answer); UMT's own, which counts the first word twice; or word by word."""
    candidates: int = 128
    """Answers that the decoder scores whole: those with the likeliest first words."""
    llm: str | None = None
    """The language model of --head llm: a folder or a hub name, with safetensors weights."""
    lora_rank: int = 0
    """LoRA on the language model; 0 for none."""
    train_llm: bool = False
    """Train the language model whole; without it and without LoRA it stays as it is."""


# pieces of a language model, the template's among them
LLM = {"max_words": 64, "answer_words": 8}


def defaults(arguments: Sequence[str]) -> dict[str, Any]:
    """The defaults of the data set, the model and the head that a command line names."""
    given = first_look(arguments, ("dataset", "data-root", "model", "method", "head"))
    dataset = given.dataset or (EMBEDDED if given.data_root is None else "msrvtt_qa")
    model = given.model or ("open_clip:tiny" if DATASETS[dataset].rendered else Options.model)
    found = preset("videoqa", Options, model, dataset, arguments)
    head = given.head or found.get("head", Options.head)
    return {
        **found,
        **(LLM if head == "llm" else {}),
        "dataset": dataset,
        "model": model,
        "output": Path("runs") / f"{dataset}-{head}-{given.method or Options.method}",
    }


def checked(options: Options) -> Options:
    """Raises:
    ValueError: there is no such way of tuning.
    """
    options.tuned()  # says what is wrong before anything starts
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
