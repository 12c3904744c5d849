"""Options of the recipe for video-language models (tempme_vl/recipes/videollm.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tempme_vl.command_line import Command, Example, first_look
from tempme_vl.data.datasets import ASKED
from tempme_vl.data.options import EMBEDDED
from tempme_vl.recipes.options.presets import preset
from tempme_vl.recipes.options.shared import RecipeOptions
from tempme_vl.registries import DATASETS
from tempme_vl.schema import read_json
from tempme_vl.tasks.inputs import VIDEOLLM_FILE

ASKED_ALIKE = ("image_size", "prompt", "answer_tokens", "sampling")  # as the run did whose model trains on


@dataclass(frozen=True)
class Options(RecipeOptions):
    """Fine-tune a compressed video-language model on questions.

    The defaults shown are those of the data set and the host: --help together with --data-root, --dataset or --host
    shows its own. The options in use are written to OUTPUT/options.json.
    """

    dataset: Annotated[str, ASKED] = "msrvtt_qa"
    """Default: motion, the embedded data set; msrvtt_qa as soon as --data-root is given."""
    host: str = "LanguageBind/Video-LLaVA-7B-hf"
    """A folder or hub name of a video-language model of transformers, one of tempme_vl.integrations.HOSTS; or
    tiny:VideoLlava, tiny:Qwen2_5_VL: random, with the words of the training questions, written to OUTPUT/host; or
    OUTPUT/best of another run without LoRA, to train on from there.
    Hosts that merge behind their tower have no --r (of TempMe) and no --merge-layers."""
    where: Literal["auto", "tower", "behind"] = "auto"
    """Inside the host's tower or behind it; auto: as the options of merging are, inside where both could be meant."""
    budget: float | None = None
    """Share of the host's own visual tokens to keep at most: chooses what is not given of the options of merging."""
    tokens: int | None = None
    """Visual tokens of a video at most, instead of a budget."""
    lora_rank: int = 16
    """LoRA on all linear layers of the language model; 0 for none. Its update is scaled by 1, whatever the rank."""
    train_language_model: bool = False
    """Train all weights of the language model, in place of LoRA."""
    train_frontend: bool = False
    """Train the tower and the clip positions, too."""
    prompt: str | None = None
    """With {question} and the host's placeholder for a video; default: the host's own chat format, or LLaVA's."""
    answer_tokens: int = 16
    """The most tokens of a written answer."""
    image_size: int = 224
    """Pixels of the square frames that the host's own preprocessing gets."""
    eval_batch_size: int = 16
    """Questions asked at once on each rank."""


def defaults(arguments: Sequence[str]) -> dict[str, Any]:
    """The defaults of the data set and the host that a command line names."""
    given = first_look(arguments, ("dataset", "data-root", "host", "method"))
    dataset = given.dataset or (EMBEDDED if given.data_root is None else "msrvtt_qa")
    host = given.host or ("tiny:VideoLlava" if DATASETS[dataset].rendered else Options.host)
    return {
        **preset("videollm", Options, host, dataset, arguments),
        **_of_run(Path(host) / VIDEOLLM_FILE),
        "dataset": dataset,
        "host": host,
        "output": Path("runs") / f"{dataset}-videollm-{given.method or Options.method}",
    }


def _of_run(file: Path) -> dict[str, Any]:
    """How the model that an earlier run exported is asked; nothing of another host."""
    if not file.is_file():
        return {}
    said = read_json(file)
    return {name: value for name, value in (said | said["input"]).items() if name in ASKED_ALIKE}


VIDEOLLM = Command(
    "train videollm",
    Options,
    "tempme_vl.recipes.videollm:main",
    (
        Example("a first try, on any machine: a tiny random Video-LLaVA on a small data set that it renders itself"),
        Example(
            "Video-LLaVA-7B on MSRVTT-QA; the schedule is an example",
            "--data-root /data/msrvtt --host LanguageBind/Video-LLaVA-7B-hf --r 8 --merge-layers 16 18 20 "
            "--merge-frames 2 2 2 --cross-percent 30 --intra-percent 10 --train-frontend --deepspeed-config zero2",
            gpus=8,
        ),
    ),
    defaults,
    without=("chunks",),
)
