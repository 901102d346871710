"""Assignment of work items to programs: longest first, each to the least loaded (Graham, 1969: at most 4/3 of the
optimum).
"""

import math

import numpy as np

from radixgen.core.compiled import compiled
from radixgen.core.plan import Float64Array, Int64Array


def assign(costs: Float64Array, programs: int) -> tuple[Int64Array, Int64Array]:
    """Assign items to programs: `offsets [programs + 1]` into `items`, longest first.

    Deterministic: items of equal cost keep their order.
    """
    order = np.argsort(-costs, kind="stable")
    owners, _ = _place(costs[order], np.zeros(programs))
    items = order[np.argsort(owners, kind="stable")]
    return np.searchsorted(np.sort(owners), np.arange(programs + 1)), items


@compiled
def makespan(
    costs: Float64Array, launches: Int64Array, programs: Int64Array, slowed: Float64Array, copies: int
) -> float:  # fmt: skip
    """Return when the last program finishes `copies` of each item, in the unit of the costs.

    Item `i` costs `costs[i]`, in the launch `launches[i]`, which has `programs[launches[i]]` programs. The last launch
    is first, and the programs of each of the others begin as those of the one before it end. `slowed` `[launches]`: the
    slowdown of items while all programs are busy, because of memory bandwidth; it falls with the number of busy
    programs, to 1.

    If copies and programs can be divided into equal shares, only one share is simulated.
    """
    shares = copies
    for launch in range(programs.size):
        shares = math.gcd(shares, programs[launch])
    loads, last = np.zeros(1), 0.0
    for launch in range(programs.size - 1, -1, -1):
        loads = _following(loads, programs[launch] // shares)
        mine = np.repeat(costs[launches == launch], copies // shares)
        if mine.size:
            ends = _place(-np.sort(-mine), loads)[1]
            loads = loads + _stretched(ends - loads, slowed[launch])
            last = max(last, loads.max())
    return last


@compiled
def _stretched(work: Float64Array, slowed: float) -> Float64Array:
    """Return when each program, `[programs]`, is done, if all begin together and are slowed as in `makespan`."""
    if slowed <= 1.0:
        return work
    times, now, done = np.empty_like(work), 0.0, 0.0
    for place, program in enumerate(np.argsort(work)):
        busy = work.size - place
        now += (work[program] - done) * max(busy * slowed / work.size, 1.0)
        times[program], done = now, work[program]
    return times


@compiled
def _following(loads: Float64Array, programs: int) -> Float64Array:
    """Return when each program of a launch can begin, `[programs]`, given the end times `loads` of the launch before
    it.
    """
    ends = np.arange(1, programs + 1) * loads.size
    return np.sort(loads)[-(-ends // programs) - 1]


@compiled
def _place(costs: Float64Array, loads: Float64Array) -> tuple[Int64Array, Float64Array]:
    """Return the program of each item, in the given order, and each program's load, starting from `loads`, ascending.

    Uses a heap of programs by load.
    """
    programs = loads.size
    heap = np.arange(programs)
    loads = loads.copy()
    owners = np.empty(costs.size, np.int64)
    for item in range(costs.size):
        program = heap[0]
        owners[item] = program
        loads[program] += costs[item]
        at = 0
        while 2 * at + 1 < programs:
            child = 2 * at + 1
            if child + 1 < programs:
                left, right = heap[child], heap[child + 1]
                if loads[right] < loads[left] or (loads[right] == loads[left] and right < left):
                    child += 1
            below = heap[child]
            if loads[program] < loads[below] or (loads[program] == loads[below] and program < below):
                break
            heap[at] = below
            at = child
        heap[at] = program
    return owners, loads
