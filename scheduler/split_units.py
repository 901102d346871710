"""Split long units along their keys, so that all programs finish at about the same time."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from radixgen.core.compiled import compiled
from radixgen.core.plan import Float64Array, Int64Array
from radixgen.kernels.assignment import makespan
from radixgen.scheduler.cost import CostModel
from radixgen.scheduler.tables import U_FIRST_ROW, U_KEYS, U_MIXED, U_STOP_ROW

LEAST_KEYS = 64
"""Units of at most this many keys are not split."""
ENOUGH = 1.15
"""Splitting stops at this multiple of the lower bound of the makespan."""
_SHARES = (1.0, 0.5, 0.25, 0.125)


class SplitUnits(NamedTuple):
    """Units split for the shortest predicted time."""

    limits: Int64Array
    """`[units]`: maximum keys of a piece, mixed keys weighted, a multiple of 64; 0 for units that are not split."""
    time: float
    """Predicted end of the last program, including all launches; at least the time to read all keys once."""


def split_units(units: Int64Array, num_rows: int, unique: int, cost: CostModel, to_beat: float = np.inf) -> SplitUnits:
    """Split units `[units, 9]` (of `radixgen.scheduler.partition.collect`) over `num_rows` rows and `unique` distinct
    keys.

    Tries limits from a program's fair share down to an eighth of it, charging each split with its partial results,
    until the makespan is within 1.15 of the lower bound, and returns the best. Tries nothing if even the lower bound
    exceeds `to_beat`.
    """
    rows = units[:, U_STOP_ROW] - units[:, U_FIRST_ROW]
    keys = units[:, U_KEYS] + (cost.mixed_weight - 1) * units[:, U_MIXED]
    classes, programs = cost.classes(rows), np.array([cost.programs_of(tile) for tile in cost.usable], np.int64)
    taken = (programs / cost.programs)[classes]
    partial = cost.partial * cost.group * taken
    costs = cost.unit_costs(rows, units[:, U_KEYS], units[:, U_MIXED]) * taken + partial * coverage(units, num_rows)[1]
    least_even, even, slowed = 0.0, 0.0, np.ones(programs.size)
    reading = cost.reads(unique, int(units[:, U_KEYS].sum()))
    for index in np.unique(classes):
        launched = classes == index
        read = int(units[launched, U_KEYS].sum())
        work = max(float(costs[launched].sum()) * cost.kv_heads / programs[index], 1e-9)
        longer = max(work, cost.reads(min(unique, read), read))
        slowed[index] = longer / work
        least_even, even, unique = least_even + work, even + longer, unique - min(unique, read)
    split_fixed = cost.launch * int(classes.max(initial=0)) + cost.merge
    whole_fixed = split_fixed - (cost.merge if int(rows.sum()) == num_rows else 0.0)
    whole = np.zeros(len(units), np.int64)
    if cost.programs == 1 or least_even + whole_fixed >= to_beat:
        return SplitUnits(whole, even + whole_fixed)
    longest = float(costs.max(initial=0.0))
    if longest <= (ENOUGH - 1) * even:
        return SplitUnits(whole, even + longest / 2 + whole_fixed)
    unit = np.array([tile.unit for tile in cost.usable])[classes]
    launches = classes, programs, slowed, cost.kv_heads
    return SplitUnits(*_fastest(costs, keys, partial * rows, unit, *launches, reading, even, whole_fixed, split_fixed))


@compiled
def _fastest(
    costs: Float64Array, keys: Int64Array, partials: Float64Array, unit: Float64Array, classes: Int64Array,
    programs: Int64Array, slowed: Float64Array, copies: int, reading: float, even: float, whole_fixed: float,
    split_fixed: float,
) -> tuple[Int64Array, float]:  # fmt: skip
    """Return the limits and the time of `split_units`.

    For each unit, `costs`, `keys` (mixed ones weighted), what its partial results and another piece cost, and its class
    `[units]`; for each class, `programs` and `slowed` as in `makespan`.
    """
    least = max(makespan(costs, classes, programs, slowed, copies), reading)
    best, shortest = np.zeros(keys.size, np.int64), least + whole_fixed
    fixed = 0.0
    for index in range(keys.size):
        if keys[index] <= LEAST_KEYS:
            fixed = max(fixed, costs[index])
    for part in _SHARES:
        if least <= ENOUGH * max(even, fixed):
            break
        limits = _limits(costs, keys, part * even)
        pieces = np.where(limits > 0, -(-keys // np.maximum(limits, 1)), 1)
        split = _pieces(costs, keys, limits, pieces, partials, unit)
        least = max(makespan(split, np.repeat(classes, pieces), programs, slowed, copies), reading)
        if least + split_fixed < shortest:
            best, shortest = limits, least + split_fixed
    return best, shortest


@compiled
def _pieces(
    costs: Float64Array, keys: Int64Array, limits: Int64Array, pieces: Int64Array, partials: Float64Array,
    unit: Float64Array,
) -> Float64Array:  # fmt: skip
    """Return the cost of every piece of every unit: proportional to its keys, plus `unit` and `partials` per piece."""
    split, made = np.empty(pieces.sum()), 0
    for index in range(keys.size):
        if pieces[index] == 1:
            split[made] = costs[index]
            made += 1
            continue
        by_key = (costs[index] - unit[index]) / max(keys[index], 1)
        fixed = unit[index] + partials[index]
        last = made + pieces[index] - 1
        split[made:last] = fixed + by_key * limits[index]
        split[last] = fixed + by_key * (keys[index] - limits[index] * (pieces[index] - 1))
        made = last + 1
    return split


@compiled
def coverage(ranges: NDArray[np.integer], num_rows: int) -> tuple[Int64Array, Int64Array]:
    """Count coverage by units with these rows `[units, 2]`.

    Returns the number of units that cover each row, `[rows]`, and the number of rows of each unit with partial results,
    because other units cover them too, `[units]`.
    """
    over, before = np.zeros(num_rows + 1, np.int64), np.zeros(num_rows + 1, np.int64)
    for unit in range(len(ranges)):
        over[ranges[unit, 0]] += 1
        over[ranges[unit, 1]] -= 1
    for row in range(num_rows):
        over[row + 1] += over[row]
        before[row + 1] = before[row] + (over[row] > 1)
    partials = np.empty(len(ranges), np.int64)
    for unit in range(len(ranges)):
        partials[unit] = before[ranges[unit, 1]] - before[ranges[unit, 0]]
    return over[:num_rows], partials


@compiled
def _limits(costs: Float64Array, keys: Int64Array, longest: float) -> Int64Array:
    """Return limits for equal pieces that cost at most about `longest`."""
    pieces = np.maximum(np.ceil(costs / max(longest, 1e-9)), 1)
    limits = (np.ceil(keys / pieces / LEAST_KEYS) * LEAST_KEYS).astype(np.int64)
    return np.where((pieces > 1) & (limits < keys), limits, 0)
