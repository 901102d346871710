"""Layout of a plan as int32 tables for the kernels.

NumPy on the host, once per new plan. The tables, in the terms of `radixgen.kernels.triton_kernels`:

| table | a row of it |
| --- | --- |
| counts | numbers of pieces, of rows to merge, of rows, of chunks, of choices, and of block tiles |
| laid_out_positions | each row's position when the plan is laid out |
| bounds | start of each class's items, and the end of the last's |
| queue | for Hopper's kernel, `item * kv_heads + head`, or -1: entry `program + round * programs` is a program's next |
| items | first row, rows, runs from, to, gathered keys from, to, first partial or -1, grows, blocks of runs |
| runs | first slot, keys: whole blocks that every row of the tile sees |
| pieces | first slot, first position, keys, the tile's first row, rows that see them from, to, place, stride |
| rows, offsets, partials | rows to merge, start of each one's list of partials, and the lists, from the root down |

The last four tables are for units that choose blocks (`radixgen.kernels.block_work`).

Items are ordered by class, longest first within a class.

With each step in which every row advances by a token of its own leaf, an item *grows* by one key per growing segment.
These keys come after the others, one per such segment, step by step: their pieces have a stride.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from radixgen.core import Plan, first_seen
from radixgen.core.plan import Int32Array, Int64Array, reduce_ranges
from radixgen.kernels.assignment import assign
from radixgen.kernels.block_work import BLOCK_TABLES, BlockSizes, lay_out_blocks

TABLES = (
    "counts", "bounds", "queue", "laid_out_positions", "items", "runs", "pieces", "rows", "offsets", "partials",
    *BLOCK_TABLES,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TileClass:
    """Tiles of one size, and the launch that computes them."""

    rows: int
    """Maximum query-head rows per tile."""
    programs: int
    block_keys: int
    """Keys per block of a run."""
    num_warps: int = 4
    num_stages: int = 1
    gather_keys: int = 32
    """Keys per block of gathered keys."""
    gather_stages: int = 1
    registers: int | None = None
    """Maximum per thread; None leaves it to the compiler, which for small heads would rather spill than exceed 128."""
    hopper: bool = False
    """Whether `radixgen.kernels.hopper_attention` computes them."""


def pdl(overlap: bool) -> dict[str, bool]:
    """Return Triton's option for a launch that overlaps with the previous one (programmatic dependent launch)."""
    return {"launch_pdl": True} if overlap else {}


@dataclass(frozen=True, slots=True)
class Launch:
    """Launches of the attention kernels: one per class of tiles, widest first."""

    classes: tuple[TileClass, ...]
    """Ascending by rows."""
    least_run: int
    """Minimum consecutive keys, seen by all rows of a tile, that are copied in bulk; 0 if none are."""
    overlap: bool = False
    """Whether a launch begins while the previous one ends."""
    blocks: TileClass | None = None
    """Tiles of units that choose blocks, if any do."""

    def most_rows(self, group: int) -> int:
        """Return the rows of the tree in the widest tile."""
        return self.classes[-1].rows // group


@dataclass(frozen=True, slots=True)
class WorkSizes:
    """Memory for the tables and partial results of a launch."""

    tables: tuple[int, ...]
    """Entries of each of `TABLES`."""
    keys: int
    """Gathered keys, including those of future steps."""
    partials: int
    """Rows of partial results."""
    blocks: BlockSizes = field(default_factory=BlockSizes)

    def hold(self, other: "WorkSizes") -> bool:
        """Return whether `other` fits into memory of this size."""
        most, wanted = ((*sizes.tables, sizes.keys, sizes.partials) for sizes in (self, other))
        fits = all(need <= room for need, room in zip(wanted, most, strict=True))
        return fits and self.blocks.hold(other.blocks)

    def roomy(self) -> "WorkSizes":
        """Return at least twice these sizes, so that growing plans seldom need more."""
        chooses = self.blocks.candidates > 0
        least = [1 << 14 if chooses or name not in BLOCK_TABLES else 0 for name in TABLES]
        tables = tuple(map(_room, self.tables, least))
        return WorkSizes(tables, _room(self.keys, 1 << 16), _room(self.partials, 1 << 12), self.blocks.roomy())

    def union(self, other: "WorkSizes") -> "WorkSizes":
        """Return sizes that hold both."""
        tables = tuple(map(max, self.tables, other.tables))
        most_keys, most_partials = max(self.keys, other.keys), max(self.partials, other.partials)
        return WorkSizes(tables, most_keys, most_partials, self.blocks.union(other.blocks))


