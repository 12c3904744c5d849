"""Options of the retrieval recipes (tempme_vl/recipes/retrieval.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from tempme_vl.command_line import Command, Example, first_look, named_value
from tempme_vl.data.datasets import CAPTIONED, texts_of
from tempme_vl.data.options import EMBEDDED
from tempme_vl.recipes.options.presets import preset
from tempme_vl.recipes.options.shared import VisualOptions
from tempme_vl.registries import DATASETS
from tempme_vl.schema import read
from tempme_vl.tasks.heads import HeadNames, read_options


@dataclass(frozen=True)
class Options(VisualOptions):
    """Fine-tune CLIP or UMT with TempMe, or TESTA, for text-video retrieval.

    The defaults shown are those of the data set, the model, the tuning and the head: --help together with --data-root,
    --dataset, --model, --tuning or --head shows its own. For CLIP those of a tuning or head are what its paper trained
    with, as far as it says. The options in use are written to OUTPUT/options.json.
    """

    dataset: Annotated[str, CAPTIONED] = "msrvtt"
    """Default: motion, the embedded data set; msrvtt as soon as --data-root is given."""
    train_split: str = "train"
    """For example train_9k or train_7k on MSRVTT."""
    val_split: str | None = None
    """The data set's own validation split, to choose the best epoch by; else see holdout."""
    test_split: str = "test"
    """Looked at once, after training. For example test_1k or test_full on MSRVTT."""
    holdout: int = 0
    """Videos taken away from train to choose the best epoch by; 0 without a val_split takes the last epoch."""
    vocabulary: str | None = None
    """UMT's and TESTA's words: a folder with vocab.txt or a hub name; default: those of the training captions."""
    max_words: int | None = None
    """Words kept of a caption, start and end included; default: the data set's usual 32 or 64. TESTA has 128 for
    paragraphs."""
    freeze: Literal["none", "clip4clip"] | None = None
    """The older name of --tuning: none is full."""
    head: Annotated[str, HeadNames("retrieval")] = "mean"
    """What compares videos and texts. mean: the mean of the frames with the text, as TempMe; maxsim: each word with the
    token nearest to it; xpool: each text pools the tokens by its own attention; seqlstm, seqtransf, tighttransf:
    CLIP4Clip's over frames; eercf: one embedding each, then frames and tokens as the text weighs them; and those of
    installed packages."""
    head_options: tuple[str, ...] = ()
    """NAME=VALUE of the head's own: of=frames or of=tokens; of maxsim mean=false, loss=sigmoid; of xpool heads,
    dropout; of seqtransf, tighttransf and eercf layers; of eercf the weights of its loss."""
    rerank: int | None = None
    """Candidates of each query that a second stage ranks anew in the test, both ways: UMT's or TESTA's layers that see
    both sides, or the head eercf. 0 leaves it out. Default: UMT and TESTA 128, eercf 50."""
    contrast_options: tuple[str, ...] = ()
    """NAME=VALUE of TESTA's contrast with a momentum copy: queue=32, its places, a multiple of --batch-size;
    momentum=0.995; distill=0.4, reached over the first epoch; all_ranks=true, where hard negatives come from."""

    def of_head(self) -> dict[str, Any]:
        """What the head is told."""
        return dict(map(named_value, self.head_options))

    def of_contrast(self) -> dict[str, Any]:
        """What TESTA's contrast is told."""
        return dict(map(named_value, self.contrast_options))


def defaults(arguments: Sequence[str], recipe: str = "retrieval", suffix: str = "") -> dict[str, Any]:
    """The defaults of the data set and the model that a command line names.

    Args:
        recipe: in PRESETS.
        suffix: of the run folder's name.

    Raises:
        ValueError: an unknown data set, or both names of an option.
    """
    given = first_look(arguments, ("dataset", "data-root", "model", "method", "tuning", "freeze"))
    if given.tuning and given.freeze:
        raise ValueError("--freeze is the older name of --tuning (none is full): give one of them")
    dataset = given.dataset or (EMBEDDED if given.data_root is None else "msrvtt")
    model = given.model or ("open_clip:tiny" if DATASETS[dataset].rendered else Options.model)
    splits = texts_of(dataset, "captions").usual
    found = preset(recipe, Options, model, dataset, arguments)
    return {
        **found,
        "dataset": dataset,
        "model": model,
        "train_split": splits.train,
        "val_split": splits.val,
        "test_split": splits.test,
        "holdout": splits.holdout,
        "output": Path("runs") / f"{dataset}-{given.method or found.get('method', Options.method)}{suffix}",
    }


def checked(options: Options) -> Options:
    """With the older name of --tuning resolved.

    Raises:
        ValueError: options that miss each other.
    """
    if options.freeze is not None:
        options = replace(options, tuning="full" if options.freeze == "none" else options.freeze, freeze=None)
    options.tuned()  # these say what is wrong before anything starts
    options.source()
    read_options(options.head, options.of_head())
    if options.contrast_options:
        from tempme_vl.tasks.testa.model import ContrastOptions  # which imports torch, as below

        read(ContrastOptions, options.of_contrast(), "--contrast-options")
    if options.chunks > 1:
        from tempme_vl.families import find_family

        if find_family(options.model).needs_vocabulary:
            raise ValueError(
                "--chunks caches gradients of a contrastive loss alone; UMT and TESTA also match pairs: leave it 1"
            )
    return options


RETRIEVAL = Command(
    "train retrieval",
    Options,
    "tempme_vl.recipes.retrieval:main",
    (
        Example("a first try, on any machine: renders its own small data set; 2 minutes on 2 CPU cores"),
        Example(
            "MSRVTT-1kA, ViT-B/16",
            "--data-root /data/msrvtt --model open_clip:ViT-B-16-quickgelu --deepspeed-config zero2",
            gpus=8,
        ),
        Example("your own videos", "--dataset jsonl --annotations videos.jsonl --video-root videos/"),
    ),
    defaults,
    checked,
)
PEFT = Command(
    "train peft",
    Options,
    "tempme_vl.recipes.retrieval:main",
    (
        Example(
            "a first try, on any machine: joins the clips of the demo's frame-wise model",
            "--pretrained runs/demo/none-seed0/best --lr-new 1e-2",
        ),
        Example("MSRVTT-1kA, ViT-B/32", "--data-root /data/msrvtt", gpus=8),
    ),
    partial(defaults, recipe="peft", suffix="-lora"),
    checked,
    summary="Fine-tune little of CLIP with TempMe: LoRA and the clip positions, the paper's main table.",
)
