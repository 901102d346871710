"""A plan: the attention of one step as arrays. The planner makes it and the kernels read it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]
Float64Array = NDArray[np.float64]


def reduce_ranges(reduce: np.ufunc, values: Int32Array, ranges: NDArray[np.integer]) -> Int32Array:
    """Apply a binary ufunc `reduce` over half-open `ranges [n, 2]` of `values`. No range may be empty."""
    if not len(ranges):
        return np.empty(0, values.dtype)
    padded = np.concatenate([values, values[-1:]])
    reduced: Int32Array = reduce.reduceat(padded, ranges.reshape(-1))[::2]
    return reduced


@dataclass(frozen=True, slots=True)
class Chunk:
    """Chunked attention: a row at position `p` sees keys from `p // size * size` to its own."""

    size: int


Window: TypeAlias = int | Chunk
"""Visible keys of a layer: a number of keys up to and including the row's own, or those of the row's `Chunk`."""


_Positions = TypeVar("_Positions", int, NDArray[np.int32], NDArray[np.int64])


def first_seen(window: Window, positions: _Positions) -> _Positions:
    """Return the first key position visible to a row at each of `positions`. May be negative; non-decreasing in
    `positions`.
    """
    if isinstance(window, Chunk):
        return positions // window.size * window.size
    return positions - (window - 1)


BLOCK = 64
"""Slots of a block: block `b` is `[64 * b, 64 * b + 64)`."""

FATES = ("folded", "cut", "mixed")


class ScoredPrompt(NamedTuple):
    """A prompt of which some rows of a step, its last ones, score the keys: `radixgen.reading.Press`."""

    rows: Int64Array
    """`[rows]`: indices of these rows in the step."""
    slots: Int64Array
    """`[tokens]`: slots of the prompt's keys, by position."""
    num_scored: int
    """Number of tokens, the first ones, that get scores."""
    kernel: int
    """Neighbours among which a token gets the largest attention, itself included. Odd."""


