"""A model that can be tuned, and what it tells a way of tuning of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import Tensor, nn

from tempme_vl.tuning.base import Tuning

if TYPE_CHECKING:
    from tempme_vl.backbones.base import BlockAdapter
    from tempme_vl.frontend import VisualFrontend
    from tempme_vl.text.clip import CLIPTextEncoder


class TunableModel(nn.Module):
    """A model that a `Tuning` can be applied to.

    A tuning may put modules into these places: `BlockAdapter.tuned` of every block of both towers,
    `CLIPTextEmbed.tuned` where words are embedded, `VisualFrontend.tuned` where frames become a video.

    Attributes:
        tuning: the one that is.
        frontend: the visual tower.
        lora_targets: the last names of the linear layers that LoRA is added to by default: queries, keys and values,
            fused or apart, as the towers of all families name them.
        lora_parts: the parts of the model that they are looked for in, by their names.
        keeps_modules: whether it is saved with what a tuning adds and cannot merge into plain weights.
    """

    lora_targets: ClassVar[tuple[str, ...]] = ("qkv", "q_proj", "k_proj", "v_proj", "query", "key", "value")
    lora_parts: ClassVar[tuple[str, ...]]
    keeps_modules: ClassVar[bool] = False
    frontend: VisualFrontend

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
        if tuning.stays and not self.keeps_modules:
            raise ValueError(
                f"{tuning.name!r} adds modules that cannot be merged into plain weights, which is how "
                f"{type(self).__name__} is saved: choose lora or dora"
            )
        tuning.apply(self)
        self.tuning = tuning

    def extend(self, tuning: Tuning) -> None:
        """Makes the modules of a way of tuning that a saved model was trained with (`Tuning.extend`)."""
        tuning.extend(self)
        self.tuning = tuning

    def tuning_config(self) -> dict[str, Any] | None:
        """JSON data of the tuning whose modules stay in the model: {"name", "options"}; None where nothing stays."""
        return {"name": self.tuning.name, "options": asdict(self.tuning)} if self.tuning.stays else None

    def plain_state(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The weights as those of the untuned model (`Tuning.plain`).

        Args:
            state: full weights when the module's own are partitioned (ZeRO-3) or half precision; default its own.
        """
        return self.tuning.plain(self.state_dict() if state is None else state)

    def gflops(self) -> float:
        """Cost of one video in the visual tower and in what the tuning has added to it (`tempme_vl.costs`)."""
        added = self.tuning.cost(self.frontend.schedule, self.frontend.shape)
        return self.frontend.gflops() + added / 1e9

    def is_new_parameter(self, name: str) -> bool:
        """Whether a parameter was in no pretrained model and learns at its own rate."""
        return self.tuning.is_new(name)

    def trains_beside(self, name: str) -> bool:
        """Whether a parameter that trains goes on doing so when a tuning adds modules; the others are frozen."""
        return self.is_new_parameter(name)

    def freeze_pretrained(self) -> None:
        """Freezes everything but what `trains_beside` new modules."""
        for name, weight in self.named_parameters():
            weight.requires_grad_(weight.requires_grad and self.trains_beside(name))

    def input_side(self) -> list[nn.Module]:
        """The modules before the first block of every tower, where the model's authors freeze them."""
        return []

    def check_every_frame(self, name: str) -> None:
        """For a tuning that has something for every frame.

        Raises:
            ValueError: merging makes several frames' CLS tokens one, or leaves fewer frames.
        """
        schedule = self.frontend.schedule
        if self.frontend.shape.num_prefix and schedule.pooled_prefixes != schedule.frames:
            raise ValueError(
                f"{name} reads every frame's CLS token, and {schedule.method!r} leaves {schedule.pooled_prefixes} of "
                f"{schedule.frames}: choose adapter, or another method"
            )

    def visual_blocks(self) -> list[BlockAdapter]:
        """The blocks of the visual tower in order."""
        return [cast("BlockAdapter", block.block) for block in self.frontend.blocks]

    def clip_text(self) -> CLIPTextEncoder:
        """The text tower, whose blocks and words have places for modules.

        Raises:
            ValueError: it is none of open_clip's.
        """
        from tempme_vl.text.clip import CLIPTextEncoder

        text = getattr(self, "text", None)
        if not isinstance(text, CLIPTextEncoder):
            tower = "" if text is None else f" with {type(text).__name__}"
            raise ValueError(
                "expected a model with a text tower of open_clip, whose blocks have places for a tuning's modules; "
                f"got {type(self).__name__}{tower}: choose lora or dora"
            )
        return text
