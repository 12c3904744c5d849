"""What the recipes share: options of the visual tower, of reading clips and of training, presets, and what they build.

A recipe's own options are a dataclass that inherits from those here; its command line shows them as one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from tempme_vl.command import at_least
from tempme_vl.data.broken import MissingVideosError, check_videos
from tempme_vl.data.motion import question_kind
from tempme_vl.data.reader import ClipReader, broken_clips
from tempme_vl.data.transforms import ClipTransform
from tempme_vl.data.videoqa import QASplit
from tempme_vl.evaluation.videoqa import accuracy_by, table
from tempme_vl.frontend import VisualFrontend
from tempme_vl.merging import METHODS, find_method
from tempme_vl.pretrained import VOCABULARY_FILE, load_vocabulary
from tempme_vl.reports import finish, provenance, write_json, write_whole
from tempme_vl.text.tokenizers import bert_vocabulary, word_vocabulary
from tempme_vl.training import distributed
from tempme_vl.training.config import TrainConfig
from tempme_vl.training.engine import Trainer
from tempme_vl.training.optim import AdamWTempMe, BertAdam, parameter_groups
from tempme_vl.tuning import TUNINGS, Tuning, find_tuning

if TYPE_CHECKING:
    TuningName = str
else:
    TuningName = Literal[tuple(TUNINGS)]

# Options that may be others when a run is continued: where things lie, how they are read and stored, what is shown. The
# content of the annotations and of the DeepSpeed file counts instead of their paths, and what a precision stands for.
MAY_CHANGE = {
    *("output", "resume", "max_steps", "save_every", "tensorboard", "workers", "local_rank"),
    *("data_root", "video_root", "annotations", "most_missing", "on_broken"),
    *("frame_cache", "cache_memory", "decoder", "decode_timeout", "clip_memory"),
    *("deepspeed_config", "precision", "grad_checkpointing", "eval_batch_size"),
}

LIMITS = ("budget", "tokens")  # options that choose the merging
BROKEN_VIDEOS = "broken_videos.jsonl"
MISSING_VIDEOS = "missing_videos.txt"
MOTION_ROOT = Path("runs/motion-data")
NO_VALIDATION = "no validation split: last epoch"


@dataclass(frozen=True)
class MergeOptions:
    """How tokens are merged."""

    method: Literal["tempme", "tome", "none"] = "tempme"
    """none encodes every frame by itself with all its tokens."""
    num_frames: int | None = None
    """Frames sampled from each clip; default: the data set's usual number."""
    budget: float | None = None
    """Share of the GFLOPs without merging to stay below: chooses what is not given of the five options of merging.
    Default, where neither the paper nor a preset has a setting: 0.6."""
    tokens: int | None = None
    """Tokens of a video to stay below, instead of a budget."""
    r: int | None = None
    """Pairs merged a frame in each early block (ImgMe, ToMe). These five default to the paper's for B/32, B/16."""
    merge_layers: tuple[int, ...] | None = None
    """Blocks that join clips (ClipMe)."""
    merge_frames: tuple[int, ...] | None = None
    """Neighbouring clips joined in each of them."""
    cross_percent: int | None = None
    """Percent of tokens merged across clips there."""
    intra_percent: int | None = None
    """Percent of tokens merged inside the clips from there on."""
    clip_position_std: float = 0.0
    """Clip positions start as N(0, std^2): 0 for pretrained weights, 0.5 from scratch."""

    def merging(self, usual_frames: int) -> dict[str, Any]:
        """Keywords that `tempme_vl.create_frontend` and `tempme_vl.integrations.compress` share."""
        names = ("budget", "tokens", *find_method(self.method).option_names)
        return {
            "method": self.method,
            "num_frames": self.num_frames or usual_frames,
            "clip_position_std": self.clip_position_std,
            **{name: getattr(self, name) for name in names if getattr(self, name) is not None},
        }


