"""Splitting long units along their keys, so that all programs are done at about the same time."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from radixgen.core.plan import Int64Array
from radixgen.kernels.schedule import makespan
from radixgen.scheduler.cost import CostModel

Floats = NDArray[np.float64]

LEAST_KEYS = 64
"""A unit of no more keys is not split."""
ENOUGH = 1.15
"""Times the makespan that no balance could beat."""
_SHARES = (1.0, 0.5, 0.25, 0.125)


class Balance(NamedTuple):
    """Units split so that the modelled time is least."""

    limits: Int64Array
    """`[units]`: how many keys one piece may have, a multiple of 64; 0 where the unit stays whole"""
    time: float
    """When the last program is done, merging included"""


def balance(units: Int64Array, num_rows: int, unique: int, cost: CostModel) -> Balance:
    """Split units `[units, 9]` (of `radixgen.scheduler.partition.collect`) over `num_rows` rows and `unique` keys.

    Limits from a program's fair share down to an eighth of it are tried, each split charged with its partials, until
    the makespan is within 1.15 of what no balance could beat; the best is taken.
    """
    rows, keys, mixed = units[:, 1] - units[:, 0], units[:, 7], units[:, 8]
    costs = cost.unit_costs(rows, keys, mixed)
    least = makespan(np.repeat(costs, cost.kv_heads), cost.programs)
    floor = cost.first_key * unique * cost.kv_heads / cost.programs
    whole = int(rows.sum()) == num_rows
    best = Balance(np.zeros(len(units), np.int64), max(least, floor) + (0.0 if whole else cost.merge))
    if cost.programs == 1 or not len(units):
        return best
    share = max(float(costs.sum()) * cost.kv_heads / cost.programs, floor)
    fixed = float(costs[keys <= LEAST_KEYS].max(initial=0.0))
    for part in _SHARES:
        if least <= ENOUGH * max(share, fixed):
            break
        limits = _limits(costs, keys, part * share)
        pieces, split = _split_costs(rows, keys, mixed, limits, cost)
        least = makespan(np.repeat(np.repeat(split, pieces), cost.kv_heads), cost.programs)
        if max(least, floor) + cost.merge < best.time:
            best = Balance(limits, max(least, floor) + cost.merge)
    return best


def _limits(costs: Floats, keys: Int64Array, longest: float) -> Int64Array:
    """Even pieces that cost about `longest` or less."""
    pieces = np.maximum(np.ceil(costs / max(longest, 1e-9)), 1)
    limits = (np.ceil(keys / pieces / LEAST_KEYS) * LEAST_KEYS).astype(np.int64)
    return np.where((pieces > 1) & (limits < keys), limits, 0)


def _split_costs(
    rows: Int64Array, keys: Int64Array, mixed: Int64Array, limits: Int64Array, cost: CostModel
) -> tuple[Int64Array, Floats]:
    """How many pieces each unit has under its limit, and what one of them costs, partials included."""
    pieces = np.where(limits > 0, -(-keys // np.maximum(limits, 1)), 1)
    costs = cost.unit_costs(rows, np.where(limits > 0, limits, keys), mixed // pieces)
    return pieces, costs + np.where(pieces > 1, cost.partial * cost.group * rows, 0.0)
