"""Layout of the units of a plan that choose blocks, as int32 tables for `radixgen.kernels.block_kernels`.

| table | a row of it |
| --- | --- |
| blocks | a candidate block |
| choices | first of `blocks`, candidates, blocks to choose, room per head, parts, first weight, first list entry, 0 |
| chunks | first row, rows, first of `blocks`, blocks, first LSE, chunk, chunks, first weight, strides of both |
| block_tiles | first row, rows, first list entry, room per head, share, shares, first partial, 0 |

A *choice* is one unit. Its rows are divided into parts, and its candidates into chunks. A *list entry* is a number of
the lists that the device writes: for each unit, each head's number of blocks, then each head's blocks.
"""

from dataclasses import astuple, dataclass
from typing import NamedTuple

import numpy as np

from radixgen.core import Plan
from radixgen.core.plan import BLOCK, Int64Array

CHUNK = 64
"""Candidate blocks per program."""
MOST_CANDIDATES = 2048
"""Maximum candidate blocks of a unit, which one program compares."""
MOST_SHARE = 2
"""Maximum blocks of a KV head, as a multiple of the average over the heads."""
_MOST_PARTS = 8
_LEAST_SHARE = 2
"""Minimum average number of blocks that a program attends to."""

BLOCK_TABLES = ("blocks", "choices", "chunks", "block_tiles")


def list_room(candidates: int, blocks: int) -> int:
    """Return the maximum number of blocks per KV head of a unit that chooses `blocks` on average."""
    return min(candidates, MOST_SHARE * blocks)


