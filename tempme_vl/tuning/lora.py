"""LoRA (ICLR 2022) by peft, as TempMe's main table trains it: on the fused queries, keys and values of every block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tempme_vl.tuning.base import Tuning

if TYPE_CHECKING:
    from torch import Tensor

    from tempme_vl.tuning.model import TunableModel

_ADDED = ".lora_"
_WRAPPED = ".base_model.model."  # of a part that peft wraps and saves itself, such as a language model (`Lora.wrap`)
_ADAPTER = "default"  # peft's name of the only one


@dataclass(frozen=True)
class Lora(Tuning):
    """Low-rank updates of frozen layers: y = x W^T + b + alpha / rank * (x A^T) B^T; A is random, B starts at zero.

    What was in no pretrained model, such as TempMe's clip positions, trains beside them; all else is frozen, the logit
    scale too. TempMe's published setting (section 4) are the defaults: rank 8, scale 1, both towers.

    Attributes:
        rank: of A (rank, D) and B (3 D, rank).
        alpha: the update is scaled by alpha / rank; default: the rank, which scales it by 1.
        dropout: rate on the input of A.
        targets: the last names of the linear layers; default: those of the model.

    Raises:
        ValueError: a rank below 1, or a dropout that is no rate.
    """

    name: ClassVar[str] = "lora"
    magnitudes: ClassVar[bool] = False  # DoRA's

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"expected a rank of at least 1 and a dropout from 0 to below 1; got {self.rank}, {self.dropout}"
            )

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def apply(self, model: TunableModel) -> None:
        """Raises:
        ValueError: no layer of the model has one of the names.
        """
        targets, parts = self.targets or model.lora_targets, model.lora_parts
        layers = [f"{part}.{name}" for part in parts for name, _ in model.get_submodule(part).named_modules()]
        layers = [name for name in layers if name.rpartition(".")[2] in targets]
        if not layers:
            raise ValueError(f"LoRA: no layer of {type(model).__name__} is called {' or '.join(targets)}")
        kept = [p for name, p in model.named_parameters() if p.requires_grad and model.trains_beside(name)]
        self.inject(model, layers)
        for name, weight in model.named_parameters():
            weight.requires_grad_(self.is_new(name))
        for weight in kept:
            weight.requires_grad_(True)

    def inject(self, model: TunableModel, layers: Sequence[str]) -> None:
        """Puts what trains beside the weights of these layers."""
        from peft import inject_adapter_in_model

        inject_adapter_in_model(self._config(layers), model, _ADAPTER)

    def wrap(self, model: Any, layers: str = "all-linear", task: str | None = None) -> Any:
        """A model of transformers in peft's wrapper, which is how language models with LoRA are saved and shared.

        Args:
            layers: those that LoRA is added to, where these options have no `targets`: a pattern of whole names, or
                peft's "all-linear", all linear layers but the last.
            task: peft's name of what the model does, such as "CAUSAL_LM".
        """
        from peft import get_peft_model

        return get_peft_model(model, self._config(self.targets or layers, task))

    def _config(self, layers: Sequence[str] | str, task: str | None = None) -> Any:
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.rank if self.alpha is None else self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=layers if isinstance(layers, str) else list(layers),
            task_type=task,
            use_dora=self.magnitudes,
        )

    def is_new(self, name: str) -> bool:
        return _ADDED in name and _WRAPPED not in name

    def published(self) -> dict[str, Any]:
        return {
            "lr_new": 6e-4,
            "optimizer": "adamw_tempme",
            "schedule": "cosine_from_zero",
            "decay": "all",
            "beta2": 0.999,
            "weight_decay": 0.2,
            "epochs": 5,
        }

    def plain(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """W + alpha / rank * B A, in float32; LoRA of a part that peft wraps is left as it is."""
        merged = {}
        for name, value in state.items():
            if self.is_new(name):
                continue
            layer, base, last = name.rpartition(".base_layer.")
            if not base or _WRAPPED in name:
                merged[name] = value
            elif last != "weight":
                merged[f"{layer}.{last}"] = value
            else:
                a, b = (state[f"{layer}.lora_{side}.{_ADAPTER}.weight"].float() for side in "AB")
                merged[f"{layer}.weight"] = (value.float() + self.scale * (b @ a)).to(value.dtype)
        return merged