@dataclass(frozen=True)
class VisualOptions(MergeOptions):
    """The visual tower and its merging."""

    model: str = "open_clip:ViT-B-32-quickgelu"
    """open_clip:NAME, umt:b16 or umt:l16; open_clip:tiny and umt:tiny train from scratch in minutes."""
    pretrained: str = "openai"
    """open_clip's tag ("openai"); a file of OpenAI, open_clip, transformers, CLIP4Clip, TempMe or (any form) UMT; the
    OUTPUT/best of another run; or "none" for random weights."""
    mode: Literal["clip", "joint"] = "clip"
    """UMT's frames: apart (UMT4Clip, which TempMe needs), or attending together as in UMT itself."""

    @property
    def is_umt(self) -> bool:
        return self.model.startswith("umt:")

    def tower(self, usual_frames: int) -> dict[str, Any]:
        """Keywords of `tempme_vl.create_frontend` beside the name."""
        return {
            **self.merging(usual_frames),
            "pretrained": None if self.pretrained == "none" else self.pretrained,
            **({"mode": self.mode} if self.is_umt else {}),
        }

    def words(self, texts: Sequence[str], vocabulary: str | None) -> tuple[str, ...]:
        """The words of a BERT text side: those of `vocabulary`, of the folder to go on from, or else of the texts."""
        if vocabulary is not None:
            return bert_vocabulary(vocabulary)
        if (Path(self.pretrained) / VOCABULARY_FILE).is_file():
            return load_vocabulary(self.pretrained)
        return word_vocabulary(texts)


@dataclass(frozen=True)
class TuningOptions:
    """What of the model trains."""

    tuning: TuningName = "full"
    """full: everything. clip4clip: all but token, position and class embeddings, conv1 and ln_pre, as its authors do;
    CLIP only. lora: low-rank updates of all queries, keys and values, and TempMe's clip positions."""
    tuning_options: tuple[str, ...] = ()
    """NAME=VALUE of the tuning's own; for lora rank=8 (the default), alpha (the rank) and dropout=0."""

    def tuned(self) -> Tuning:
        """The way of tuning.

        Raises:
            ValueError: see `find_tuning`.
        """
        return find_tuning(self.tuning, dict(map(_named_value, self.tuning_options)))


@dataclass(frozen=True)
class DataOptions:
    """Where the data set lies; which ones there are, each recipe says."""

    data_root: Path | None = None
    """Folder of the annotation files (and videos) in their public layout; for motion, where to render it."""
    video_root: Path | None = None
    """Folder of the videos, if it is not below --data-root."""
    annotations: Path | None = None
    """The JSON-lines file of --dataset jsonl."""


@dataclass(frozen=True)
class ReadingOptions:
    """How clips are read."""

    sampling: Literal["fps1", "uniform", "segment"] = "fps1"
    """Which frames: one a second (TempMe), evenly, or UMT's segments."""
    augment: Literal["none", "randaugment", "crop_flip"] = "randaugment"
    """crop_flip mirrors clips: not where texts say left or right."""
    on_broken: Literal["record", "raise"] = "record"
    """Videos that cannot be read: listed in OUTPUT/broken_videos.jsonl and counted, or an error."""
    most_missing: float = 0.1
    """Share of the videos that may be missing; if more are, OUTPUT/missing_videos.txt lists them and nothing starts."""
    frame_cache: str = "none"
    """"memory", a folder, or "none": keeps decoded frames, the main speed-up of later epochs."""
    cache_memory: float = 4.0
    """GiB of --frame-cache memory, which a rank's workers share; further clips are decoded each time."""
    decoder: Literal["auto", "pyav", "decord"] = "auto"
    """pyav (a new FFmpeg), decord (an FFmpeg of 2018, not for files of strangers); auto tries both in that order."""
    decode_timeout: float | None = 60.0
    """Seconds after which a decoder is ended; None decodes without a guard."""
    clip_memory: float | None = 2.0
    """GiB that reading one clip may take; more makes it a broken one. None: no limit."""
    workers: int = 8
    """Loader processes a rank, in training and evaluation; 0 reads in the rank's own process."""

    def reader(self, num_frames: int, transform: ClipTransform, output: Path) -> ClipReader:
        """Without augmentation; broken clips are listed in `output`."""
        return ClipReader(
            num_frames,
            transform,
            sampling=self.sampling,
            timeout=self.decode_timeout,
            backend=self.decoder,
            memory_gib=self.clip_memory,
            on_broken=self.on_broken,
            broken_log=output / BROKEN_VIDEOS,
            cache=None if self.frame_cache == "none" else self.frame_cache,
            cache_gib=self.cache_memory,
        )


