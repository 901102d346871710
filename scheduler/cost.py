"""Cost model of attention on a device, by which the planner chooses."""

from dataclasses import dataclass

import numpy as np

from radixgen.core.compiled import compiled
from radixgen.core.plan import Float64Array, Int64Array


@dataclass(frozen=True, slots=True)
class TileCost:
    """Cost of a class of tiles: the time of one program for one unit of at most `rows` rows, per KV head."""

    rows: int
    """Rows of the tree times query heads per KV head."""
    unit: float
    key: float
    """Per key that all rows of the tile see."""
    mixed: float | None = None
    """Per key that only some rows see, or in a short extent. Default: `key`."""
    programs: int = 0
    """Programs that run concurrently in this class's launch. Default: the cost model's."""


@dataclass(frozen=True, slots=True)
class CostModel:
    """Cost of a plan in microseconds of one of `programs` concurrent programs; on a CPU in any unit.

    A tile of a class with half as many programs counts twice. The cost of a plan per KV head is the sum of

    - `tile.unit + keys * tile.key` over its units, in the cheapest class that holds the unit's rows, with `tile.mixed`
      for keys that only some of the rows see;
    - `partial` for each query head's row of each partial result: a row covered by one unit has none, a row covered by
      `k > 1` units has `k`.

    The time is longer by `merge` if there are partial results, and by `launch` for each class below the widest in use.
    It is at least `first_key` for each distinct key plus the smallest `tile.key` for each repeated read. The two do not
    overlap, because all programs move down from the root at the same time.

    The default suits PyTorch on a CPU with head_dim 64, in units of keys read: a unit costs the dispatch of an
    operator, and a partial result its write, read and merge.
    """

    tiles: tuple[TileCost, ...] = (TileCost(rows=128, unit=64.0, key=1.0),)
    """Ascending by rows."""
    partial: float = 4.0
    first_key: float = 0.0
    group: int = 1
    """Query heads per KV head."""
    kv_heads: int = 1
    programs: int = 1
    merge: float = 0.0
    least_run: int = 0
    """Minimum keys of an extent to cost `tile.key` each if all rows see them."""
    launch: float = 0.0
    """For each launch but the first. There is one launch per class of tiles, widest first."""
    mix: bool = False
    """Whether a unit may hold rows that see different keys: entire subtrees in one tile, with a mask."""

    def reads(self, unique: int, keys: int) -> float:
        """Return the minimum time to read `keys` keys, `unique` of them distinct, with all programs."""
        again = float(self.columns()[1][1].min()) * max(keys - unique, 0)
        return (self.first_key * unique + again) * self.kv_heads / self.programs

    @property
    def mixed_weight(self) -> int:
        """Maximum cost of a mixed key relative to a key that all rows see, rounded."""
        return max([1, *(round(t.mixed / t.key) for t in self.tiles if t.mixed is not None and t.key)])

    @property
    def usable(self) -> list[TileCost]:
        """Classes that hold at least one row."""
        usable = [tile for tile in self.tiles if tile.rows >= self.group]
        if not usable:
            raise ValueError(f"no tile of {self.tiles} holds a group of {self.group} heads")
        return usable

    def programs_of(self, tile: TileCost) -> int:
        """Return the number of concurrent programs in the launch of this class."""
        return tile.programs or self.programs

    def columns(self) -> tuple[Int64Array, Float64Array]:
        """Return rows of the tree `[classes]`, and costs of a unit, a key and a mixed key `[3, classes]`, of usable
        classes.
        """
        usable = self.usable
        prices = np.array([(t.unit, t.key, t.key if t.mixed is None else t.mixed) for t in usable], np.float64)
        shares = np.array([self.programs / self.programs_of(tile) for tile in usable])
        return np.array([tile.rows // self.group for tile in usable], np.int64), (prices.T * shares).copy()

    def classes(self, rows: Int64Array) -> Int64Array:
        """Return the usable class for units of these numbers of rows, `[units]`: the narrowest that holds them."""
        most = self.columns()[0]
        return np.minimum(np.searchsorted(most, rows), most.size - 1)

    def unit_costs(self, rows: Int64Array, keys: Int64Array, mixed: Int64Array) -> Float64Array:
        """Return the cost of units in the cheapest class that holds their rows, inf if none does.

        `rows`, `keys` and `mixed` `[units]`; `mixed`: how many of `keys` are mixed keys.
        """
        units = np.stack([rows, keys, mixed], axis=1).astype(np.int64, copy=False)
        return _unit_costs(units, *self.columns())


@compiled
def _unit_costs(units: Int64Array, tile_rows: Int64Array, prices: Float64Array) -> Float64Array:
    costs = np.full(len(units), np.inf)
    for unit in range(len(units)):
        rows, keys, mixed = units[unit]
        for kind in range(tile_rows.size):
            if rows <= tile_rows[kind]:
                cost = prices[0, kind] + (keys - mixed) * prices[1, kind] + mixed * prices[2, kind]
                costs[unit] = min(costs[unit], cost)
    return costs
