"""A plan: the attention of one step, as numbers. The planner writes it and the kernels read it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]


def reduce_ranges(reduce: np.ufunc, values: Int32Array, ranges: NDArray[np.integer]) -> Int32Array:
    """`reduce` (a binary ufunc) over each half-open range of `values`; ranges `[n, 2]` hold at least one
    each.
    """
    if not len(ranges):
        return np.empty(0, values.dtype)
    padded = np.concatenate([values, values[-1:]])
    reduced: Int32Array = reduce.reduceat(padded, ranges.reshape(-1))[::2]
    return reduced


@dataclass(frozen=True, slots=True)
class Chunk:
    """Chunked attention: a row at position `p` sees the keys from `p // size * size` up to its own."""

    size: int


Window: TypeAlias = int | Chunk
"""What a layer leaves visible: the last so many keys, a row's own among them, or those of a row's chunk."""


_Positions = TypeVar("_Positions", int, NDArray[np.int32], NDArray[np.int64])


def first_seen(window: Window, positions: _Positions) -> _Positions:
    """The first key position that a row at each of `positions` sees; may be below 0. It never falls as they rise."""
    if isinstance(window, Chunk):
        return positions // window.size * window.size
    return positions - (window - 1)


FATES = ("folded", "cut", "mixed")


@dataclass(frozen=True, slots=True)
class NodeSummary:
    """What the planner decided for each active node, parents first; a chain without rows or branches counts as one.
    Every array is `[nodes]`.
    """

    depths: Int32Array
    lengths: Int32Array
    """Keys of the node, in tokens."""
    rows: Int32Array
    """Rows at the node or below it: those that see its keys."""
    fates: NDArray[np.int8]
    """Index into `FATES`: read by the units below it, by units of its own, or together with its siblings' subtrees."""
    readers: Int32Array
    """Units that read its keys, before any was split along its keys."""


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Plan:
    """Units of attention over depth-first rows.

    A row at position `p` sees, of each segment of each unit that covers the row, the keys at positions `<= p`
    (and from `first_seen(window, p)` where a layer has a window). The segments of all units that cover a row are
    exactly the row's path. A row covered by several units gets a partial result from each, merged in the order of
    `unit_rank`.

    Half-open ranges: unit `u` holds rows `[unit_rows[u, 0], unit_rows[u, 1])` and segments
    `[unit_segments[u, 0], unit_segments[u, 1])`.
    """

    row_positions: Int32Array
    """`[rows]`"""
    row_order: Int64Array
    """`[rows]`: row `i` of the plan is row `row_order[i]` of the caller."""
    row_extra: Int32Array
    """`[rows]`: units that cover the row, less one."""
    unit_rows: Int32Array
    """`[units, 2]`"""
    unit_segments: Int32Array
    """`[units, 2]`"""
    unit_rank: Int32Array
    """`[units]`: ascending from the root down among the units that cover a row; the order in which they merge."""
    unit_cost: NDArray[np.float64]
    """`[units]`: what the cost model says of it, for one KV head."""
    tile_rows: int
    """Query heads' rows in the class of its widest tiles."""
    predicted: float
    """When attention should be done with one layer, in the cost model's unit."""
    segment_starts: Int64Array
    """`[segments]`: first slot."""
    segment_lengths: Int32Array
    """`[segments]`: keys, all seen by at least one row of the unit where the layer has no window."""
    segment_positions: Int32Array
    """`[segments]`: position of the first key."""
    segment_rows: Int32Array
    """`[segments, 2]`: the rows of the unit that see the segment; of these, rows that stand before one of its keys come
    ahead of those that don't.
    """
    segment_room: Int32Array
    """`[segments]`: by how many keys the segment may grow in place; 0 but for those that are growing."""
    growing: Int64Array
    """Segments that end at a row's own, last token: they grow by one where that row moves on by one."""
    path_rows: Int32Array
    """`[tiles, 2]`: rows of one node, as unshared reading would tile them, each reading its whole path."""
    nodes: NodeSummary
    window: Window | None = None
    age: int = 0
    """Steps since the plan was built: it was carried over so often, and only lengths grew."""
    _origin: "Plan | None" = field(default=None, repr=False, compare=False)
    _windowed: dict[Window, "Plan"] = field(default_factory=dict, repr=False, compare=False)

    @property
    def rebuilt(self) -> bool:
        """Whether this plan was built for its step."""
        return self.age == 0

    @property
    def origin(self) -> "Plan":
        """The plan that was built, of which this one is left where lengths have grown since."""
        return self._origin or self

    @property
    def slack(self) -> int:
        """Steps for which every growing segment has room; 0 where none grows."""
        return int(self.segment_room[self.growing].min()) if self.growing.size else 0

    @property
    def num_rows(self) -> int:
        return int(self.row_positions.size)

    @property
    def num_units(self) -> int:
        return len(self.unit_rows)

    @property
    def single(self) -> bool:
        """Whether every row is covered by exactly one unit, so that nothing is merged."""
        return not self.row_extra.any()

    @property
    def kv_tokens_read(self) -> int:
        """Keys read in one layer without a window: the lengths of all segments of all units."""
        return int(self.segment_lengths.sum())

    @property
    def kv_tokens_unshared(self) -> int:
        """Keys that the same rows would read in one layer, had each node's rows read their own path alone."""
        if not len(self.path_rows):
            return 0
        first, last = self.path_rows[:, 0], self.path_rows[:, 1] - 1
        unseen = np.zeros_like(first)
        if self.window is not None:
            unseen = np.maximum(first_seen(self.window, self.row_positions[first]), 0)
        return int((self.row_positions[last] + 1 - unseen).sum())

    def advance(self) -> "Plan":
        """The plan of the next step where every row moves on by one token of its own leaf."""
        lengths = self.segment_lengths.copy()
        lengths[self.growing] += 1
        room = self.segment_room.copy()
        room[self.growing] = np.maximum(room[self.growing] - 1, 0)
        return replace(
            self,
            row_positions=self.row_positions + np.int32(1),
            segment_lengths=lengths,
            segment_room=room,
            age=self.age + 1,
            _origin=self.origin,
            _windowed={},
        )

    def select(self, rows: Int64Array) -> "Plan":
        """The same keys for some of the rows, `[n]` places in this plan's order, ascending."""
        unit_rows = np.searchsorted(rows, self.unit_rows).astype(np.int32)
        segment_rows = np.searchsorted(rows, self.segment_rows).astype(np.int32)
        units = np.flatnonzero(unit_rows[:, 0] < unit_rows[:, 1])
        kept = np.concatenate([[0], np.cumsum(segment_rows[:, 0] < segment_rows[:, 1])])
        segments = np.flatnonzero(np.diff(kept))
        over = np.zeros(rows.size + 1, np.int32)
        np.add.at(over, unit_rows[units, 0], 1)
        np.add.at(over, unit_rows[units, 1], -1)
        path_rows = np.searchsorted(rows, self.path_rows).astype(np.int32)
        return replace(
            self,
            row_positions=self.row_positions[rows],
            row_order=np.arange(rows.size),
            row_extra=np.cumsum(over[:-1], dtype=np.int32) - 1,
            unit_rows=unit_rows[units],
            unit_segments=kept[self.unit_segments[units]].astype(np.int32),
            unit_rank=self.unit_rank[units],
            unit_cost=self.unit_cost[units],
            segment_starts=self.segment_starts[segments],
            segment_lengths=self.segment_lengths[segments],
            segment_positions=self.segment_positions[segments],
            segment_rows=segment_rows[segments],
            segment_room=np.zeros(segments.size, np.int32),
            growing=np.empty(0, np.int64),
            path_rows=path_rows[path_rows[:, 0] < path_rows[:, 1]],
            _origin=None,
            _windowed={},
        )

    def within(self, window: Window | None) -> "Plan":
        """The same units with every segment trimmed to the keys that `window` shows the unit's first row."""
        if window is None:
            return self
        if window not in self._windowed:
            self._windowed[window] = self._trim(window)
        return self._windowed[window]

    def _trim(self, window: Window) -> "Plan":
        counts = np.diff(self.unit_segments, axis=1)[:, 0]
        lowest = reduce_ranges(np.minimum, self.row_positions, self.unit_rows)
        first = np.repeat(first_seen(window, lowest), counts)
        cut = np.clip(first - self.segment_positions, 0, self.segment_lengths)
        return replace(
            self,
            segment_starts=self.segment_starts + cut,
            segment_lengths=(self.segment_lengths - cut).astype(np.int32),
            segment_positions=(self.segment_positions + cut).astype(np.int32),
            window=window,
            _windowed={},
        )

    def explain(self, bytes_per_token: int = 1) -> str:
        """Levels, units, rows, and the KV read against unshared reading, one fact a line.

        `bytes_per_token` is the KV of one token in one layer (or in all); the default counts tokens.
        """
        unit = "bytes" if bytes_per_token > 1 else "tokens"
        read, unshared = self.kv_tokens_read, self.kv_tokens_unshared
        lines = [
            f"{self.num_rows} rows, {self.num_units} units, {len(self.segment_lengths)} segments, "
            f"{int(self.row_extra.sum()) + self.num_rows} partial or final rows written",
            f"KV read {read * bytes_per_token:,} {unit}; "
            f"unshared {unshared * bytes_per_token:,} {unit}; ratio {unshared / max(read, 1):.2f}",
        ]
        nodes = self.nodes
        for depth in range(int(nodes.depths.max(initial=-1)) + 1):
            here = nodes.depths == depth
            counts = [int((here & (nodes.fates == fate)).sum()) for fate in range(len(FATES))]
            fates = ", ".join(f"{count} {fate}" for count, fate in zip(counts, FATES, strict=True) if count)
            lines.append(
                f"level {depth}: {int(here.sum())} nodes, {int(nodes.lengths[here].sum())} tokens, {fates}; "
                f"rows below {_span(nodes.rows[here])}, read by {_span(nodes.readers[here])} units"
            )
        return "\n".join(lines)


def _span(values: Sequence[int] | Int32Array) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