@dataclass(frozen=True)
class TrainingOptions:
    """The run."""

    output: Path = Path("runs/run")
    """Run folder."""
    deepspeed_config: Path = Path("recipes/ds/zero1.json")
    """zero0, zero1, zero2, zero3, zero3_offload, or your own."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""
    epochs: int = 5
    """0 evaluates and exports the model as it starts (zero-shot)."""
    batch_size: int = 128
    """Global: over all ranks."""
    grad_checkpointing: bool = False
    """Recompute blocks in the backward pass to save memory."""
    lr: float = 1e-7
    """Peak rate of pretrained weights."""
    lr_new: float = 1e-4
    """Peak rate of new modules."""
    warmup: float = 0.1
    """Share of the steps in which the rate rises; it then falls along a cosine to lr_floor of its peak."""
    lr_floor: float = 0.0
    schedule: Literal["cosine", "cosine_from_zero", "cosine_whole"] = "cosine"
    """cosine_from_zero: TempMe's, its first step has rate 0; cosine_whole: CLIP4Clip's, whose cosine is that of the
    whole run, so that the rate drops where the warm-up ends."""
    weight_decay: float = 0.2
    decay: Literal["matrices", "no_bias", "all"] = "matrices"
    """What decays: matrices, not norms, biases and the logit scale; all without "bias" in their names, as in
    CLIP4Clip's code; or all, as in TempMe's."""
    beta2: float = 0.98
    """Adam's."""
    clip_grad: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    optimizer: Literal["adamw", "bertadam", "adamw_tempme", "sgd"] = "adamw"
    """adamw is torch's, which every recipe uses by default. CLIP4Clip's published rule is --optimizer bertadam
    --schedule cosine_whole --decay no_bias (on ZeRO stage 0, fp32); TempMe's is --optimizer adamw_tempme
    --schedule cosine_from_zero --decay all --beta2 0.999. sgd is plain, for comparing runs exactly."""
    seed: int = 0
    save_every: int = 500
    """Steps between checkpoints; one is always written at the end and on SIGTERM."""
    resume: Literal["never", "auto"] = "never"
    """auto continues from OUTPUT's last checkpoint if there is one."""
    tensorboard: bool = False
    max_steps: int | None = None
    """Stop after this many steps (for trying things out); the schedule stays that of the whole run."""
    local_rank: int = 0
    """Set by the deepspeed launcher."""

    def config(self) -> TrainConfig:
        """The engine's part of all options of the recipe."""
        names = {field.name for field in fields(TrainConfig)} & {field.name for field in fields(self)}
        return TrainConfig(deepspeed=self.deepspeed_config, **{name: getattr(self, name) for name in names})

    def build_optimizer(self, model: nn.Module, is_new_parameter: Callable[[str], bool]) -> torch.optim.Optimizer:
        groups = parameter_groups(model, self.lr, self.lr_new, self.weight_decay, is_new_parameter, self.decay)
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups)
        betas = (0.9, self.beta2)
        if self.optimizer == "bertadam":
            return BertAdam(groups, betas=betas)
        if self.optimizer == "adamw_tempme":
            return AdamWTempMe(groups, betas=betas)
        return torch.optim.AdamW(groups, betas=betas, eps=1e-6, fused=True)