def _room(size: int, least: int) -> int:
    return max(least, 1 << (2 * size - 1).bit_length()) if size else least


@dataclass(frozen=True, slots=True)
class Work:
    """The input of one launch."""

    tables: tuple[Int32Array, ...]
    """In the order of `TABLES`."""
    used: tuple[bool, ...]
    """Which of the launch's classes have tiles."""
    sizes: WorkSizes
    num_pieces: int
    most_partials: int
    """Maximum partial results of a row."""


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Units divided into tiles that a launch can hold. Arrays are `[tiles]`."""

    unit: Int64Array
    cost: NDArray[np.float64]
    first: Int64Array
    rows: Int64Array
    kind: Int64Array
    """Index of the launch's class."""
    block: Int64Array
    """Keys per block of a run."""
    lowest: Int64Array
    """Lowest position of its rows."""
    highest: Int64Array


@dataclass(frozen=True, slots=True)
class _TileReads:
    """Keys that each tile reads of each segment. Arrays are `[reads]`, by tile."""

    tile: Int64Array
    start: Int64Array
    position: Int64Array
    low: Int64Array
    high: Int64Array
    before: Int64Array
    """Gathered keys before the run."""
    run: Int64Array
    """Keys of the run, in whole blocks."""
    after: Int64Array
    """Gathered keys after the run."""
    room: Int64Array
    """Keys of future steps."""


