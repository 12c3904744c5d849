"""A model that can be tuned, and what it tells a way of tuning of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from tempme_vl.tuning.base import Tuning


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
