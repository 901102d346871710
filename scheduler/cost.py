"""What attention costs on a machine: the planner's choices follow from it and from nothing else."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class TileCost:
    """A class of tiles: one unit of at most `rows` rows, against any number of keys, for one KV head."""

    rows: int
    """Rows of the tree times the query heads that share a KV head."""
    unit: float
    key: float


@dataclass(frozen=True, slots=True)
class CostModel:
    """What a plan costs, in microseconds of one of `programs` that run at the same time; on a CPU in any unit.

    A plan costs, for each KV head, the sum of

    - `tile.unit + keys * tile.key` over its units, of the cheapest class that holds the unit's rows;
    - `partial` for each query head's row of each partial result: a row covered by one unit has none, one covered by
      `k > 1` has `k`;
    - `first_key` for each distinct key: the same for every plan, and so of no weight in any choice.

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
    mix: bool = False
    """Whether one unit may hold rows that see different keys: whole subtrees in one tile, under a mask."""

    def columns(self) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        """Rows of the tree, cost of a unit and of a key, of each class that holds a row at all."""
        usable = [tile for tile in self.tiles if tile.rows >= self.group]
        if not usable:
            raise ValueError(f"no tile of {self.tiles} holds a group of {self.group} heads")
        return (
            np.array([tile.rows // self.group for tile in usable], np.int64),
            np.array([tile.unit for tile in usable], np.float64),
            np.array([tile.key for tile in usable], np.float64),
        )

    def unit_costs(self, rows: NDArray[np.int64], keys: NDArray[np.int64]) -> NDArray[np.float64]:
        """What units of so many rows and keys cost, each in the cheapest class that holds it; inf where none does."""
        costs = np.full(rows.size, np.inf)
        for tile_rows, unit, key in zip(*self.columns(), strict=True):
            costs = np.where(rows <= tile_rows, np.minimum(costs, unit + keys * key), costs)
        return costs
