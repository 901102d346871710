"""What attention costs on a machine: the planner's choices follow from it and from nothing else."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from radixgen.core.compiled import compiled

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TileCost:
    """A class of tiles: what one program of its launch takes for one unit of at most `rows` rows, against any number of
    keys, for one KV head.
    """

    rows: int
    """Rows of the tree times the query heads that share a KV head."""
    unit: float
    key: float
    """That all rows of the tile see"""
    mixed: float | None = None
    """A key that only some rows of the tile see, or that lies in a short extent; as much as `key` by default"""
    programs: int = 0
    """That run at the same time in the launch of this class; as many as the cost model's by default"""


@dataclass(frozen=True, slots=True)
class CostModel:
    """What a plan costs, in microseconds of one of `programs` that run at the same time; on a CPU in any unit. A tile
    of a class with half as many programs takes two of them.

    A plan costs, for each KV head, the sum of

    - `tile.unit + keys * tile.key` over its units, of the cheapest class that holds the unit's rows, and `tile.mixed`
      for keys that only some of these rows see;
    - `partial` for each query head's row of each partial result: a row covered by one unit has none, one covered by
      `k > 1` has `k`;
    and takes `merge` longer where there are partials at all, and `launch` longer for each class below that of its
    widest tiles. It takes no less than `first_key` for each distinct key and the least `tile.key` for each time that
    one is read again: neither hides behind the other, because all programs go from the root down at the same time.

    The default suits PyTorch on a CPU at head_dim 64, in keys read: a unit costs an operator's dispatch, a partial its
    write, read and merge.
    """

    tiles: tuple[TileCost, ...] = (TileCost(rows=128, unit=64.0, key=1.0),)
    """Ascending by rows."""
    partial: float = 4.0
    first_key: float = 0.0
    group: int = 1
    """Query heads that share a KV head."""
    kv_heads: int = 1
    programs: int = 1
    merge: float = 0.0
    least_run: int = 0
    """Keys of an extent, from which they cost `tile.key` where all rows see them."""
    launch: float = 0.0
    """Of each launch but the first: there is one for each class of tiles, the widest first"""
    mix: bool = False
    """Whether one unit may hold rows that see different keys: whole subtrees in one tile, under a mask."""

    def reads(self, unique: int, keys: int) -> float:
        """How long it takes at least to read so many keys, `unique` distinct ones, all programs together."""
        again = float(self.columns()[1][1].min()) * max(keys - unique, 0)
        return (self.first_key * unique + again) * self.kv_heads / self.programs

    @property
    def mixed_weight(self) -> int:
        """Keys that all rows of a tile see, to which a mixed key comes, at the most and about."""
        return max([1, *(round(t.mixed / t.key) for t in self.tiles if t.mixed is not None and t.key)])

    @property
    def usable(self) -> list[TileCost]:
        """The classes that hold a row at all."""
        usable = [tile for tile in self.tiles if tile.rows >= self.group]
        if not usable:
            raise ValueError(f"no tile of {self.tiles} holds a group of {self.group} heads")
        return usable

    def programs_of(self, tile: TileCost) -> int:
        """That run at the same time in the launch of this class."""
        return tile.programs or self.programs

    def columns(self) -> tuple[NDArray[np.int64], Floats]:
        """Rows of the tree `[classes]`, and cost of a unit, a key and a mixed key `[3, classes]`, of each usable
        class.
        """
        usable = self.usable
        prices = np.array([(t.unit, t.key, t.key if t.mixed is None else t.mixed) for t in usable], np.float64)
        shares = np.array([self.programs / self.programs_of(tile) for tile in usable])
        return np.array([tile.rows // self.group for tile in usable], np.int64), (prices.T * shares).copy()

    def classes(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which usable class answers units of so many rows of the tree, `[units]`: the narrowest that holds them."""
        most = self.columns()[0]
        return np.minimum(np.searchsorted(most, rows), most.size - 1)

    def unit_costs(self, rows: NDArray[np.int64], keys: NDArray[np.int64], mixed: NDArray[np.int64]) -> Floats:
        """What units cost, each in the cheapest class that holds its rows, inf where none does; `[units]` rows, keys,
        and how many of the keys are mixed.
        """
        units = np.stack([rows, keys, mixed], axis=1).astype(np.int64, copy=False)
        return _unit_costs(units, *self.columns())


@compiled
def _unit_costs(units: NDArray[np.int64], tile_rows: NDArray[np.int64], prices: NDArray[np.float64]) -> Floats:
    costs = np.full(len(units), np.inf)
    for unit in range(len(units)):
        rows, keys, mixed = units[unit]
        for kind in range(tile_rows.size):
            if rows <= tile_rows[kind]:
                cost = prices[0, kind] + (keys - mixed) * prices[1, kind] + mixed * prices[2, kind]
                costs[unit] = min(costs[unit], cost)
    return costs
