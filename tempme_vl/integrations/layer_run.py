"""What happens in the layers of a language model while a method works between them: hooks on its layers.

Between layers the states keep the host's length, so that all that the model does there (features for deeper layers, the
last norm, losses) goes on as it is. Each layer is given those that are left, with their own positions and their part of
the mask, and what it makes of them goes back to their places. What has gone keeps its last state, which no layer reads.

Letters: B sequences, L tokens of each with padding, n that are left of the longest, D wide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tempme_vl.compressors.inner import Inner, Left, Point, Queries
from tempme_vl.integrations.layer_attention import Call, by_name
from tempme_vl.integrations.layer_cache import LayerCache
from tempme_vl.integrations.windows import Window, mask_of


@dataclass(frozen=True)
class Prompt:
    """What is known of the prompts of a batch.

    Attributes:
        places: (B, L) int64, `Left.place`.
        mask: (B, L), 0 for padding; something else where a model takes something else.
    """

    places: Tensor
    mask: Any

    def beams(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Of so many sequences, some beams of each prompt, their places, and which tokens are no padding."""
        known = isinstance(self.mask, Tensor) and self.mask.ndim == 2
        real = self.mask.bool() if known else torch.ones_like(self.places, dtype=torch.bool)
        repeats = batch // len(self.places)
        places, real = (each.to(device).repeat_interleave(repeats, 0) for each in (self.places, real))
        return places, real


