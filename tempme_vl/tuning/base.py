"""What a way of tuning is: which of a model's weights train, what it adds, and how that becomes plain weights again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:  # the command line lists the ways of tuning, and does not wait for torch
    from torch import Tensor

    from tempme_vl.tuning.model import TunableModel

_PLACE = ".tuned."  # in the names of what stands in a model's places


@dataclass(frozen=True)
class Tuning:
    """A way of tuning: a frozen dataclass of its options, with these methods. As they are here, everything trains.

    Attributes:
        name: in `TUNINGS`, on command lines and in `create_retrieval_model`.
        stays: whether what it adds cannot be merged into plain weights: it is saved with the model then, and `extend`
            makes it again.
        loss_weights: of videos that choose among texts and of texts that choose among videos, in a contrastive loss.
    """

    name: ClassVar[str]
    stays: ClassVar[bool] = False
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


@dataclass(frozen=True)
class AddedModules(Tuning):
    """A way of tuning that trains modules of its own beside frozen weights, and leaves them in the model.

    A new one has `extend`, which puts modules into the places that a model has for them (`TunableModel`).
    """

    stays: ClassVar[bool] = True

    def apply(self, model: TunableModel) -> None:
        model.freeze_pretrained()
        self.extend(model)