@dataclass(frozen=True, slots=True)
class NodeSummary:
    """The planner's decision for each active node, parents first. A chain of nodes without rows or branches counts as
    one. Every array is `[nodes]`.
    """

    depths: Int32Array
    lengths: Int32Array
    """Keys in the node."""
    rows: Int32Array
    """Rows at or below the node: those that see its keys."""
    fates: NDArray[np.int8]
    """Index into `FATES`: whether the node is read by the units below it (folded), by its own units (cut), or together
    with its siblings' subtrees (mixed).
    """
    readers: Int32Array
    """Units that read the node's keys, before units are split along their keys."""


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Plan:
    """Units of attention over depth-first rows.

    A row at position `p` sees the keys at positions `<= p` in every segment of every unit that covers the row, from
    `first_seen(window, p)` on if the layer has a window. The segments of all units that cover a row make up exactly the
    row's path. A row covered by several units gets one partial result per unit; they are merged in the order of
    `unit_rank`.

    Half-open ranges: unit `u` holds rows `[unit_rows[u, 0], unit_rows[u, 1])` and segments
    `[unit_segments[u, 0], unit_segments[u, 1])`.
    """

    row_positions: Int32Array
    """`[rows]`"""
    row_order: Int64Array
    """`[rows]`: row `i` of the plan is row `row_order[i]` of the caller."""
    row_extra: Int32Array
    """`[rows]`: number of units that cover the row, minus one."""
    unit_rows: Int32Array
    """`[units, 2]`"""
    unit_segments: Int32Array
    """`[units, 2]`"""
    unit_rank: Int32Array
    """`[units]`: merge order. Ascending from the root down among the units that cover a row."""
    unit_cost: NDArray[np.float64]
    """`[units]`: cost per KV head by the cost model."""
    unit_blocks: Int32Array
    """`[units]`: if positive, the unit's segments are whole blocks, at least as many, in ascending order, and its rows
    read only so many, on average over the KV heads: each head its own, chosen in each layer by the rows' queries (see
    `radixgen.kernels.torch_blocks`). 0: they read every key. Layers with a window always do.
    """
    tile_rows: int
    """Query-head rows of the largest tile class in use."""
    predicted: float
    """Predicted attention time of one layer, in the cost model's unit."""
    segment_starts: Int64Array
    """`[segments]`: first slot."""
    segment_lengths: Int32Array
    """`[segments]`: number of keys. Without a window, each is seen by at least one row of the unit."""
    segment_positions: Int32Array
    """`[segments]`: position of the first key."""
    segment_rows: Int32Array
    """`[segments, 2]`: the rows of the unit that see the segment. Rows positioned before one of its keys come first."""
    segment_room: Int32Array
    """`[segments]`: keys by which the segment can grow in place; 0 unless it is growing."""
    growing: Int64Array
    """Segments that end at the last token of a row, and grow by one key when that row advances."""
    path_rows: Int32Array
    """`[tiles, 2]`: rows of one node, tiled as attention without sharing would tile them, each tile reading its whole
    path.
    """
    nodes: NodeSummary
    window: Window | None = None
    age: int = 0
    """Steps since the plan was built, over which only lengths grew."""
    _origin: "Plan | None" = field(default=None, repr=False, compare=False)
    _windowed: dict[Window, "Plan"] = field(default_factory=dict, repr=False, compare=False)

    @property
    def rebuilt(self) -> bool:
        """Whether this plan was built for its own step."""
        return self.age == 0

    @property
    def origin(self) -> "Plan":
        """The plan as it was first built, before any `advance`."""
        return self._origin or self

    @property
    def slack(self) -> int:
        """Steps for which every growing segment has room; 0 if none is growing."""
        return int(self.segment_room[self.growing].min()) if self.growing.size else 0

    @property
    def num_rows(self) -> int:
        return int(self.row_positions.size)

    @property
    def num_units(self) -> int:
        return len(self.unit_rows)

    @property
    def single(self) -> bool:
        """Whether every row is covered by exactly one unit, so that nothing has to be merged."""
        return not self.row_extra.any()

    @property
    def selects(self) -> bool:
        """Whether some units read only chosen blocks."""
        return bool(self.unit_blocks.any())

    @property
    def kv_tokens_read(self) -> int:
        """Keys read in one layer without a window: the total length of the segments of all units, or of the blocks that
        are chosen among them.
        """
        every = int(self.segment_lengths.sum())
        choosing = np.flatnonzero(self.unit_blocks)
        if not choosing.size:
            return every
        candidates = int(reduce_ranges(np.add, self.segment_lengths, self.unit_segments[choosing]).sum())
        return every - candidates + BLOCK * int(self.unit_blocks[choosing].sum())

    @property
    def block_rows(self) -> int:
        """Kind of units that choose blocks: 0 if there are none, 1 if each has one row, otherwise 2."""
        rows = np.diff(self.unit_rows, axis=1)[:, 0][self.unit_blocks > 0]
        return min(int(rows.max(initial=0)), 2)

    def read_all(self) -> "Plan":
        """Return the plan in which every unit reads all its keys."""
        return replace(self, unit_blocks=np.zeros_like(self.unit_blocks), _origin=None, _windowed={})

    @property
    def kv_tokens_unshared(self) -> int:
        """Keys that one layer would read if each node's rows read their own path separately."""
        if not len(self.path_rows):
            return 0
        first, last = self.path_rows[:, 0], self.path_rows[:, 1] - 1
        unseen = np.zeros_like(first)
        if self.window is not None:
            unseen = np.maximum(first_seen(self.window, self.row_positions[first]), 0)
        return int((self.row_positions[last] + 1 - unseen).sum())

    def advance(self) -> "Plan":
        """Return the plan of the next step if every row advances by one token of its own leaf."""
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
        """Return the plan restricted to `rows [n]`, ascending indices into this plan's rows."""
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
            unit_blocks=self.unit_blocks[units],
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
        """Return the plan with every segment trimmed to the keys that the unit's first row sees within `window`."""
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
            unit_blocks=np.zeros_like(self.unit_blocks),
            window=window,
            _windowed={},
        )

    def explain(self, bytes_per_token: int = 1) -> str:
        """Summarize the plan as text: levels, units, rows, and KV read with and without sharing.

        `bytes_per_token`: KV bytes of one token in one layer or in all. The default of 1 counts tokens.
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
