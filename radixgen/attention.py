"""`TreeAttention`: exact attention over a tree of shared keys, for use in other code."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from radixgen.core import Chunk, InvalidRequest, Plan, Window
from radixgen.core.plan import Int32Array
from radixgen.kernels.backend import Attention, backend, check_backend
from radixgen.kernels.quantized import KV
from radixgen.scheduler.cost import CostModel
from radixgen.scheduler.forest import Forest
from radixgen.scheduler.planner import PlanMode, check_plan_mode, plan


class TreeAttention:
    """Attention of rows in a tree: each row sees the keys on its path from the root, up to its position.

    ```python
    attn = TreeAttention(parents=[-1, 0, 0], extents=[[(0, 900)], [(900, 7)], [(1024, 12)]], row_nodes=[1, 2])
    out, lse = attn(q, k, v)
    ```

    Planned on construction, called once per layer.
    """

    def __init__(
        self,
        parents: Sequence[int],
        extents: Sequence[Sequence[tuple[int, int]]],
        row_nodes: Sequence[int],
        row_positions: Sequence[int] | None = None,
        *,
        window: Window | None = None,
        softcap: float | None = None,
        attention: str = "auto",
        mode: PlanMode = "auto",
        cost: CostModel | None = None,
    ) -> None:
        """Plan the attention of rows in a tree.

        parents: each node's parent, -1 for a root. Parents come before their children.
        extents: each node's keys as runs of slots `(start, length)`, in order of position. A node may be empty.
        row_nodes: `[rows]`, each row's node.
        row_positions: `[rows]`, each row's position, counted from the root's first token, within the row's node.
            Default: the last position of the row's node.
        window: a row at position `p` sees only keys at positions `> p - window`; with `Chunk(size)`, only those from
            `p // size * size` on.
        softcap: scores become `softcap * tanh(score / softcap)`.
        attention: `"auto"`, or one of `radixgen.kernels.backend.BACKENDS`.
        mode: `"auto"`, `"unshared"` (every path is read separately), `"prefix"` (only a root's common prefix is
            shared), or `"naive"` (each node is a unit).
        cost: the cost model to plan by. Default: PyTorch on a CPU.

        Raises `InvalidRequest`.
        """
        check_plan_mode("mode", mode)
        if window is not None and (window.size if isinstance(window, Chunk) else window) < 1:
            raise InvalidRequest("window", window, "must be at least 1")
        forest = _forest(parents, extents)
        nodes = np.asarray(row_nodes, np.int32).reshape(-1)
        positions = _positions(forest, nodes, row_positions)
        self.plan: Plan = plan(forest, nodes, positions, mode=mode, cost=cost)
        self.window = window
        self.softcap = softcap
        check_backend(attention)
        self._attention = attention
        self._prepared: dict[torch.device, Attention] = {}
        self._num_slots = int((forest.extent_starts + forest.extent_lengths).max(initial=0))

    def __call__(
        self,
        q: Tensor,
        k: KV,
        v: KV,
        scale: float | None = None,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute attention of all rows, in the order given.

        q `[rows, q_heads, head_dim]`; k `[slots, kv_heads, head_dim]`; v `[slots, kv_heads, v_head_dim]`; `q_heads` is
        a multiple of `kv_heads`. k and v may be quantized (`radixgen.kernels.quantized.QuantizedKV`). `scale`: default
        `head_dim ** -0.5`. `sinks [q_heads]`: one logit per head that takes weight and has no value.

        Returns `out [rows, q_heads, v_head_dim]` in q's dtype and `lse [rows, q_heads]`, float32 (float64 for float64
        inputs), natural log, without sinks. A row that sees no key gives 0 and -inf. Raises `InvalidRequest`.
        """
        self._check_shapes(q, k, v)
        if q.shape[0] == 0:
            dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
            return q.new_empty((0, q.shape[1], v.shape[2])), q.new_empty((0, q.shape[1]), dtype=dtype)
        if q.device not in self._prepared:
            chosen = backend(self._attention, q.device).attention
            self._prepared[q.device] = chosen(self.plan, self.window, q.device)
        order = torch.from_numpy(self.plan.row_order).to(q.device)
        scale = q.shape[2] ** -0.5 if scale is None else scale
        out, lse = self._prepared[q.device](q[order], k, v, scale, self.softcap, sinks)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        return out[back], lse[back]

    def _check_shapes(self, q: Tensor, k: KV, v: KV) -> None:
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            if len(tensor.shape) != 3:
                raise InvalidRequest(f"{name}.shape", tuple(tensor.shape), "must have 3 dimensions")
        if q.shape[0] != self.plan.num_rows:
            raise InvalidRequest("q.shape[0]", q.shape[0], f"must be {self.plan.num_rows} rows")
        if k.shape[:2] != v.shape[:2] or k.shape[2] != q.shape[2]:
            limit = f"must agree with q {tuple(q.shape)} and v {tuple(v.shape)}"
            raise InvalidRequest("k.shape", tuple(k.shape), limit)
        if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
            limit = f"must be a multiple of {k.shape[1]} kv heads"
            raise InvalidRequest("q_heads", q.shape[1], limit)
        if k.shape[0] < self._num_slots:
            raise InvalidRequest("slots", k.shape[0], f"must be at least {self._num_slots}")


