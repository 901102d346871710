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
    units = np.flatnonzero(plan.unit_blocks).tolist()
    rows_per_tile = max(tile_rows // group, 1)
    sizes = [int(plan.unit_rows[unit, 1] - plan.unit_rows[unit, 0]) for unit in units]
    num_tiles = sum(-(-size // rows_per_tile) for size in sizes)
    shares = max(programs // max(num_tiles * kv_heads, 1), 1)
    blocks: list[Int64Array] = []
    choices: list[list[int]] = []
    chunks: list[list[int]] = []
    tiles: list[list[int]] = []
    ranks: list[int] = []
    listed = lses = weights = lists = 0
    for unit, rows in zip(units, sizes, strict=True):
        candidates = candidate_blocks(plan, unit)
        count, chosen, first = candidates.size, int(plan.unit_blocks[unit]), int(plan.unit_rows[unit, 0])
        assert count <= MOST_CANDIDATES
        room, num_chunks = list_room(count, chosen), -(-count // CHUNK)
        scored = max(score_rows(tile_rows) // group, 1)
        part_rows = -(-rows // (scored * _MOST_PARTS)) * scored
        parts = range(0, rows, part_rows)
        choices.append([listed, count, kv_heads * chosen, room, len(parts), weights, lists, 0])
        for part, begin in enumerate(parts):
            taken = min(part_rows, rows - begin)
            for chunk in range(num_chunks):
                place = chunk * CHUNK
                chunks.append(
                    [
                        first + begin, taken, listed + place, min(CHUNK, count - place),
                        lses + begin * group * num_chunks, chunk, num_chunks,
                        weights + part * kv_heads * count + place, count, rows * group * num_chunks,
                    ]
                )  # fmt: skip
        mine = min(shares, max(chosen // _LEAST_SHARE, 1))
        for begin in range(0, rows, rows_per_tile):
            taken = min(rows_per_tile, rows - begin)
            tiles += [[first + begin, taken, lists, room, share, mine, 0, 0] for share in range(mine)]
            ranks += [int(plan.unit_rank[unit])] * mine
        blocks.append(candidates)
        listed += count
        lses += kv_heads * rows * group * num_chunks
        weights += len(parts) * kv_heads * count
        lists += kv_heads * (1 + room)
    return BlockWork(
        blocks=np.concatenate([np.empty(0, np.int64), *blocks]),
        choices=np.array(choices, np.int64).reshape(-1, 8),
        chunks=np.array(chunks, np.int64).reshape(-1, 10),
        tiles=np.array(tiles, np.int64).reshape(-1, 8),
        ranks=np.array(ranks, np.int64),
        sizes=BlockSizes(lses, weights, lists, max((part.size for part in blocks), default=0)),
    )