# What differs from a recipe's defaults. The data set that we rendered ourselves needs no guard around its decoder.
MOTION: dict[str, Any] = {
    "data_root": MOTION_ROOT,
    "frame_cache": str(MOTION_ROOT / "frames"),
    "decode_timeout": None,
    "max_words": 12,
}
FROM_SCRATCH: dict[str, Any] = {
    "model": "open_clip:tiny",
    "pretrained": "none",
    "num_frames": 8,
    "r": 1,
    "merge_layers": (2, 3, 4),
    "merge_frames": (2, 2, 2),
    "cross_percent": 30,
    "intra_percent": 10,
    "clip_position_std": 0.5,
    "epochs": 5,
    "batch_size": 48,
    "lr": 1e-3,
    "lr_new": 1e-3,
    "weight_decay": 0.05,
    "augment": "none",
    "sampling": "uniform",
    "frame_cache": "memory",
    "workers": 0,
}
UMT: dict[str, Any] = {  # what UMT's published settings share, for 8 GPUs
    "pretrained": "none",
    "vocabulary": "bert-base-uncased",
    "batch_size": 256,
    "lr": 2e-5,
    "lr_new": 1e-4,  # ours: UMT has no clip positions
    "lr_floor": 0.01,
    "weight_decay": 0.02,
    "beta2": 0.999,
    "clip_grad": 0.0,
    "augment": "crop_flip",
    "sampling": "segment",
    "grad_checkpointing": True,
}


def _named_value(option: str) -> tuple[str, Any]:
    """ "rank=16" as ("rank", 16)."""
    name, equals, text = option.partition("=")
    if not equals:
        raise ValueError(f"expected NAME=VALUE; got {option!r}")
    try:
        return name, json.loads(text)
    except ValueError:  # a word
        return name, text


def first_look(arguments: Sequence[str] | None, names: Sequence[str]) -> argparse.Namespace:
    """The options that decide about the defaults of others, as texts or None, before all are parsed."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}")
    return parser.parse_known_args(arguments)[0]


def merged_by(preset: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """A preset without its own merging where the command line has a budget or a number of tokens.

    Args:
        given: what `first_look` found of LIMITS.
    """
    if given.budget is None and given.tokens is None:
        return preset
    merging = {name for method in METHODS.values() for name in method.option_names}
    return {name: value for name, value in preset.items() if name not in merging}


def begin(options: Any) -> torch.device:
    """Refuses numbers that mean nothing, joins the ranks and seeds torch."""
    check_numbers(options)
    device = distributed.initialize()
    torch.manual_seed(options.seed)
    return device


def check_numbers(options: Any) -> None:
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


def check_files(options: Any, *splits: Any) -> None:
    """Looks for the videos of all splits, before anything else takes time.

    Raises:
        ValueError: more than --most-missing are not there; OUTPUT/missing_videos.txt lists them.
    """
    clips = [clip for split in splits if split is not None for clip in clips_of(split)]
    file = options.output / MISSING_VIDEOS
    try:
        missing = check_videos(clips, options.most_missing)
    except MissingVideosError as error:
        if distributed.is_main():
            write_whole(file, "".join(f"{path}\n" for path in error.paths).encode())
        raise ValueError(f"{error}; {file} lists all, --most-missing sets the share") from None
    if missing:
        say(f"{len(missing)} videos are missing, among them {missing[0]}; they count as not found in evaluation")


def clips_of(split: Any) -> list[Any]:
    """The clips of a split of captions or questions."""
    return [question.clip for question in split.questions] if isinstance(split, QASplit) else split.clips


def facts(options: Any, model: Any, **splits: Any) -> dict[str, Any]:
    """What decides a run's result beside the engine's own options: see `Trainer`.

    Args:
        model: JSON data that describes it, its schedule among it.
        splits: by their roles; None for one that there is not.
    """
    engine = {field.name for field in fields(TrainConfig)}
    names = [field.name for field in fields(options) if field.name not in MAY_CHANGE | engine]
    contents = {role: "none" if split is None else content(split) for role, split in splits.items()}
    return {**{name: getattr(options, name) for name in names}, "model_config": model, "annotations": contents}


def content(split: Any) -> str:
    """Hash of a split's clips, texts and times; of its files only the names, so that a data set may move."""

    def plain(value: Any) -> Any:
        return value.name if isinstance(value, Path) else vars(value)

    return hashlib.blake2b(json.dumps(split, default=plain).encode(), digest_size=8).hexdigest()


