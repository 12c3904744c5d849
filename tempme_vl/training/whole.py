"""Weights and optimizer state as whole tensors by name, however ZeRO divides them over how many ranks.

DeepSpeed's own files hold the parts of as many ranks as wrote them. Its universal checkpoints do not serve: they leave
out stage 0, give all parameter groups the settings of the first at stage 3, and want a weight of every group on every
rank at stages 1 and 2. What it lets us read and write whole at any time are the weights. The optimizer's state is laid
out as they are, so it goes through their place.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tempme_vl.libraries import undocumented
from tempme_vl.training import distributed

STEP = "step"  # what optimizers call their count; the rest of their state has the shape of the weight


@contextmanager
def whole_weight(parameter: nn.Parameter) -> Iterator[Tensor]:
    """A parameter whole, in the optimizer's float32 where it holds it so; all ranks enter."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    full = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
    if full is not None:
        yield full.reshape(getattr(parameter, "ds_shape", parameter.shape))
        return
    with deepspeed.zero.GatheredParameters([parameter]):
        yield parameter.detach()


def buffers(module: nn.Module) -> dict[str, Tensor]:
    """What a module's state holds beside its parameters."""
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    state = module.state_dict().items()
    return {name: value for name, value in state if name not in names and isinstance(value, Tensor)}


