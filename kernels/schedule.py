"""Work items onto programs: longest first, each onto the least loaded."""

import numpy as np
from numpy.typing import NDArray


def assign(costs: NDArray[np.floating], programs: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which items each program answers: `offsets [programs + 1]` into `items`, both int64.

    In rounds of one item a program, the longest to the least loaded (Graham's rule by rounds); equal costs keep
    their order. Deterministic.
    """
    order = np.argsort(-costs, kind="stable")
    loads = np.zeros(programs)
    owner = np.empty(costs.size, np.int64)
    for begin in range(0, costs.size, programs):
        batch = order[begin : begin + programs]
        least = np.argsort(loads, kind="stable")[: batch.size]
        owner[batch] = least
        loads[least] += costs[batch]
    items = order[np.argsort(owner[order], kind="stable")]
    return np.searchsorted(owner[items], np.arange(programs + 1)), items