def in_words(options: Any, frontend: VisualFrontend) -> str:
    """What becomes of a video's tokens, and its cost."""
    schedule = frontend.schedule
    clips, tokens = schedule.token_counts[-1]
    return (
        f"{options.model}, {options.method}: {schedule.frames} x {schedule.tokens} tokens -> {clips} x {tokens}, "
        f"{frontend.gflops():.3g} GFLOPs a video"
    )


def announce(options: Any, model: str, data: str) -> None:
    """Writes OUTPUT/options.json and prints what will be trained on what, both in words."""
    if not distributed.is_main():
        return
    chosen = {field.name: getattr(options, field.name) for field in fields(options)}
    plain = json.loads(json.dumps(chosen, default=str))
    write_json(options.output / "options.json", {**plain, **provenance()})
    if options.dataset == "motion":
        say(f"Data set motion: embedded, rendered in {options.data_root}")
    say(f"{model}\n{data}")


def export(trainer: Trainer, model: Any, output: Path) -> None:
    """Writes OUTPUT/best by the model's `save_pretrained`; all ranks call it."""
    trainer.export(output / "best", model.save_pretrained)


def cost(frontend: VisualFrontend) -> dict[str, Any]:
    """Tokens and GFLOPs of a video, for a report."""
    schedule = frontend.schedule
    return {
        "output_tokens": schedule.output_tokens,
        "input_tokens": schedule.frames * schedule.tokens,
        "gflops": frontend.gflops(),
    }


def about_run(options: Any, trainer: Trainer, val: str | None, start_step: int, seconds: float) -> dict[str, Any]:
    """What a report says of a run beside its results.

    Args:
        val: name of the split that the best epoch was chosen on, if there was one.
        start_step, seconds: where this run began, and how long it trained.
    """
    return {
        "selected_on": val or NO_VALIDATION,
        "selected_step": trainer.best_step,
        "method": options.method,
        "seed": options.seed,
        "train_seconds": seconds,
        "train_steps": trainer.step - start_step,
        "ranks": distributed.world_size(),
        "broken_videos": broken_clips(options.output / BROKEN_VIDEOS),
    }


def write_report(options: Any, report: dict[str, Any], shown: str, *more: Callable[[], object]) -> None:
    """Prints what is to be shown of a report, and which videos are missing in it; then writes OUTPUT/report.json.

    Args:
        more: write other files.
    """
    if not distributed.is_main():
        return
    chosen = report["selected_on"]
    lines = [f"\n{chosen if chosen == NO_VALIDATION else f'best epoch chosen on {chosen}'}", shown]
    if report["broken_videos"]:
        lines.append(f"{len(report['broken_videos'])} videos could not be read: {options.output / BROKEN_VIDEOS}")
    finish("\n".join(lines), report, options.output / "report.json", *more)


def write_answers(options: Any, report: dict[str, Any], predictions: dict[str, str], test: QASplit) -> None:
    """`write_report` of a model that answers questions, and OUTPUT/predictions.json."""
    shown = [table(report)]
    if options.dataset == "motion":
        report["by_kind"] = accuracy_by(predictions, test, question_kind)
        shown += [f"{kind:<10}{count:>10}{percent:>12.2f}" for kind, (percent, count) in report["by_kind"].items()]
    file = options.output / "predictions.json"
    write_report(options, report, "\n".join(shown), partial(write_json, file, predictions, 0))


def say(text: str) -> None:
    """Prints on the first rank."""
    if distributed.is_main():
        print(text, flush=True)
