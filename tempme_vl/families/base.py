"""The record of a family of towers: what a library, or a line of models, has and how it is had."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tempme_vl.backbones.base import Backbone, TowerConfig
from tempme_vl.weights.exports import Export

if TYPE_CHECKING:  # they import open_clip
    from torch import Tensor

    from tempme_vl.text.base import TextEncoder
    from tempme_vl.text.tokenizers import Words

JSON = dict[str, Any]


class Texts(NamedTuple):
    """A text tower and the words that its ids stand for."""

    tower: TextEncoder
    words: Words


@dataclass(frozen=True)
class Pair:
    """The two towers of one model, for retrieval.

    Attributes:
        backbone, config: the visual tower, as `Family.load_tower` gives them.
        texts, text_config: the text tower, and the settings of its library that `TextSide.build` makes it of again.
        log_scale: the logarithm of the factor of similarities that the model was trained with.
        export: a folder of this package whose text side is still to be loaded.
        beside: what lay beside both towers in a file of weights, such as a head's.
    """

    backbone: Backbone
    config: TowerConfig
    texts: Texts
    text_config: JSON
    log_scale: float = math.log(1 / 0.07)
    export: Export | None = None
    beside: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TextSide:
    """What a family has for texts.

    Attributes:
        load: (name, pretrained, num_frames, **options) -> `Pair`, as `Family.load_tower` loads the visual tower alone.
        build: (configuration of the visual tower, settings of the text tower, the saved folder) -> random weights, and
            the words of that folder.
        check: (settings of the text tower, their place) -> ConfigError where nothing can be built of them.
        options: keywords of `load` beside its three arguments.
    """

    load: Callable[..., Pair]
    build: Callable[[Any, JSON, Path], Texts]
    check: Callable[[object, str], None]
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """A family of towers.

    Attributes:
        load_tower: (name, pretrained, num_frames, **options) -> the backbone and its configuration.
        build_tower: a configuration -> the backbone, randomly initialised, without looking anything up.
        config: the class of the family's configurations, which reads and writes them (`tempme_vl.schema`).
        options: keywords of `load_tower` beside its three arguments.
        texts: for retrieval; None where models have no text tower, or are not used as a pair of towers (UMT, TESTA).
        sampling: how models that answer questions take frames, a name in `tempme_vl.data.sampling.SAMPLING`.
        needs_vocabulary: UMT's and TESTA's: retrieval has layers that fuse both sides, whose words are given.
    """

    load_tower: Callable[..., tuple[Backbone, TowerConfig]]
    build_tower: Callable[[Any], Backbone]
    config: type[TowerConfig]
    options: tuple[str, ...] = ()
    texts: TextSide | None = None
    sampling: Literal["uniform", "fps1", "segment"] = "uniform"
    needs_vocabulary: bool = False
