"""Warm-up steps, run before any request, so that no later step is the first of its kind.

Their rows are in leaves below one trunk, or in a chain. They read the first slots of the pool, whatever these contain,
and write no KV.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from radixgen.core import Plan
from radixgen.core.plan import Int32Array
from radixgen.model.graphs import FEW_LOGITS, bucket, buckets
from radixgen.scheduler.cost import CostModel
from radixgen.scheduler.forest import Forest
from radixgen.scheduler.planner import PlanMode, plan

_TRUNK, _KEYS = 256, 191
"""Keys of the trunk and of a leaf: both have whole blocks, and a leaf has an incomplete one."""
_ROWS_OF_A_LEAF = 16
"""In prefill steps."""
_MOST_PARTIALS = 64
"""Partial results per row that the merge kernel combines at once."""
_FEW_ROWS = (1, 2, 15, 16, 100)
"""Row counts beyond those of graphs that `torch.compile` specializes on: one, few, and multiples of 16."""
_MOST_LOGITS = 1024


class WarmUpStep(NamedTuple):
    """A step that is run only to compile or capture its kind."""

    rows: int
    num_logits: int
    """Number of rows that give logits, the first ones."""
    cost: CostModel
    """The only cost model to plan with, so that the step is launched like plans of this model."""
    depth: int = 1
    """If above 1, the length of a chain of nodes with one row each, every one a unit of its own."""

    def plan(self, slots: int, max_model_len: int) -> Plan:
        """Plan the step within the first `slots` slots, with paths of at most `max_model_len`."""
        chain = self.depth > 1
        forest, nodes, positions = _chain(self.depth) if chain else self._comb(min(slots, max_model_len))
        mode: PlanMode = "naive" if chain or self.num_logits == self.rows else "auto"
        return plan(forest, nodes, positions, mode=mode, cost=self.cost)

    def _comb(self, size: int) -> tuple[Forest, Int32Array, Int32Array]:
        """Leaves with equal rows below a trunk, with room to grow, and at most `size` keys per path."""
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
    """Yield one step of each kind.

    For each of `costs`: the largest step, of `max_rows`; one for each graph of up to `graph_rows` rows and `max_logits`
    logits; and some small ones. For the merge kernel: chains of up to `max_depth` nodes.

    The largest come first, so that later steps reuse their memory. But the first graph is the smallest, because if that
    fails, no graphs are captured.
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
    """A chain of nodes with one key and one row each."""
    ids, ones = np.arange(depth, dtype=np.int32), np.ones(depth, np.int32)
    return Forest(ids - 1, ids, ones, np.arange(depth + 1), np.zeros(depth, np.int64), ones), ids, ids