def lay_out(plan: Plan, launch: Launch, *, group: int, kv_heads: int, slack: int = 0) -> Work:
    """Lay out the tables of one plan for one launch.

    `group`: query heads per KV head. `slack`: tokens by which the rows may advance before the tables must be laid out
    anew, at most `plan.slack`.
    """
    assert 0 <= slack <= plan.slack
    assert launch.blocks or not plan.selects
    tiles = _cut_tiles(plan, launch, group)
    reads = _read(plan, tiles, launch, slack)
    shape = launch.blocks or launch.classes[0]
    choosing = lay_out_blocks(plan, group=group, kv_heads=kv_heads, tile_rows=shape.rows, programs=shape.programs)
    partial, num_partials, merged = _partials(
        plan,
        np.concatenate([tiles.first, choosing.tiles[:, 0]]),
        np.concatenate([tiles.rows, choosing.tiles[:, 1]]),
        np.concatenate([plan.unit_rank[tiles.unit], choosing.ranks]),
    )
    count = tiles.unit.size
    gathered, grows = (
        np.bincount(reads.tile, weights=weights, minlength=count).astype(np.int64)
        for weights in (reads.before + reads.after, reads.room > 0)
    )
    run_of = np.flatnonzero(reads.run)
    runs = np.stack([reads.start + reads.before, reads.run], axis=1)[run_of]
    run_bounds = np.searchsorted(reads.tile[run_of], np.arange(count + 1))
    key_bounds = np.concatenate([[0], np.cumsum(gathered + grows * slack)])
    pieces = _pieces(reads, tiles, key_bounds, grows)
    items = np.stack(
        [
            tiles.first,
            tiles.rows,
            run_bounds[:-1],
            run_bounds[1:],
            key_bounds[:-1],
            key_bounds[:-1] + gathered,
            partial[:count],
            grows,
            np.bincount(reads.tile, weights=reads.run, minlength=count).astype(np.int64) // tiles.block,
        ],
        axis=1,
    )
    made = len(choosing.chunks), len(choosing.choices), len(choosing.tiles)
    counts = np.array([len(pieces), merged[0].size, plan.num_rows, *made])
    bounds = np.searchsorted(tiles.kind, np.arange(len(launch.classes) + 1))
    queue = _queue(tiles, bounds[-2], launch.classes[-1], kv_heads)
    laid_out = counts, bounds, queue, plan.row_positions, items, runs, pieces, *merged
    tables = tuple(_aligned(table) for table in (*laid_out, *choosing.tables(partial[count:])))
    num_keys = -(-int(key_bounds[-1]) // 4) * 4
    sizes = WorkSizes(tuple(table.size for table in tables), num_keys, num_partials, choosing.sizes)
    return Work(
        tables,
        tuple((np.diff(bounds) > 0).tolist()),
        sizes,
        len(pieces),
        int(np.diff(merged[1]).max(initial=0)),
    )


def _aligned(table: Int32Array | Int64Array) -> Int32Array:
    """Flatten and pad to 16 bytes: kernels are compiled for tables at aligned addresses."""
    flat = np.zeros(-(-table.size // 4) * 4, np.int32)
    flat[: table.size] = table.reshape(-1)
    return flat


def _queue(tiles: _Tiles, first: int, widest: TileClass, kv_heads: int) -> Int64Array:
    """Return each program's share of the tiles from `first` on, in rounds of one entry per program, ending with two
    rounds of -1, because the kernel looks that far ahead. Empty if these tiles are not for Hopper's kernel.
    """
    if not widest.hopper:
        return np.empty(0, np.int64)
    tasks, programs = np.arange(first * kv_heads, tiles.kind.size * kv_heads), widest.programs
    offsets, places = assign(np.repeat(tiles.cost[first:], kv_heads), programs)
    turns = np.arange(places.size) - np.repeat(offsets[:-1], np.diff(offsets))
    queue = np.full((int(np.diff(offsets).max(initial=0)) + 2, programs), -1, np.int64)
    queue[turns, np.repeat(np.arange(programs), np.diff(offsets))] = tasks[places]
    return queue


def _cut_tiles(plan: Plan, launch: Launch, group: int) -> _Tiles:
    """Divide units into tiles of at most the widest class, each in the narrowest class that holds it.

    Tiles of equal cost that begin with the same keys are adjacent, so that these keys are read from memory once.
    """
    widest = launch.most_rows(group)
    assert widest < 256, "a gathered key holds rows in 8 bits"
    sizes = np.diff(plan.unit_rows, axis=1)[:, 0].astype(np.int64)
    counts = np.where(plan.unit_blocks > 0, 0, -(-sizes // widest))
    unit = np.repeat(np.arange(plan.num_units), counts)
    rank = np.arange(unit.size) - np.repeat(np.cumsum(counts) - counts, counts)
    first = plan.unit_rows[unit, 0] + rank * widest
    rows = np.minimum(widest, plan.unit_rows[unit, 1] - first)
    kind = np.searchsorted([tile_class.rows for tile_class in launch.classes], rows * group)
    first_slots = np.append(plan.segment_starts, 0)[plan.unit_segments[unit, 0]]
    order = np.lexsort((first_slots, -plan.unit_cost[unit], kind))
    unit, first, rows, kind = unit[order], first[order], rows[order], kind[order]
    bounds = np.stack([first, first + rows], axis=1)
    return _Tiles(
        unit=unit,
        cost=plan.unit_cost[unit],
        first=first,
        rows=rows,
        kind=kind,
        block=np.array([tile_class.block_keys for tile_class in launch.classes])[kind],
        lowest=reduce_ranges(np.minimum, plan.row_positions, bounds).astype(np.int64),
        highest=reduce_ranges(np.maximum, plan.row_positions, bounds).astype(np.int64),
    )


def _read(plan: Plan, tiles: _Tiles, launch: Launch, slack: int) -> _TileReads:
    """Pair each tile with its unit's segments, and divide each pair into a run that all rows see, the rest, and `slack`
    future keys of growing segments.
    """
    begin = plan.unit_segments[tiles.unit, 0].astype(np.int64)
    counts = plan.unit_segments[tiles.unit, 1] - begin
    tile = np.repeat(np.arange(tiles.unit.size), counts)
    segment = np.arange(tile.size) - np.repeat(np.cumsum(counts) - counts - begin, counts)
    first, rows = tiles.first[tile], tiles.rows[tile]
    low = np.maximum(plan.segment_rows[segment, 0] - first, 0)
    high = np.minimum(plan.segment_rows[segment, 1] - first, rows)
    position = plan.segment_positions[segment].astype(np.int64)
    length = np.minimum(plan.segment_lengths[segment], tiles.highest[tile] + 1 - position)
    kept = (low < high) & (length > 0)
    tile, segment, low, high, length = tile[kept], segment[kept], low[kept], high[kept], length[kept]
    position, whole = position[kept], ((low == 0) & (high == rows[kept]))
    before, run, room = np.zeros_like(length), np.zeros_like(length), np.zeros_like(length)
    if launch.least_run:
        until = np.minimum(tiles.lowest[tile] + 1 - position, plan.segment_lengths[segment])
        if plan.window is not None:
            before = np.clip(first_seen(plan.window, tiles.highest[tile] + slack) - position, 0, length)
        block = tiles.block[tile]
        run = (until - before) // block * block
        run[~whole | (run < launch.least_run)] = 0
        before[run == 0] = 0
    if slack:
        growing = np.zeros(plan.segment_lengths.size, bool)
        growing[plan.growing] = True
        room[growing[segment]] = slack
    return _TileReads(tile, plan.segment_starts[segment], position, low, high, before, run, length - before - run, room)


def _pieces(reads: _TileReads, tiles: _Tiles, key_bounds: Int64Array, grows: Int64Array) -> Int64Array:
    """Return the gathered parts of every read, `[pieces, 8]`, by tile, future keys last.

    The first future keys are adjacent, and each later one is a stride further.
    """
    behind = reads.before + reads.run
    starts = np.concatenate([np.zeros_like(behind), behind, behind + reads.after])
    lengths = np.concatenate([reads.before, reads.after, reads.room])
    full = np.flatnonzero(lengths)
    which, read = np.divmod(full, max(behind.size, 1))
    order = np.lexsort((which, read, which == 2, reads.tile[read]))
    read, later, starts, lengths = read[order], which[order] == 2, starts[full[order]], lengths[full[order]]
    tile = reads.tile[read]
    taken = np.where(later, 1, lengths)
    begins = np.cumsum(taken) - taken
    first = np.searchsorted(tile, tile)
    place = key_bounds[tile] + begins - begins[first]
    stride = np.where(later, grows[tile], 0)
    assert np.all(place + (lengths - 1) * np.maximum(stride, 1) < key_bounds[tile + 1])
    fields = [
        reads.start[read] + starts,
        reads.position[read] + starts,
        lengths,
        tiles.first[tile],
        reads.low[read],
        reads.high[read],
        place,
        stride,
    ]
    return np.stack(fields, axis=1)


def _partials(
    plan: Plan, first: Int64Array, rows: Int64Array, ranks: Int64Array
) -> tuple[Int64Array, int, tuple[Int64Array, Int64Array, Int64Array]]:
    """Return the first partial result of each tile `[tiles]`, -1 if its rows are final; and the rows to merge, with
    their lists. `first`, `rows`, `ranks` `[tiles]`: a tile's rows, and its unit's rank.
    """
    cut = reduce_ranges(np.maximum, plan.row_extra, np.stack([first, first + rows], axis=1)) > 0
    ends = np.cumsum(np.where(cut, rows, 0))
    partial = np.where(cut, ends - np.where(cut, rows, 0), -1)
    owners = np.flatnonzero(cut)
    rows_of, sizes = first[owners], rows[owners]
    offset = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    row = np.repeat(rows_of, sizes) + offset
    place = np.repeat(partial[owners], sizes) + offset
    order = np.lexsort((place, np.repeat(ranks[owners], sizes), row))
    merged, begins = np.unique(row[order], return_index=True)
    return partial, int(ends[-1]) if ends.size else 0, (merged, np.append(begins, row.size), place[order])