class WholeState:
    """Reads and writes what a step changes, and all frozen weights, as (name, whole tensor).

    Names are "buffer/NAME", "weight/NAME" and "optimizer/KEY/NAME".

    Args:
        optimizer: as it is before DeepSpeed takes it over.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self._parameters = _held(optimizer)

    @torch.no_grad()
    def fill_up(self, engine: Any) -> None:
        """Zeros where the parts of a weight are longer than it: at stage 3 DeepSpeed leaves there what was in memory,
        which need not be finite. Steps keep them."""
        if engine.zero_optimization_stage() < 3:
            return
        from deepspeed.utils import safe_get_local_fp32_param

        for parameter in _trained(engine.module).values():
            part = safe_get_local_fp32_param(parameter)
            own = getattr(parameter, "ds_shape", parameter.shape).numel() - distributed.rank() * part.numel()
            part[max(0, own) :].zero_()

    @torch.no_grad()
    def total(self, engine: Any) -> Tensor:
        """The sum of the trained weights that this rank holds: not finite if one of them is not."""
        held = self._parts(engine) or list(_trained(engine.module).values())
        return torch.stack([weight.sum() for weight in held]).sum()

    def read(self, engine: Any) -> Generator[tuple[str, Tensor], None, None]:
        """All of them, in an order that is that of every rank; all ranks iterate together.

        A tensor is there until the next, and the engine makes no step before the last.
        """
        module: nn.Module = engine.module
        copies, parts = self._copies(engine), self._parts(engine)
        for name, value in buffers(module).items():
            yield f"buffer/{name}", value
        for name, parameter in module.named_parameters():
            with whole_weight(parameter) as weight:
                yield f"weight/{name}", copies.get(parameter, weight)

        state, trained = self.optimizer.state, _trained(module)
        keys = {key for held in state.values() for key, value in held.items() if isinstance(value, Tensor)}
        for key in sorted(keys - {STEP}):
            for name, parameter in trained.items() if copies else ():
                if key in state.get(copies[parameter], {}):  # a weight that had no gradient has no state
                    yield f"optimizer/{key}/{name}", state[copies[parameter]][key]
            with _in_place_of_weights(parts, [state[part][key] for part in parts]):
                for name, parameter in trained.items() if parts else ():
                    with whole_weight(parameter) as value:
                        yield f"optimizer/{key}/{name}", value
        for name, parameter in trained.items():
            held = copies[parameter] if copies else parts[0]
            if STEP in state.get(held, {}):
                yield f"optimizer/{STEP}/{name}", torch.as_tensor(state[held][STEP])

    @torch.no_grad()
    def write(self, engine: Any, names: Set[str], get: Callable[[str], Tensor]) -> None:
        """Into an engine that has made no step; all ranks call it.

        Args:
            names: all that `get` knows.
        """
        import deepspeed

        module: nn.Module = engine.module
        copies, parts = self._copies(engine), self._parts(engine)
        module.load_state_dict({name: get(f"buffer/{name}") for name in buffers(module)}, strict=False)
        for name, parameter in module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(get(f"weight/{name}"))
            if parameter in copies:
                copies[parameter].copy_(get(f"weight/{name}"))

        trained = _trained(module)
        for key in sorted({name.split("/", 2)[1] for name in names if name.startswith("optimizer/")}):
            places = {name: f"optimizer/{key}/{name}" for name in trained}
            for name, parameter in trained.items() if copies else ():
                if places[name] in names:
                    self._give(copies[parameter], key, get(places[name]))
            if key != STEP:
                _fill(engine, parts, {places[name]: parameter for name, parameter in trained.items()}, get)
            for part in parts:
                self._give(part, key, get(next(iter(places.values()))) if key == STEP else part)
        _fill(engine, parts, {f"weight/{name}": parameter for name, parameter in trained.items()}, get)

    def _copies(self, engine: Any) -> dict[Tensor, Tensor]:
        """At ZeRO stage 0, what the optimizer has for each trained parameter: itself, or a float32 copy."""
        if engine.zero_optimization_stage() > 0:
            return {}
        return dict(zip(self._parameters, _held(self.optimizer), strict=True))

    def _parts(self, engine: Any) -> list[Tensor]:
        """At the other stages, the flat float32 tensors that the optimizer has on this rank."""
        if engine.zero_optimization_stage() == 3:
            with undocumented("deepspeed"):
                return list(engine.optimizer.fp32_partitioned_groups_flat)
        return _held(self.optimizer) if engine.zero_optimization_stage() > 0 else []

    def _give(self, held: Tensor, key: str, value: Tensor) -> None:
        """Puts a value into the state of what the optimizer has."""
        state = self.optimizer.state[held]
        if key != STEP:
            state[key] = value.to(held.device, held.dtype, copy=True)
        elif value.is_floating_point():  # torch's rules; the fused ones count on the device
            state[key] = value.to(held.device if self.optimizer.defaults.get("fused") else "cpu", copy=True)
        else:
            state[key] = int(value)


def _held(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


@contextmanager
def _in_place_of_weights(parts: list[Tensor], values: list[Tensor]) -> Iterator[None]:
    _exchange(parts, values)
    try:
        yield
    finally:
        _exchange(parts, values)


@torch.no_grad()
def _exchange(parts: list[Tensor], values: list[Tensor]) -> None:
    for part, value in zip(parts, values, strict=True):
        kept = part.clone()
        part.copy_(value)
        value.copy_(kept)


def _fill(engine: Any, parts: list[Tensor], places: Mapping[str, nn.Parameter], get: Callable[[str], Tensor]) -> None:
    """Writes whole tensors of the parameters' shapes into this rank's parts of the weights."""
    from deepspeed.utils import safe_get_local_fp32_param, safe_set_full_fp32_param, safe_set_local_fp32_param

    if not parts:
        return
    for part in parts:
        part.zero_()  # also what only fills it up
    world, rank = distributed.world_size(), distributed.rank()
    for place, parameter in places.items():
        value = get(place).to(parameter.device, torch.float32).flatten()
        if engine.zero_optimization_stage() < 3:
            safe_set_full_fp32_param(parameter, value)
            continue
        # safe_set_full_fp32_param fails where a weight does not divide over the ranks
        size = safe_get_local_fp32_param(parameter).numel()
        if size != -(-value.numel() // world):
            raise ValueError(
                f"expected {place} in {world} equal parts of its {value.numel()} numbers; DeepSpeed makes parts of "
                f"{size}: use the ZeRO settings of a file in recipes/ds/"
            )
        padded = torch.zeros(size * world, dtype=torch.float32, device=value.device)
        padded[: value.numel()] = value
        safe_set_local_fp32_param(parameter, padded[rank * size :][:size])
