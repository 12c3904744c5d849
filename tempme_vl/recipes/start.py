"""How a run starts: numbers and files are checked, what decides its result is written down, what it does is said."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from tempme_vl.command import at_least
from tempme_vl.data.broken import MissingVideosError, check_videos
from tempme_vl.recipes.names import MISSING_VIDEOS
from tempme_vl.recipes.options import pretraining
from tempme_vl.recipes.options.shared import RecipeOptions, VisualOptions
from tempme_vl.reports import provenance, write_json, write_whole
from tempme_vl.tasks.qa.options import LLMOptions
from tempme_vl.training import distributed
from tempme_vl.training.config import TrainConfig
from tempme_vl.tuning import TunableModel

# Options that may be others when a run is continued: where things lie, how they are read and stored, what is shown. The
# content of the annotations and of the DeepSpeed file counts instead of their paths, and what a precision stands for.
MAY_CHANGE = {
    *("output", "resume", "max_steps", "save_every", "tensorboard", "workers"),
    *("data_root", "video_root", "annotations", "most_missing", "on_broken"),
    *("frame_cache", "cache_memory", "decoder", "decode_timeout", "clip_memory"),
    *("deepspeed_config", "precision", "grad_checkpointing", "eval_batch_size"),
}

# Options that came later, with the value that changes nothing: runs from before do not record them.
LATER: dict[str, Any] = {
    "method_options": (),
    "head": "mean",  # of retrieval, which had no other
    "head_options": (),
    "contrast_options": (),
    **{name: getattr(LLMOptions, name) for name in ("template", "lora_alpha", "lora_dropout", "dtype")},
}

# Values that got other names, as checkpoints have recorded them before.
OLDER: dict[str, dict[Any, Any]] = {"mode": {"per_frame": "clip"}, "rerank": {None: 128}}

# Fields of splits and questions as checkpoints have them in the hash of their annotations.
RECORDED = {"videos": "clips", "video": "clip"}


def begin(options: RecipeOptions) -> torch.device:
    """Refuses numbers that mean nothing, joins the ranks and seeds torch."""
    check_numbers(options)
    device = distributed.initialize()
    torch.manual_seed(options.seed)
    return device


def check_numbers(options: RecipeOptions) -> None:
    """ValueError for a number that an option of any recipe cannot have; names the option."""
    least = {
        0: ("epochs", "workers", "max_steps", "lr", "lr_new", "weight_decay", "clip_grad"),
        1: ("batch_size", "eval_batch_size", "save_every", "num_frames", "max_words", "chunks"),
    }
    for number, names in least.items():
        at_least(number, **{name: getattr(options, name) for name in names if hasattr(options, name)})
    for name in ("warmup", "lr_floor", "beta2", "most_missing"):
        if not 0 <= getattr(options, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} is a share, 0 to 1; got {getattr(options, name)}")


def check_files(options: RecipeOptions, *splits: Any) -> None:
    """Looks for the videos of all splits, before anything else takes time.

    Raises:
        ValueError: more than --most-missing are not there; OUTPUT/missing_videos.txt lists them.
    """
    videos = [video for split in splits if split is not None for video in split.videos]
    file = options.output / MISSING_VIDEOS
    try:
        missing = check_videos(videos, options.most_missing)
    except MissingVideosError as error:
        if distributed.is_main():
            write_whole(file, "".join(f"{path}\n" for path in error.paths).encode())
        raise ValueError(f"{error}; {file} lists all, --most-missing sets the share") from None
    if missing:
        say(f"{len(missing)} videos are missing, among them {missing[0]}; they count as not found in evaluation")


def facts(options: RecipeOptions, model: Any, **splits: Any) -> dict[str, Any]:
    """What decides a run's result beside the engine's own options: see `Trainer`.

    Args:
        model: JSON data that describes it, its schedule among it.
        splits: by their roles; None for one that there is not.
    """
    engine = {field.name for field in fields(TrainConfig)}
    names = [field.name for field in fields(options) if field.name not in MAY_CHANGE | engine]
    chosen = {name: getattr(options, name) for name in names}
    chosen = {name: value for name, value in chosen.items() if name not in LATER or value != LATER[name]}
    chosen |= {name: OLDER[name].get(chosen[name], chosen[name]) for name in OLDER if name in chosen}
    contents = {role: "none" if split is None else content(split) for role, split in splits.items()}
    return {**chosen, "model_config": model, "annotations": contents}


def content(split: Any) -> str:
    """Hash of a split's videos, texts and times; of its files only the names, so that a data set may move."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return value.name
        return {RECORDED.get(name, name): part for name, part in vars(value).items()}

    return hashlib.blake2b(json.dumps(split, default=plain).encode(), digest_size=8).hexdigest()


def in_words(options: VisualOptions | pretraining.Options, model: TunableModel) -> str:
    """What becomes of a video's tokens, and its cost."""
    schedule = model.frontend.schedule
    clips, tokens = schedule.token_counts[-1]
    return (
        f"{options.model}, {options.method}: {schedule.frames} x {schedule.tokens} tokens -> {clips} x {tokens}, "
        f"{model.gflops():.3g} GFLOPs a video"
    )


def announce(options: RecipeOptions, model: str, data: str) -> None:
    """Writes OUTPUT/options.json and prints what will be trained on what, both in words."""
    if not distributed.is_main():
        return
    chosen = {field.name: getattr(options, field.name) for field in fields(options)}
    plain = json.loads(json.dumps(chosen, default=str))
    write_json(options.output / "options.json", {**plain, **provenance()})
    if options.source().record.rendered:
        say(f"Data set {options.dataset}: embedded, rendered in {options.data_root}")
    say(f"{model}\n{data}")


def say(text: str) -> None:
    """Prints on the first rank."""
    if distributed.is_main():
        print(text, flush=True)
