"""How much attention of a row goes to keys that a plan leaves out."""

import numpy as np
import torch
from torch import Tensor

from radixgen.core import Plan
from radixgen.kernels.torch_blocks import unread_share
from radixgen.kernels.upload import upload
from radixgen.model.layer_call import LayerCall
from radixgen.model.runner import ModelRunner


def unread_attention(runner: ModelRunner, exact: Plan, sparse: Plan, token: int) -> Tensor:
    """Return the share of attention in keys that `exact` reads and `sparse` does not, from 0 to 1: float32 `[layers,
    q_heads]`.

    Both plans have one and the same row, of `token`, whose KV is stored already. Its queries are those of exact
    reading in every layer.
    """
    measured = _MeasuredAttention(runner, exact, sparse)
    row = np.zeros(1, np.int64)
    runner.storage.prepare(sparse, row - 1)
    ids, positions, rows = (upload(array, runner.device) for array in (row + token, exact.row_positions + row, row))
    runner.model.forward(ids, positions, rows, measured)
    return torch.stack(measured.shares)


class _MeasuredAttention:
    """Reads exactly, and keeps what the other plan leaves out of each layer."""

    def __init__(self, runner: ModelRunner, exact: Plan, sparse: Plan) -> None:
        self._runner = runner
        self._exact = exact
        self._sparse = sparse
        self.shares: list[Tensor] = []
        """`[q_heads]` of each layer."""

    def __call__(self, call: LayerCall) -> tuple[Tensor, Tensor]:
        out, every = self._attend(self._exact, call)
        _, read = self._attend(self._sparse, call)
        self.shares.append(unread_share(read[0], every[0]).clamp_min(0.0))
        return out, every

    def _attend(self, plan: Plan, call: LayerCall) -> tuple[Tensor, Tensor]:
        runner = self._runner
        attention = runner.backend.attention(plan, call.window, call.q.device)
        k, v = runner.storage.keys[call.layer], runner.storage.values[call.layer]
        bounds = runner.storage.bounds.of(call.layer)
        return attention(call.q, k, v, call.scale, call.softcap, call.sinks, bounds)
