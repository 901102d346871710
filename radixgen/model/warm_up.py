"""Steps that are run before anybody waits for one, so that no later step is the first of its kind.

Their rows stand in leaves below one trunk, or one below the other, and read the first slots of the pool, whatever these
hold; they write no KV.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from radixgen.core import Plan
from radixgen.core.plan import Int32Array
from radixgen.model.graphs import FEW_LOGITS, bucket, buckets
from radixgen.scheduler.cost import CostModel
from radixgen.scheduler.planner import Forest, PlanMode, plan

_TRUNK, _KEYS = 256, 191
"""Keys of the trunk and of a leaf: both have whole blocks, and a leaf has keys besides."""
_ROWS_OF_A_LEAF = 16
"""Where a step is one of prefilling"""
_MOST_PARTIALS = 64
"""Of a row, that the kernels merge at once"""
_FEW_ROWS = (1, 2, 15, 16, 100)
"""Beyond those of graphs: what is compiled for any number of rows is compiled anew for one, few and multiples of 16."""
_MOST_LOGITS = 1024


class WarmUpStep(NamedTuple):
    """One step that is run for its kind alone."""

    rows: int
    num_logits: int
    """Rows that give logits, the first ones"""
    cost: CostModel
    """The only one that it is planned by, so that it is launched as this one's plans are"""
    depth: int = 1
    """Where it is above 1, of a chain of nodes with a row each, and each of these a unit of its own"""

    def plan(self, slots: int, max_model_len: int) -> Plan:
        """The step's plan, of paths that are no longer than `max_model_len`, in the first `slots` slots."""
        chain = self.depth > 1
        forest, nodes, positions = _chain(self.depth) if chain else self._comb(min(slots, max_model_len))
        mode: PlanMode = "naive" if chain or self.num_logits == self.rows else "auto"
        return plan(forest, nodes, positions, mode=mode, cost=self.cost)

    def _comb(self, size: int) -> tuple[Forest, Int32Array, Int32Array]:
        """Leaves with equal rows below a trunk, with room to grow, none with more than `size` keys on its path."""
        keys = max(min(_KEYS, size // 2), 1)
        trunk = min(_TRUNK, size - keys)
        room = min(_KEYS, size - keys - trunk)
        each = 1 if self.num_logits == self.rows else min(_ROWS_OF_A_LEAF, keys)
        leaves, row = -(-self.rows // each), np.arange(self.rows, dtype=np.int32)
        above = np.array([-1] + [0] * leaves, np.int32)
        lengths = np.where(above < 0, trunk, keys).astype(np.int32)
        forest = Forest(
            parents=above,
            starts=np.where(above < 0, 0, trunk).astype(np.int32),
            lengths=lengths,
            extent_offsets=np.arange(leaves + 2) if trunk else np.maximum(np.arange(leaves + 2) - 1, 0),
            extent_starts=np.zeros(leaves + (trunk > 0), np.int64),
            extent_lengths=lengths[lengths > 0],
            rooms=np.where(above < 0, 0, room).astype(np.int32),
        )
        return forest, row // each + 1, (trunk + keys - each + row % each).astype(np.int32)


def warm_up_steps(
    costs: Sequence[CostModel], *, max_rows: int, graph_rows: int, max_logits: int, max_depth: int
) -> Iterator[WarmUpStep]:
    """Of each kind one: for each of `costs` the largest step, of `max_rows`, one for each graph of up to `graph_rows`
    rows and `max_logits` logits, and some small ones; and for the launch that merges, chains of up to `max_depth`
    nodes.

    The largest come first, so that the memory of one serves the next; but the first of all graphs is the smallest,
    because where that fails, none is made.
    """
    for cost in costs:
        yield WarmUpStep(max_rows, min((max_rows - 1) // 2, _MOST_LOGITS), cost)
    sizes = [size for size in buckets(graph_rows) if size <= max_rows]
    for size in sizes[:1] + sizes[:0:-1]:
        for logits in sorted({size, min(size, FEW_LOGITS)}, reverse=True):
            if logits <= max(bucket(max_logits), FEW_LOGITS):
                for cost in costs:
                    yield WarmUpStep(size, logits, cost)
    for rows in (graph_rows + few for few in _FEW_ROWS):
        if rows <= max_rows:
            for cost in costs:
                yield WarmUpStep(rows, (rows - 1) // 2, cost)
    depth = 2
    while depth <= min(_MOST_PARTIALS, max_rows, max_depth):
        yield WarmUpStep(depth, 0, costs[0], depth)
        depth *= 2


def _chain(depth: int) -> tuple[Forest, Int32Array, Int32Array]:
    """Nodes of one key, one below the other, with a row in each."""
    ids, ones = np.arange(depth, dtype=np.int32), np.ones(depth, np.int32)
    return Forest(ids - 1, ids, ones, np.arange(depth + 1), np.zeros(depth, np.int64), ones), ids, ids
