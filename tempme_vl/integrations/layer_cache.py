"""A cache of keys and values whose layers hold different tokens of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from tempme_vl.compressors.inner import Writing
from tempme_vl.integrations.windows import Window


class LayerCache(DynamicCache):
    """Says that all layers hold all tokens, so that a model numbers and masks as it would; each layer's own mask is cut
    to what it holds (`tempme_vl.integrations.layers`).

    Attributes:
        length: L, tokens that the model has seen, padding included.
        prompt: those of its first call, whose number differs by layer.
        windows: by layer, those of the first call that it holds; of a layer without one all.
        video: for each sequence the places of its video's tokens among the first call's.
        attention: for each sequence what its newest word attends to among these, once something was written.
        chosen: for each sequence which of these that word reads in the layers from `Writing.layer` on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.length = self.prompt = 0
        self.windows: dict[int, Window] = {}
        self.video: list[Tensor] = []
        self.attention: list[Tensor] = []
        self.chosen: list[Tensor] = []
        self.latest: tuple[Tensor, Tensor] | None = None  # keys and values of the layer that ran last
        self._read: Window | None = None  # by what `choose` chose, until the next word

    # ---- what transformers asks

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        new = query_length if isinstance(query_length, int) else len(query_length)  # positions in transformers 4
        return self.length + new, 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.latest = keys, values
        read = self._read
        if read is None:
            return keys, values
        index = read.index.to(keys.device)[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        return keys.gather(2, index), values.gather(2, index)

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self._reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.latest is not None:
            self._reorder(torch.arange(len(self.latest[0])).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._reorder(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Raises:
        ValueError: more than what was written.
        """
        if tokens_to_remove > 0 or self.length + tokens_to_remove < self.prompt:
            raise ValueError(
                f"expected a negative number of at most {self.length - self.prompt} written tokens to remove, as the "
                f"prompt's are not the same in all layers; got {tokens_to_remove}"
            )
        super().crop(tokens_to_remove)
        self.length += tokens_to_remove

    def _reorder(self, order: Tensor) -> None:
        made: dict[int, Window] = {}  # layers share windows
        self.windows = {
            layer: made.setdefault(id(window), window.repeated(order)) for layer, window in self.windows.items()
        }
        rows = order.tolist()
        self.video, self.attention, self.chosen = (
            [each[row] for row in rows] if each else [] for each in (self.video, self.attention, self.chosen)
        )

    # ---- what written words read

    def choose(self, writing: Writing, attention: Tensor) -> None:
        """Which tokens of its video a word reads.

        Args:
            attention: (B, H, 1, L), of the word.

        Raises:
            ValueError: a prompt some of whose tokens are in no layer's cache, so that none could come back.
        """
        if self.windows:
            raise ValueError("expected a method that makes a prompt's tokens fewer, or those that words read; got both")
        new = [row[:, 0, video.to(row.device)].mean(0) for row, video in zip(attention, self.video, strict=True)]
        before: Sequence[Tensor | None] = self.attention or [None] * len(new)
        chosen: Sequence[Tensor | None] = self.chosen or [None] * len(new)
        rounds = zip(new, before, chosen, strict=True)
        self.chosen = [writing.choose(*seen) if len(seen[0]) else seen[0].long() for seen in rounds]
        self.attention = new
        length = attention.shape[-1]
        rows = []
        for video, left in zip(self.video, self.chosen, strict=True):
            reads = torch.ones(length, dtype=torch.bool, device=video.device)
            reads[video], reads[video[left.to(video.device)]] = False, True
            rows.append(reads.nonzero()[:, 0])
        if any(len(row) < length for row in rows):
            self._read = Window.of(rows)

    @property
    def read(self) -> Window | None:
        """What the word that is written reads of what the layers from here on hold; None for all."""
        return self._read

    def end_word(self) -> None:
        self._read = None