def _forest(parents: Sequence[int], extents: Sequence[Sequence[tuple[int, int]]]) -> Forest:
    above = np.asarray(parents, np.int32).reshape(-1)
    if len(extents) != above.size:
        raise InvalidRequest("len(extents)", len(extents), f"must be {above.size}, as many as parents")
    if ((above < -1) | (above >= np.arange(above.size))).any():
        raise InvalidRequest("parents", list(parents), "must be -1 or an earlier node")
    flat = np.array([run for runs in extents for run in runs], np.int64).reshape(-1, 2)
    if (flat < 0).any():
        raise InvalidRequest("extents", flat[(flat < 0).any(1)][0].tolist(), "must not be negative")
    counts = np.array([len(runs) for runs in extents], np.int64)
    owner = np.repeat(np.arange(above.size), counts)
    lengths = np.bincount(owner, weights=flat[:, 1], minlength=above.size).astype(np.int64)
    starts = np.zeros(above.size, np.int64)
    for node, parent in enumerate(above.tolist()):
        if parent >= 0:
            starts[node] = starts[parent] + lengths[parent]
    if (starts + lengths).max(initial=0) > np.iinfo(np.int32).max:
        raise InvalidRequest("extents", int((starts + lengths).max()), "a path holds at most 2^31-1 keys")
    return Forest(
        parents=above,
        starts=starts.astype(np.int32),
        lengths=lengths.astype(np.int32),
        extent_offsets=np.concatenate([[0], np.cumsum(counts)]),
        extent_starts=flat[:, 0],
        extent_lengths=flat[:, 1].astype(np.int32),
    )


def _positions(forest: Forest, nodes: Int32Array, given: Sequence[int] | None) -> Int32Array:
    if nodes.size and (nodes.min() < 0 or nodes.max() >= forest.parents.size):
        raise InvalidRequest("row_nodes", nodes.tolist(), f"must be below {forest.parents.size}")
    first = forest.starts[nodes]
    last: Int32Array = first + forest.lengths[nodes] - 1
    if given is None:
        return last
    positions: Int32Array = np.asarray(given, np.int32).reshape(-1)
    if positions.size != nodes.size:
        raise InvalidRequest("len(row_positions)", positions.size, f"must be {nodes.size} rows")
    outside = (positions < first) | (positions > last)
    if outside.any():
        row = int(np.flatnonzero(outside)[0])
        limit = f"row {row} must stand inside its node, from {first[row]} to {last[row]}"
        raise InvalidRequest("row_positions", int(positions[row]), limit)
    return positions