def candidate_blocks(plan: Plan, unit: int) -> Int64Array:
    """Return the blocks among which a unit chooses, in the order of their positions."""
    segments = slice(*plan.unit_segments[unit].tolist())
    counts = plan.segment_lengths[segments].astype(np.int64) // BLOCK
    offset = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(plan.segment_starts[segments] // BLOCK, counts) + offset


@dataclass(frozen=True, slots=True)
class BlockSizes:
    """Memory of the device for choices, in numbers, and the maximum candidates of a unit."""

    lses: int = 0
    weights: int = 0
    lists: int = 0
    candidates: int = 0

    def hold(self, other: "BlockSizes") -> bool:
        """Return whether `other` fits into memory of this size."""
        return all(need <= room for need, room in zip(astuple(other), astuple(self), strict=True))

    def roomy(self) -> "BlockSizes":
        """Return twice these sizes."""
        lses, weights, lists, candidates = (2 * size for size in astuple(self))
        return BlockSizes(lses, weights, lists, min(candidates, MOST_CANDIDATES))

    def union(self, other: "BlockSizes") -> "BlockSizes":
        """Return sizes that hold both."""
        return BlockSizes(*map(max, astuple(self), astuple(other)))


@dataclass(frozen=True, slots=True)
class BlockWork:
    """Tables of the units that choose blocks. Arrays are as in `BLOCK_TABLES`."""

    blocks: Int64Array
    choices: Int64Array
    chunks: Int64Array
    tiles: Int64Array
    """`[tiles, 8]`, without first partials."""
    ranks: Int64Array
    """`[tiles]`: merge order."""
    sizes: BlockSizes

    def tables(self, partials: Int64Array) -> tuple[Int64Array, ...]:
        """Return the tables, with each tile's first partial result `[tiles]`."""
        tiles = self.tiles.copy()
        tiles[:, 6] = partials
        return self.blocks, self.choices, self.chunks, tiles


def score_rows(tile_rows: int) -> int:
    """Return the query-head rows that one program scores at a time, if tiles have so many."""
    return min(tile_rows, 64)


def lay_out_blocks(plan: Plan, *, group: int, kv_heads: int, tile_rows: int, programs: int) -> BlockWork:
    """Lay out the units of `plan` that choose blocks.

    `group`: query heads per KV head; `tile_rows`: query-head rows of a tile; `programs`: how many programs attend at
    the same time.
    """
    units = np.flatnonzero(plan.unit_blocks)
    columns = units, plan.unit_rows[units], plan.unit_blocks[units], plan.unit_rank[units]
    rows_per_tile = max(tile_rows // group, 1)
    num_tiles = int((-(-np.diff(columns[1])[:, 0] // rows_per_tile)).sum())
    shares = max(programs // max(num_tiles * kv_heads, 1), 1)
    scored = max(score_rows(tile_rows) // group, 1)
    blocks: list[Int64Array] = []
    choices: list[list[int]] = []
    chunks: list[list[int]] = []
    tiles: list[list[int]] = []
    ranks: list[int] = []
    base = _Offsets()
    for unit, (first, stop), chosen, rank in zip(*(column.tolist() for column in columns), strict=True):
        candidates = candidate_blocks(plan, unit)
        laid = _Unit.of(first, stop - first, candidates.size, chosen, group, kv_heads, scored)
        blocks.append(candidates)
        choices.append(laid.choice(base))
        chunks += laid.chunks(base)
        mine = laid.tiles(base, rows_per_tile, shares)
        tiles += mine
        ranks += [rank] * len(mine)
        base = laid.after(base)
    return BlockWork(
        blocks=np.concatenate([np.empty(0, np.int64), *blocks]),
        choices=np.array(choices, np.int64).reshape(-1, 8),
        chunks=np.array(chunks, np.int64).reshape(-1, 10),
        tiles=np.array(tiles, np.int64).reshape(-1, 8),
        ranks=np.array(ranks, np.int64),
        sizes=BlockSizes(base.lses, base.weights, base.lists, max((part.size for part in blocks), default=0)),
    )


class _Offsets(NamedTuple):
    """Where the numbers of a unit begin: its candidates, log-sum-exps, weights and list entries."""

    blocks: int = 0
    lses: int = 0
    weights: int = 0
    lists: int = 0


class _Unit(NamedTuple):
    """A unit that chooses `chosen` of its candidates for `rows` rows, of which parts of `part_rows` are scored
    together.
    """

    first: int
    rows: int
    candidates: int
    chosen: int
    part_rows: int
    num_chunks: int
    room: int
    """Maximum blocks of a KV head"""
    group: int
    kv_heads: int

    @classmethod
    def of(cls, first: int, rows: int, candidates: int, chosen: int, group: int, kv_heads: int, scored: int) -> "_Unit":
        """`scored`: rows that one program scores at a time."""
        assert candidates <= MOST_CANDIDATES
        part_rows = -(-rows // (scored * _MOST_PARTS)) * scored
        num_chunks, room = -(-candidates // CHUNK), list_room(candidates, chosen)
        return cls(first, rows, candidates, chosen, part_rows, num_chunks, room, group, kv_heads)

    @property
    def parts(self) -> range:
        """First row of each part, within the unit."""
        return range(0, self.rows, self.part_rows)

    def choice(self, base: _Offsets) -> list[int]:
        """Return the unit's row of `choices`."""
        total = self.kv_heads * self.chosen
        return [base.blocks, self.candidates, total, self.room, len(self.parts), base.weights, base.lists, 0]

    def chunks(self, base: _Offsets) -> list[list[int]]:
        """Return the unit's rows of `chunks`."""
        chunks, count = self.num_chunks, self.candidates
        part_weights, row_lses = self.kv_heads * count, self.group * chunks
        places = [(chunk, chunk * CHUNK, min(CHUNK, count - chunk * CHUNK)) for chunk in range(chunks)]
        return [
            [
                self.first + begin, min(self.part_rows, self.rows - begin), base.blocks + place, blocks,
                base.lses + begin * row_lses, chunk, chunks, base.weights + part * part_weights + place,
                count, self.rows * row_lses,
            ]
            for part, begin in enumerate(self.parts)
            for chunk, place, blocks in places
        ]  # fmt: skip

    def tiles(self, base: _Offsets, rows_per_tile: int, most_shares: int) -> list[list[int]]:
        """Return the unit's rows of `block_tiles`: each tile is divided into as many shares as its blocks are worth."""
        shares = min(most_shares, max(self.chosen // _LEAST_SHARE, 1))
        return [
            [self.first + begin, min(rows_per_tile, self.rows - begin), base.lists, self.room, share, shares, 0, 0]
            for begin in range(0, self.rows, rows_per_tile)
            for share in range(shares)
        ]

    def after(self, base: _Offsets) -> _Offsets:
        """Return where the numbers of the next unit begin."""
        return _Offsets(
            blocks=base.blocks + self.candidates,
            lses=base.lses + self.kv_heads * self.rows * self.group * self.num_chunks,
            weights=base.weights + len(self.parts) * self.kv_heads * self.candidates,
            lists=base.lists + self.kv_heads * (1 + self.room),
        )
