"""The options that recipes share: data, tower and merging, tuning, reading clips, training.

A recipe's own options are a dataclass that inherits from those here; its command line shows them as one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from tempme_vl.data.reader import ClipReader
from tempme_vl.data.transforms import ClipTransform
from tempme_vl.families import Family, find_family
from tempme_vl.merging import METHODS
from tempme_vl.pretrained import VOCABULARY_FILE, load_vocabulary
from tempme_vl.recipes.names import BROKEN_VIDEOS
from tempme_vl.text.tokenizers import bert_vocabulary, word_vocabulary
from tempme_vl.training.config import TrainConfig
from tempme_vl.training.optim import AdamWTempMe, BertAdam, parameter_groups
from tempme_vl.tuning import TUNINGS, Tuning, find_tuning

if TYPE_CHECKING:
    MethodName = str
    TuningName = str
else:
    MethodName = Literal[tuple(METHODS)]
    TuningName = Literal[tuple(TUNINGS)]

LIMITS = ("budget", "tokens")  # options that choose the merging


@dataclass(frozen=True)
class MergeOptions:
    """How tokens are merged."""

    method: MethodName = "tempme"
    """none encodes every frame by itself with all its tokens."""
    method_options: tuple[str, ...] = ()
    """NAME=VALUE of a method that has others than the five below."""
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
        names = ("budget", "tokens", *METHODS[self.method].option_names)
        return {
            "method": self.method,
            "num_frames": self.num_frames or usual_frames,
            "clip_position_std": self.clip_position_std,
            **{name: getattr(self, name) for name in names if getattr(self, name, None) is not None},
            **dict(map(_named_value, self.method_options)),
        }


@dataclass(frozen=True)
class VisualOptions(MergeOptions):
    """The visual tower and its merging."""

    model: str = "open_clip:ViT-B-32-quickgelu"
    """open_clip:NAME, umt:b16, umt:l16, or hf: and a hub id or folder of CLIP, SigLIP or SigLIP 2; open_clip:tiny and
    umt:tiny train from scratch in minutes."""
    pretrained: str = "openai"
    """open_clip's tag ("openai"); a file of OpenAI, open_clip, transformers, CLIP4Clip, TempMe or (any form) UMT; the
    OUTPUT/best of another run; or "none" for random weights."""
    mode: Literal["clip", "joint"] = "clip"
    """UMT's frames: apart (UMT4Clip, which TempMe needs), or attending together as in UMT itself."""

    @property
    def family(self) -> Family:
        """ValueError for a model's name without a known one."""
        return find_family(self.model)

    def tower(self, usual_frames: int) -> dict[str, Any]:
        """Keywords of `tempme_vl.create_frontend` beside the name."""
        return {
            **self.merging(usual_frames),
            "pretrained": None if self.pretrained == "none" else self.pretrained,
            **({"mode": self.mode} if "mode" in self.family.options else {}),
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


@dataclass(frozen=True)
class RecipeOptions(DataOptions, MergeOptions, ReadingOptions, TrainingOptions):
    """What every recipe has."""

    dataset: str = "motion"


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
