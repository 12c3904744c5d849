"""The options that recipes share: data, tower and merging, tuning, reading videos, training.

A recipe's own options are a dataclass that inherits from those here; its command line shows them in groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tempme_vl.command_line import named_value
from tempme_vl.data.datasets import Source
from tempme_vl.data.options import EMBEDDED, DataOptions
from tempme_vl.registries import METHODS
from tempme_vl.training.config import TrainConfig
from tempme_vl.tuning import TUNINGS, Tuning, find_tuning


@dataclass(frozen=True)
class MergeOptions:
    """How tokens are merged."""

    method: Annotated[str, METHODS] = "tempme"
    """Of merging, those of installed packages included; none encodes every frame by itself with all its tokens."""
    method_options: tuple[str, ...] = ()
    """NAME=VALUE of a method that has others than the five below, in JSON: r_spatial=2, r_temporal=[1,1,0]."""
    num_frames: int | None = None
    """Frames sampled from each video; default: the data set's usual number."""
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


@dataclass(frozen=True)
class TowerOptions:
    """The visual tower."""

    model: str = "open_clip:ViT-B-32-quickgelu"
    """open_clip:NAME, umt:b16, umt:l16, testa:b16, or hf: and a hub id or folder of CLIP, SigLIP or SigLIP 2;
    open_clip:tiny, umt:tiny, testa:tiny and testa:mini (many frames) train from scratch in minutes."""
    pretrained: str = "openai"
    """open_clip's tag ("openai"); a file of OpenAI, open_clip, transformers, CLIP4Clip, TempMe or (any form) UMT, BLIP
    and TESTA; the OUTPUT/best of another run; or "none" for random weights."""
    mode: Literal["per_frame", "joint", "clip"] = "per_frame"
    """UMT's frames: apart (UMT4Clip, which TempMe needs; clip is its older name), or attending together as in UMT."""


@dataclass(frozen=True)
class TuningOptions:
    """What of the model trains."""

    tuning: Annotated[str, TUNINGS] = "full"
    """full: everything. clip4clip: all but token, position and class embeddings, conv1 and ln_pre, as its authors do;
    CLIP only. lora: low-rank updates of all queries, keys and values, and TempMe's clip positions. The others, which
    need CLIP but for dora, train small modules beside frozen weights: docs/add_a_tuning.md has a table. Named on the
    command line of a retrieval recipe, it brings its paper's rates, optimizer and epochs as defaults, for CLIP."""
    tuning_options: tuple[str, ...] = ()
    """NAME=VALUE of the tuning's own; for lora rank=8 (the default), alpha (the rank) and dropout=0."""

    def tuned(self) -> Tuning:
        """The way of tuning.

        Raises:
            ValueError: see `find_tuning`.
        """
        return find_tuning(self.tuning, dict(map(named_value, self.tuning_options)))


@dataclass(frozen=True)
class ReadingOptions:
    """How videos are read."""

    sampling: Literal["fps1", "uniform", "segment", "strided", "headtail"] = "fps1"
    """Which frames: one a second (TempMe), evenly, UMT's segments; strided, evenly but one step short of the end, as
    TESTA means it; headtail, as many of the first half as of the second, as TESTA pre-trains."""
    augment: Literal["none", "randaugment", "crop_flip", "crop_augment"] = "randaugment"
    """crop_flip mirrors videos, and so does crop_augment, TESTA's in pre-training: not where texts say left or
    right."""
    on_broken: Literal["record", "raise"] = "record"
    """Videos that cannot be read: listed in OUTPUT/broken_videos.jsonl and counted, or an error."""
    most_missing: float = 0.1
    """Share of the videos that may be missing; if more are, OUTPUT/missing_videos.txt lists them and nothing starts."""
    frame_cache: str = "none"
    """"memory", a folder, or "none": keeps decoded frames, the main speed-up of later epochs."""
    cache_memory: float = 4.0
    """GiB of --frame-cache memory, which a rank's workers share; further videos are decoded each time."""
    decoder: Literal["auto", "pyav", "decord"] = "auto"
    """pyav (a new FFmpeg), decord (an FFmpeg of 2018, not for files of strangers); auto tries both in that order."""
    decode_timeout: float | None = 60.0
    """Seconds after which a decoder is ended; None decodes without a guard."""
    clip_memory: float | None = 2.0
    """GiB that reading one video may take; more makes it a broken one. None: no limit."""


@dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer."""

    lr: float = 1e-7
    """Peak rate of pretrained weights."""
    lr_new: float = 1e-4
    """Peak rate of new modules."""
    optimizer: Literal["adamw", "bertadam", "adamw_tempme", "sgd"] = "adamw"
    """adamw is torch's, which every recipe uses by default. CLIP4Clip's published rule is --optimizer bertadam
    --schedule cosine_whole --decay no_bias (on ZeRO stage 0, fp32); TempMe's is --optimizer adamw_tempme
    --schedule cosine_from_zero --decay all --beta2 0.999. sgd is plain, for comparing runs exactly."""
    weight_decay: float = 0.2
    """Of the weights that --decay names."""
    decay: Literal["matrices", "no_bias", "all"] = "matrices"
    """What decays: matrices, not norms, biases and the logit scale; all without "bias" in their names, as in
    CLIP4Clip's code; or all, as in TempMe's."""
    beta2: float = 0.98
    """Adam's."""


@dataclass(frozen=True)
class RunOptions(TrainConfig):
    """Memory and trial runs."""

    grad_checkpointing: bool = False
    """Recompute blocks in the backward pass to save memory."""
    max_steps: int | None = None
    """Stop after this many steps; the schedule stays that of the whole run."""


@dataclass(frozen=True)
class RecipeOptions(DataOptions, MergeOptions, ReadingOptions, OptimizerOptions, RunOptions):
    """What every recipe has."""

    dataset: str = EMBEDDED

    def source(self) -> Source:
        """The data set in its place.

        Raises:
            ValueError: what it needs is not given.
        """
        return Source(self.dataset, self.data_root, self.video_root, self.annotations)


@dataclass(frozen=True)
class VisualOptions(TowerOptions, TuningOptions, RecipeOptions):
    """What recipes have that begin with a visual tower."""
