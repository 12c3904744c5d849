"""What a way of tuning is: which of a model's weights train, what it adds, and how that becomes plain weights again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:  # the command line lists the ways of tuning, and does not wait for torch
    from torch import Tensor

    from tempme_vl.backbones.base import TowerShape
    from tempme_vl.merging.schedule import MergeSchedule
    from tempme_vl.tuning.model import TunableModel

_PLACE = ".tuned."  # in the names of what stands in a model's places


@dataclass(frozen=True)
class Tuning:
    """A way of tuning: a frozen dataclass of its options, with these methods. As they are here, everything trains.

    Attributes:
        name: in `TUNINGS`, on command lines and in `create_retrieval_model`.
        stays: whether what it adds cannot be merged into plain weights: it is saved with the model then, and `extend`
            makes it again.
        runs: whether it is more than its cost: a row in tables of a method without public code is not.
        loss_weights: of videos that choose among texts and of texts that choose among videos, in a contrastive loss.
    """

    name: ClassVar[str]
    stays: ClassVar[bool] = False
    runs: ClassVar[bool] = True
    loss_weights: ClassVar[tuple[float, float]] = (0.5, 0.5)

    def apply(self, model: TunableModel) -> None:
        """Adds modules to a model in place, and says by `requires_grad` what trains."""

    def extend(self, model: TunableModel) -> None:
        """Adds the modules of a saved model, whose weights are about to be loaded: those that stay."""

    def is_new(self, name: str) -> bool:
        """Whether a parameter, by its name, is one that `apply` has added; those learn at the rate of new modules."""
        return _PLACE in name

    def plain(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a tuned model as those of the model before `apply`: what was added is merged into them.

        Args:
            state: all weights, under the names of `nn.Module.state_dict`; gathered ones where ZeRO-3 partitions them.

        Returns:
            where it `stays`, the weights of the model after `extend`.
        """
        return dict(state)

    def cost(self, schedule: MergeSchedule, shape: TowerShape, published: bool = False) -> int:
        """What it adds to one video in the visual tower, as `tempme_vl.costs` counts, once training is done: what is
        merged into plain weights adds nothing, and neither does what can be made before any video is there, such as
        prompts out of other weights.

        Args:
            published: as its authors' code does it, where that computes more than this package.
        """
        return 0

    def learnt_tokens(self, frames: int) -> int:
        """Learnt tokens beside a video's own, as the tables of papers count them: those that all frames share once."""
        return 0

    def published(self) -> dict[str, Any]:
        """Options of a retrieval run (`tempme_vl.recipes.options`) that its authors train with on MSRVTT; what they do
        not say is not here."""
        return {}


@dataclass(frozen=True)
class AddedModules(Tuning):
    """A way of tuning that trains modules of its own beside frozen weights, and leaves them in the model.

    A new one has `extend`, which puts modules into the places that a model has for them (`TunableModel`).
    """

    stays: ClassVar[bool] = True

    def apply(self, model: TunableModel) -> None:
        model.freeze_pretrained()
        self.extend(model)
