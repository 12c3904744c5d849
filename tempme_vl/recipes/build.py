"""What the options of a recipe stand for: keywords of a tower, words, the reader of videos, the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tempme_vl.command_line import named_value
from tempme_vl.data.reader import VideoReader
from tempme_vl.data.transforms import VideoTransform
from tempme_vl.families import find_family, split_name
from tempme_vl.merging import METHODS
from tempme_vl.pretrained import VOCABULARY_FILE, load_vocabulary
from tempme_vl.recipes.names import BROKEN_VIDEOS
from tempme_vl.recipes.options import pretraining
from tempme_vl.recipes.options.shared import MergeOptions, OptimizerOptions, RecipeOptions, TowerOptions, VisualOptions
from tempme_vl.text.tokenizers import bert_vocabulary, word_vocabulary
from tempme_vl.training.optim import AdamWTempMe, BertAdam, parameter_groups


def merging(options: MergeOptions, usual_frames: int) -> dict[str, Any]:
    """Keywords that `tempme_vl.create_frontend` and `tempme_vl.integrations.compress` share."""
    own = {field.name for field in fields(MergeOptions)}  # --seed is of training, and no method's
    names = ("budget", "tokens", *own.intersection(METHODS[options.method].option_names))
    return {
        "method": options.method,
        "num_frames": options.num_frames or usual_frames,
        "clip_position_std": options.clip_position_std,
        **{name: value for name in names if (value := getattr(options, name, None)) is not None},
        **dict(map(named_value, options.method_options)),
    }


def tower(options: VisualOptions | pretraining.Options, usual_frames: int) -> dict[str, Any]:
    """Keywords of `tempme_vl.create_frontend` beside the name."""
    return {
        **merging(options, usual_frames),
        "pretrained": None if options.pretrained == "none" else options.pretrained,
        **({"mode": options.mode} if "mode" in find_family(options.model).options else {}),
    }


def words_of(options: TowerOptions, texts: Sequence[str], vocabulary: str | None) -> tuple[str, ...]:
    """The words of a BERT text side: those of `vocabulary`, of the folder to go on from, or else of the texts."""
    if vocabulary is not None:
        return bert_vocabulary(vocabulary)
    if (Path(options.pretrained) / VOCABULARY_FILE).is_file():
        return load_vocabulary(options.pretrained)
    return word_vocabulary(texts, blip=split_name(options.model)[0] == "testa")


def video_reader(options: RecipeOptions, num_frames: int, transform: VideoTransform) -> VideoReader:
    """Without augmentation; broken videos are listed in the run folder."""
    return VideoReader(
        num_frames,
        transform,
        sampling=options.sampling,
        timeout=options.decode_timeout,
        backend=options.decoder,
        memory_gib=options.clip_memory,
        on_broken=options.on_broken,
        broken_log=options.output / BROKEN_VIDEOS,
        cache=None if options.frame_cache == "none" else options.frame_cache,
        cache_gib=options.cache_memory,
    )


def optimizer(
    options: OptimizerOptions, model: nn.Module, is_new_parameter: Callable[[str], bool]
) -> torch.optim.Optimizer:
    groups = parameter_groups(model, options.lr, options.lr_new, options.weight_decay, is_new_parameter, options.decay)
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups)
    betas = (0.9, options.beta2)
    if options.optimizer == "bertadam":
        return BertAdam(groups, betas=betas)
    if options.optimizer == "adamw_tempme":
        return AdamWTempMe(groups, betas=betas)
    return torch.optim.AdamW(groups, betas=betas, eps=1e-6, fused=True)
