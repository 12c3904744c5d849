"""What the configurations of front ends, and of models that have one, hold; each class reads and writes its part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tempme_vl.backbones.base import TowerConfig, TowerShape
from tempme_vl.families import FAMILIES
from tempme_vl.merging import MergeSchedule
from tempme_vl.messages import shown
from tempme_vl.pretrained import SavedConfig
from tempme_vl.scheduling import tower_gflops
from tempme_vl.schema import ConfigError, read


@dataclass(frozen=True)
class FrontendConfig:
    """What builds a front end again. In a file the schedule stands among the tower's keys."""

    tower: TowerConfig
    schedule: MergeSchedule

    def to_dict(self) -> dict[str, Any]:
        """JSON data; `from_dict` is the way back."""
        return {**self.tower.to_dict(), "schedule": self.schedule.to_dict()}

    @classmethod
    def from_dict(cls, data: object, place: str) -> FrontendConfig:
        """What `to_dict` gave.

        Args:
            place: to name in errors, such as the file.

        Raises:
            ConfigError: unknown or missing keys, values of another type or out of bounds, or an unknown family.
        """
        if not isinstance(data, Mapping) or not {"family", "schedule"} <= data.keys():
            raise ConfigError(f"{place}: expected an object with 'family' and 'schedule'; got {shown(data)}")
        if data["family"] not in FAMILIES:
            raise ConfigError(f"{place}, 'family': expected one of {', '.join(FAMILIES)}; got {shown(data['family'])}")
        schedule = MergeSchedule.from_dict(data["schedule"], f"{place}, 'schedule'")
        tower = {key: value for key, value in data.items() if key != "schedule"}
        return cls(read(FAMILIES[data["family"]].config, tower, place), schedule)


@dataclass(frozen=True)
class ModelConfig(SavedConfig):
    """config.json of a front end; other kinds of models, which have one, derive theirs."""

    kind: ClassVar[str] = "frontend"
    what: ClassVar[str] = "a front end"
    frontend: FrontendConfig


def tower_name(config: TowerConfig | None) -> str:
    """A tower as "family:model", as far as that is known."""
    if config is None:
        return "a vision transformer"
    name = getattr(config, "name", None) or getattr(config, "architecture", None)
    return f"{config.family}:{name}" if name else config.family


def facts(config: TowerConfig | None, schedule: MergeSchedule, shape: TowerShape) -> dict[str, str]:
    """Rows of a card: what the tower is, what it is given, and what of that is left."""
    side, frames, method = shape.image_size, schedule.frames, schedule.method
    layers = len(schedule.plan)
    cost, whole = (f"{tower_gflops(one, shape):.4g}" for one in (schedule, schedule.whole))
    return {
        "method": method,
        "tower": f"{tower_name(config)}: {layers} layers of width {shape.width}, patches of {shape.patch_size} px",
        "frames": f"{frames} of {side} x {side} pixels",
        "tokens of a video": f"{schedule.output_tokens} of {schedule.input_tokens}",
        "GFLOPs of a video": f"{cost}; {whole} without merging" if schedule.changes else cost,
    }
