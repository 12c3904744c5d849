"""What a way of tuning is: which of a model's weights train, what it adds, and how that becomes plain weights again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn


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


class TunableModel(nn.Module):
    """A model that a `Tuning` can be applied to.

    Attributes:
        tuning: the one that is.
        lora_targets: the last names of the linear layers that LoRA is added to by default: queries, keys and values,
            fused or apart, as the towers of all families name them.
        lora_parts: the parts of the model that they are looked for in, by their names.
    """

    lora_targets: ClassVar[tuple[str, ...]] = ("qkv", "q_proj", "k_proj", "v_proj", "query", "key", "value")
    lora_parts: ClassVar[tuple[str, ...]]

    def __init__(self) -> None:
        super().__init__()
        self.tuning = Tuning()

    def tune(self, tuning: Tuning) -> None:
        """Applies a way of tuning, before training.

        Raises:
            ValueError: another one has added modules already, or it does not suit the model.
        """
        if any(self.tuning.is_new(name) for name, _ in self.named_parameters()):
            raise ValueError(f"expected a model without modules of another tuning; {self.tuning} has added some")
        tuning.apply(self)
        self.tuning = tuning

    def plain_state(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The weights as those of the untuned model (`Tuning.plain`).

        Args:
            state: full weights when the module's own are partitioned (ZeRO-3) or half precision; default its own.
        """
        return self.tuning.plain(self.state_dict() if state is None else state)

    def is_new_parameter(self, name: str) -> bool:
        """Whether a parameter was in no pretrained model and learns at its own rate."""
        return self.tuning.is_new(name)

    def trains_beside_lora(self, name: str) -> bool:
        """Whether a parameter that trains goes on doing so when LoRA is added; all others of the model are frozen."""
        return self.is_new_parameter(name)

    def input_side(self) -> list[nn.Module]:
        """The modules before the first block of every tower, where the model's authors freeze them."""
        return []
