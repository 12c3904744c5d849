"""Merging along time inside a tower that keeps its grid: which runs merge, and what then attends to what.

A video's tokens stay blocks of its grid, and only runs of one place merge (`tempme_vl.merging.tube_plan`): so each
slot has exactly one run for each place at all times, and positions and windows of a tower stay what they were. Pure
functions on tensors, without a loop over tokens; nothing here waits for a GPU but the lengths in `Tubes.by_clip`.

Letters: N blocks (cells) of all videos at the start, slot by slot; R runs that are left of them; P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tempme_vl.merging.tube_plan import ClipCount
from tempme_vl.precision import at_least_float32


@dataclass(frozen=True)
class Cells:
    """The blocks of some videos before any has merged, one video behind the other, in the order of a tower.

    Attributes:
        slot: (N,) int64, counted over all videos.
        place: (N,) int64, counted over all videos; the same in all slots of one.
        places: (N,) int64, S of its video.
        slots: how many there are in all videos.
    """

    slot: Tensor
    place: Tensor
    places: Tensor
    slots: int

    @classmethod
    def of(cls, grids: Sequence[tuple[int, int]], device: torch.device | None = None) -> Cells:
        """Of videos with T slots of S places each."""
        slot, place, places = [], [], []
        slots = tubes = 0
        for T, S in grids:
            slot.append(torch.arange(slots, slots + T).repeat_interleave(S))
            place.append(torch.arange(tubes, tubes + S).repeat(T))
            places.append(torch.full((T * S,), S))
            slots, tubes = slots + T, tubes + S
        each = [torch.cat(parts).to(device) for parts in (slot, place, places)]
        return cls(each[0], each[1], each[2], slots)


@dataclass(frozen=True)
class TubeMatch:
    """Which runs merge.

    Attributes:
        kept: (R - P,) int64 ascending, the run that each run behind it begins with.
        left, right: (P,) int64, runs of which the right one goes into the left one.
        target: (P,) int64, the place of each left one among those that are kept.
        share: (P,) float, of the left one by its length.
    """

    kept: Tensor
    left: Tensor
    right: Tensor
    target: Tensor
    share: Tensor

    def take(self, x: Tensor) -> Tensor:
        """Values of the runs that are kept, where merging leaves them as they are: (R, ...) -> (R - P, ...)."""
        return x.index_select(0, self.kept)

    def mean(self, x: Tensor) -> Tensor:
        """The mean of those that merge, weighted by lengths: (R, D) -> (R - P, D)."""
        left, right = (at_least_float32(x.index_select(0, rows)) for rows in (self.left, self.right))
        merged = torch.lerp(right, left, self.share.to(left.dtype).unsqueeze(1))
        return self.take(x).index_copy(0, self.target, merged.to(x.dtype))


@dataclass(frozen=True)
class Segments:
    """Which runs attend to which: G segments, each with its queries and its keys.

    Attributes:
        queries: (R,) int64, the runs segment by segment; None as they stand.
        keys: (K,) int64, runs, each as often as it is a key, segment by segment; None as they stand.
        query_lengths, key_lengths: (G,) int64. A segment may have no queries.
        bias: (K,) float, to add to what queries make of each key; None for 0.
    """

    queries: Tensor | None
    keys: Tensor | None
    query_lengths: Tensor
    key_lengths: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Tubes:
    """The runs that are left, ascending by the cells that they begin at.

    Attributes:
        begin: (R,) int64, the cell of the first slot of each.
        length: (R,) int64, slots that it covers.
        cells: those at the start.
    """

    begin: Tensor
    length: Tensor
    cells: Cells

    @classmethod
    def start(cls, grids: Sequence[tuple[int, int]], device: torch.device | None = None) -> Tubes:
        """Nothing merged, of videos with T slots of S places each."""
        cells = Cells.of(grids, device)
        return cls(torch.arange(len(cells.slot), device=device), torch.ones_like(cells.slot), cells)

    @property
    def first(self) -> Tensor:
        """(R,) the first slot of each, counted over all videos."""
        return self.cells.slot[self.begin]

    @property
    def last(self) -> Tensor:
        """(R,) the last slot of each."""
        return self.first + self.length - 1

    @property
    def place(self) -> Tensor:
        """(R,) the place of each, counted over all videos."""
        return self.cells.place[self.begin]

    @property
    def merged(self) -> bool:
        return len(self.begin) < len(self.cells.slot)

    def match(self, metric: Tensor, clips: Sequence[ClipCount]) -> TubeMatch:
        """In each clip the most similar pairs of neighbouring runs, by cosine. Of the runs that a tube has in the clip
        the first may merge with the second, the third with the fourth and so on.

        Args:
            metric: (R, D_metric), without gradient.
            clips: of all videos, one behind the other, with the pairs to merge.

        Raises:
            ValueError: clips that are not of these runs.
        """
        before, pairs = [clip.runs + clip.pairs for clip in clips], [clip.pairs for clip in clips]
        rows, device = len(self.begin), self.begin.device
        if sum(before) != rows or sum(clip.slots for clip in clips) != self.cells.slots:
            raise ValueError(f"expected clips of {rows} runs in {self.cells.slots} slots; got {list(clips)}")
        order = self._by_tube().argsort()
        clip = self._clip_of_slot(clips)[self.first][order]
        group = self.place[order] * len(clips) + clip  # runs of one tube and clip, side by side
        position = torch.arange(rows, device=device)
        fresh = F.pad(group[1:] != group[:-1], (1, 0), value=True)
        number = position - torch.where(fresh, position, 0).cummax(0).values
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            unit = F.normalize(at_least_float32(metric[order]), dim=-1)
            similarity = F.pad((unit[:-1] * unit[1:]).sum(-1), (0, 1))
        may = (number % 2 == 0) & ~F.pad(fresh[1:], (0, 1), value=True)
        ranked = torch.where(may, similarity, -torch.inf).argsort(descending=True, stable=True)
        ranked = ranked[clip[ranked].argsort(stable=True)]  # clip by clip, the most similar first
        best = ranked[_heads(before, pairs).to(device)]
        left, right = order[best], order[best + 1]
        stays = torch.ones(rows, dtype=torch.int64, device=device).index_fill(0, right, 0)
        kept = stays.argsort(descending=True, stable=True)[: rows - len(right)]
        share = self.length[left] / (self.length[left] + self.length[right])
        return TubeMatch(kept, left, right, stays.cumsum(0)[left] - 1, share)

    def merge(self, match: TubeMatch) -> Tubes:
        """What is left of the runs."""
        length = self.length.index_add(0, match.left, self.length[match.right])
        return Tubes(match.take(self.begin), match.take(length), self.cells)

    def covering(self) -> Tensor:
        """(N,) int64, the run that covers each cell."""
        now, order = self._by_tube().sort()
        cells = self.cells.place * self.cells.slots + self.cells.slot
        return order[torch.searchsorted(now, cells, right=True) - 1]

    def by_slot(self, lengths: Tensor) -> Segments:
        """Each slot by itself, as in the tower without merging: keys are all runs that cover it, one for each place;
        queries are those that begin in it. A run weighs as one token in each of its slots, so nothing is added.

        Args:
            lengths: (G,) int64, cells of each window, in their order; of each slot, where there are no windows.
        """
        if not self.merged:
            return Segments(None, None, lengths, lengths)
        window = _numbered(lengths, len(self.cells.slot))[self.begin]
        queries = torch.zeros_like(lengths).index_add(0, window, torch.ones_like(window))
        return Segments(None, self.covering(), queries, lengths)

    def by_clip(self, lengths: Tensor, clips: Sequence[ClipCount]) -> Segments:
        """All runs of a clip together, in the windows of a slot, each as heavy as the slots that it covers: the
        logarithm of its length is added (TempMe, section 3.2, after ToMe's proportional attention).

        Args:
            lengths: as in `by_slot`.
            clips: of all videos, one behind the other.
        """
        if all(clip.slots == 1 for clip in clips):
            return self.by_slot(lengths)
        starts = torch.tensor([0, *(clip.slots for clip in clips)], device=self.begin.device).cumsum(0)
        first, places = self.first, self.cells.places[self.begin]
        behind = first - starts[self._clip_of_slot(clips)[first]]  # slots from the first of the clip
        window = _numbered(lengths, len(self.cells.slot))[self.begin - behind * places]
        ordered, order = window.sort(stable=True)
        counts = ordered.unique_consecutive(return_counts=True)[1]
        return Segments(order, order, counts, counts, self.length[order].float().log() if self.merged else None)

    def _by_tube(self) -> Tensor:
        """(R,) numbers that ascend tube by tube, and in a tube with time."""
        return self.place * self.cells.slots + self.first

    def _clip_of_slot(self, clips: Sequence[ClipCount]) -> Tensor:
        return _numbered(torch.tensor([clip.slots for clip in clips]), self.cells.slots).to(self.begin.device)


def _numbered(lengths: Tensor, total: int) -> Tensor:
    """(G,) -> (total,): 0 as often as the first says, then 1, ..."""
    return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths, output_size=total)


def _heads(lengths: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """Of parts of a sequence, the places of the first so many of each."""
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    counts = torch.tensor(wanted)
    skipped = starts - (counts.cumsum(0) - counts)
    return skipped.repeat_interleave(counts) + torch.arange(int(counts.sum()))
