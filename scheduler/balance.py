"""Splitting long units along their keys, so that all programs are done at about the same time."""

import numpy as np

from radixgen.core import Plan
from radixgen.core.plan import Int64Array
from radixgen.kernels.schedule import makespan
from radixgen.scheduler.cost import CostModel

LEAST_KEYS = 64
"""A unit of no more keys is not split."""
ENOUGH = 1.15
"""Times the makespan that no balance could beat."""
_SHARES = (1.0, 0.5, 0.25, 0.125)


def piece_limits(rows: Int64Array, keys: Int64Array, cost: CostModel) -> Int64Array:
    """How many keys one piece of each unit may have, `[units]`, a multiple of 64; 0 where the unit stays whole.

    rows and keys `[units]`. Limits from a program's fair share down to an eighth of it are tried, each split charged with
    its partials, until the modelled makespan is within 1.15 of what no balance could beat; the best is taken.
    """
    whole = np.zeros(rows.size, np.int64)
    if cost.programs == 1 or not rows.size:
        return whole
    costs = cost.unit_costs(rows, keys)
    share = costs.sum() * cost.kv_heads / cost.programs
    fixed = costs[keys <= LEAST_KEYS].max(initial=0.0)
    best, least = whole, makespan(np.repeat(costs, cost.kv_heads), cost.programs)
    for part in _SHARES:
        if least <= ENOUGH * max(share, fixed):
            break
        limits = _limits(costs, keys, part * share)
        pieces, split = split_costs(rows, keys, limits, cost)
        time = makespan(np.repeat(np.repeat(split, pieces), cost.kv_heads), cost.programs)
        if time < least:
            best, least = limits, time
    return best


def _limits(costs: np.ndarray, keys: Int64Array, longest: float) -> Int64Array:
    """Even pieces that cost about `longest` or less."""
    pieces = np.maximum(np.ceil(costs / longest), 1)
    limits = (np.ceil(keys / pieces / LEAST_KEYS) * LEAST_KEYS).astype(np.int64)
    return np.where((pieces > 1) & (limits < keys), limits, 0)


def split_costs(
    rows: Int64Array, keys: Int64Array, limits: Int64Array, cost: CostModel
) -> tuple[Int64Array, np.ndarray]:
    """How many pieces each unit has under its limit, and what one of them costs, partials included."""
    pieces = np.where(limits > 0, -(-keys // np.maximum(limits, 1)), 1)
    costs = cost.unit_costs(rows, np.where(limits > 0, limits, keys))
    return pieces, costs + np.where(pieces > 1, cost.partial * cost.group * rows, 0.0)


def predicted(plan: Plan, cost: CostModel) -> float:
    """When the last program is done with one layer, in the cost model's unit: what `plan` should take."""
    unique = int((plan.nodes.lengths * (plan.nodes.readers > 0)).sum())
    spread = cost.first_key * unique * cost.kv_heads / cost.programs
    return makespan(np.repeat(plan.unit_cost, cost.kv_heads), cost.programs) + spread
