"""CLIP4Clip's full fine-tuning, which TempMe's takes over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tempme_vl.tuning.base import Tuning

if TYPE_CHECKING:
    from tempme_vl.tuning.model import TunableModel


@dataclass(frozen=True)
class CLIP4Clip(Tuning):
    """Freezes the input side of both of CLIP's towers: token, position and class embeddings, conv1 and ln_pre.

    That is what the authors' code does with its published setting, freeze_layer_num 0.
    """

    name: ClassVar[str] = "clip4clip"

    def apply(self, model: TunableModel) -> None:
        """Raises:
        ValueError: a model that is not CLIP.
        """
        frozen = model.input_side()
        if not frozen:
            raise ValueError(
                f"clip4clip names parts of CLIP to freeze; {type(model).__name__} has none of them: choose 'full'"
            )
        for part in frozen:
            part.requires_grad_(False)

    def published(self) -> dict[str, Any]:
        return {
            "lr": 1e-7,
            "lr_new": 1e-4,
            "optimizer": "bertadam",
            "schedule": "cosine_whole",
            "decay": "no_bias",
            "weight_decay": 0.2,
            "beta2": 0.98,
            "warmup": 0.1,
            "clip_grad": 1.0,
            "batch_size": 128,
            "epochs": 5,
        }
