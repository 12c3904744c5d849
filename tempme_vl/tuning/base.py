"""What a way of tuning is: which of a model's weights train, what it adds, and how that becomes plain weights again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:  # the command line lists the ways of tuning, and does not wait for torch
    from torch import Tensor

    from tempme_vl.tuning.model import TunableModel


@dataclass(frozen=True)
class Tuning:
    """A way of tuning: a frozen dataclass of its options, with these methods. As they are here, everything trains.

    Attributes:
        name: in `TUNINGS`, on command lines and in `create_retrieval_model`.
    """

    name: ClassVar[str]

    def apply(self, model: TunableModel) -> None:
        """Adds modules to a model in place, and says by `requires_grad` what trains."""

    def is_new(self, name: str) -> bool:
        """Whether a parameter, by its name, is one that `apply` has added; those learn at the rate of new modules."""
        return False

    def plain(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a tuned model as those of the model before `apply`: what was added is merged into them.

        Args:
            state: all weights, under the names of `nn.Module.state_dict`; gathered ones where ZeRO-3 partitions them.
        """
        return dict(state)