class LayerRun:
    """Calls of a model on one cache: of a prompt, and of words behind it.

    Attributes:
        counts: tokens of each sequence that each layer's attention read.

    Args:
        name: of the method, for errors.
        prompt: None behind one.
    """

    def __init__(
        self, name: str, layers: Sequence[nn.Module], inner: Inner, prompt: Prompt | None, cache: LayerCache
    ) -> None:
        self.name, self.layers, self.inner, self.given, self.cache = name, layers, inner, prompt, cache
        self.counts: list[list[int]] = []
        self.prompt = False  # whether the call that runs is of the prompt
        self.whole: list[Tensor] = []  # of each sequence the places of its tokens among the L
        self.left: list[Left] = []
        self.window: Window | None = None  # what is left of the L now; None for all
        self.ran: Window | None = None  # what the layer that runs was given
        self.halved: Window | None = None  # what its MLP is given, of what it was given
        self.shape: torch.Size | None = None  # of what its MLP's output is added to
        self.normed = -1  # the layer whose norm in front of the MLP ran last
        self.states: Tensor | None = None  # all, in front of the layer
        self.attention: list[Tensor] | None = None  # that steps read
        self.told: tuple[Window, dict[str, Any]] | None = None  # what layers with a window are told, the same for all
        self.reading = False

    def hooks(self) -> Iterator[Any]:
        for number, layer in enumerate(self.layers):
            parts: Any = layer
            yield layer.register_forward_pre_hook(self._at(number, self._before), with_kwargs=True)
            yield layer.register_forward_hook(self._at(number, self._after), with_kwargs=True)
            yield parts.self_attn.register_forward_hook(self._at(number, self._read), with_kwargs=True)
            if self.inner.behind_attention:
                yield parts.post_attention_layernorm.register_forward_pre_hook(self._at(number, self._halve))
                yield parts.mlp.register_forward_hook(self._at(number, self._widen))

    def _at(self, number: int, hook: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: None if self.reading else hook(number, *given)

    # ---- around a layer

    def _before(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = by_name(layer, args, kwargs)
        states = given["hidden_states"]
        if number == 0:
            self._begin(states)
        if not self.prompt:
            return self._before_new(number, states.shape[1], given)
        states = self._step(Point(number), states)
        if self.window is not None:
            self.cache.windows[number] = self.window
        self.ran, self.states = self.window, states
        for row, left in zip(self.counts, self.left, strict=True):
            row.append(len(left.position))
        if self.window is None:
            return None
        if self.told is None or self.told[0] is not self.window:
            self.told = self.window, _fewer(given, self.window, self._kind(number))
        return (), {**given, **self.told[1], "hidden_states": self.window.take(states)}

    def _before_new(self, number: int, new: int, given: dict[str, Any]) -> Any:
        """In front of a layer, of words behind the prompt."""
        writing, mask = self.inner.writing, given.get("attention_mask")
        read = self.cache.read if writing is not None and number >= writing.layer else None
        window = read or self.cache.windows.get(number)
        if window is None or (mask is None and new == 1 and not window.padded):
            return None
        if self.told is None or self.told[0] is not window:
            held = read or window.with_new(self.cache.prompt, self.cache.length + new)
            self.told = window, {"attention_mask": mask_of(mask, new, held, self._kind(number))}
        return (), {**given, **self.told[1]}

    def _after(self, number: int, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        last = number == len(self.layers) - 1
        if self.prompt and self.ran is not None:
            assert self.states is not None
            first = self.ran.put(self.states, first)
            first = self._filled(first) if last else first
        if last:
            self.cache.length += first.shape[1]
            self.cache.prompt = self.cache.prompt or self.cache.length
            self.cache.end_word()
        if self.ran is None or not self.prompt:
            return None
        return (first, *output[1:]) if isinstance(output, tuple) else first

    def _filled(self, states: Tensor) -> Tensor:
        """Behind the last layer: what has gone tells the next word what the token left in front of it does."""
        assert self.ran is not None
        kept = torch.zeros(*states.shape[:2], 1, dtype=torch.bool, device=states.device)
        kept = self.ran.put(kept, torch.ones_like(kept)[:, : self.ran.index.shape[1]])[..., 0]
        place = torch.arange(states.shape[1], device=states.device)
        source = torch.where(kept, place, -1).cummax(1).values
        return Window(torch.where(source < 0, place, source), kept).take(states)

    def _kind(self, number: int) -> str:
        attn: Any = self.layers[number].self_attn
        return str(attn.config._attn_implementation)

    # ---- a call

    def _begin(self, states: Tensor) -> None:
        batch, length, _ = states.shape
        self.told = None
        self.prompt = not self.cache.length
        if not self.prompt:
            return
        if self.given is None or self.given.places.shape[1] != length or batch % len(self.given.places):
            expected = "a prompt" if self.given is None else f"{self.given.places.shape[1]} tokens of each prompt"
            raise ValueError(
                f"method {self.name!r} reads a prompt whole: expected the states of {expected}; got {length} (no "
                "prefill in chunks, and new words go on from the cache)"
            )
        places, real = self.given.beams(batch, states.device)
        self.whole = [row.nonzero()[:, 0] for row in real]
        self.left = [self.inner.start(row[own]) for row, own in zip(places, self.whole, strict=True)]
        self.cache.video = [own[left.video] for own, left in zip(self.whole, self.left, strict=True)]
        self.counts = [[] for _ in self.whole]
        self.window, self.attention = None, None

    # ---- steps

    def _due(self, *points: Point) -> Queries | None:
        """What steps there read of attention."""
        found = {self.inner.due(left, point) for left in self.left for point in points} - {None}
        return next((queries for queries in ("all", "last", "none") if queries in found), None)

    def _step(self, point: Point, states: Tensor) -> Tensor:
        """The step in front of a layer, on all states."""
        if self._due(point) is None:
            return states
        taken = states if self.window is None else self.window.take(states)
        found = self._fewer_rows(point, taken)
        if found is None:
            return states
        columns, parts = found
        kept = Window.of(columns)
        values = _stacked(kept, parts)
        if self.window is None:
            states = kept.put(states, values)
        else:
            states = self.window.put(states, kept.put(taken, values))
        self.window = self._now()
        return states

    def _now(self) -> Window:
        return Window.of([own[left.position] for own, left in zip(self.whole, self.left, strict=True)])

    def _fewer_rows(self, point: Point, states: Tensor) -> tuple[list[Tensor], list[Tensor]] | None:
        """The step of each sequence.

        Args:
            states: (B, n, D), those that are left.

        Returns:
            of each sequence the places among n of what stays, and its states; None where all stays.
        """
        columns, parts, fewer = [], [], False
        for row, left in enumerate(self.left):
            own = self.whole[row] if self.window is None else self.window.row_valid(row)
            attention = None if self.attention is None else self.attention[row]
            if self.inner.due(left, point) is None:
                now, part = left, states[row, own]
            else:
                now, part = self.inner.step(left, states[row, own], attention)
            fewer |= len(now.position) < len(left.position)
            columns.append(own[torch.searchsorted(left.position, now.position)])
            parts.append(part)
            self.left[row] = now
        return (columns, parts) if fewer else None

    def _read(self, number: int, attn: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Behind an attention: what it attends to, for the steps that follow."""
        if not self.prompt:
            self._read_word(number, attn, args, kwargs)
            return
        self.attention = None
        queries = self._due(Point(number, True), Point(number + 1))
        if queries in (None, "none"):
            return
        rows = self.whole if self.ran is None else [self.ran.row_valid(row) for row in range(len(self.left))]
        call = self._call(attn, args, kwargs)
        with self._by_itself():
            self.attention = call.last(rows) if queries == "last" else call.mean(rows)

    def _read_word(self, number: int, attn: nn.Module, args: Any, kwargs: Any) -> None:
        writing = self.inner.writing
        if writing is None or number != writing.layer - 1:
            return
        call = self._call(attn, args, kwargs)
        states = call.given["hidden_states"]
        if states.shape[1] == 1:  # more are no written word
            with self._by_itself():
                weights = call.weights(states.new_zeros(len(states), 1, dtype=torch.int64))
            self.cache.choose(writing, weights)

    def _call(self, attn: nn.Module, args: Any, kwargs: Any) -> Call:
        if self.cache.latest is None:
            raise ValueError(
                f"method {self.name!r} reads keys of the cache, which {type(attn).__name__} does not use: expected "
                "use_cache=True"
            )
        return Call(attn, by_name(attn, args, kwargs), *self.cache.latest)

    @contextmanager
    def _by_itself(self) -> Iterator[None]:
        """Without these hooks."""
        self.reading = True
        try:
            yield
        finally:
            self.reading = False

    # ---- between the attention and the MLP of a layer

    def _halve(self, number: int, norm: nn.Module, args: tuple[Any, ...]) -> Any:
        """In front of the norm of an MLP. What comes in is also what the MLP's output is added to, so that what merged
        is put in its place there."""
        point = Point(number, True)
        self.halved, self.normed = None, number
        if not self.prompt or self._due(point) is None:
            return None
        (states,) = args
        found = self._fewer_rows(point, states)
        if found is None:
            return None
        columns, parts = found
        self.halved, self.shape = Window.of(columns), states.shape
        values = _stacked(self.halved, parts)
        self.halved.put_(states, values)
        self.window = self._now()
        return (values,)

    def _widen(self, number: int, mlp: nn.Module, args: Any, output: Any) -> Any:
        """Behind an MLP: what was not given to it has nothing added."""
        if self.normed != number:
            raise ValueError(
                f"method {self.name!r} makes tokens fewer in front of the norm of an MLP, and {type(mlp).__name__} "
                "here runs before its norm: choose another method"
            )
        if not self.prompt or self.halved is None or self.shape is None:
            return None
        halved, self.halved = self.halved, None
        return halved.put(output.new_zeros(self.shape), output)


def _stacked(window: Window, parts: Sequence[Tensor]) -> Tensor:
    """(B, n, D), of each sequence its states, in front of which stand others where it is shorter."""
    longest = window.index.shape[1]
    return torch.stack([torch.cat([part[:1].expand(longest - len(part), -1), part]) for part in parts])


def _fewer(given: Mapping[str, Any], window: Window, kind: str) -> dict[str, Any]:
    """What a layer is told of the tokens that are left."""
    told: dict[str, Any] = {"attention_mask": mask_of(given.get("attention_mask"), window, window, kind)}
    if given.get("position_embeddings") is not None:
        told["position_embeddings"] = tuple(window.take_last(each, 2) for each in given["position_embeddings"])
    if isinstance(given.get("position_ids"), Tensor):
        told["position_ids"] = window.take_last(given["position_ids"])
    if isinstance(given.get("cache_position"), Tensor):  # in transformers 4; of a cache that grows nothing reads it
        told["cache_position"] = given["cache_position"][: window.index.shape[1]]
    return told
