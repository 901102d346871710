"""One step on the device: packed rows in, logits out; per layer, write the new KV, then attend by the
plan.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixgen.cache.storage import KVStorage
from radixgen.core import Plan
from radixgen.kernels import AttentionBackend, backend_class
from radixgen.model.packed import LayerCall, TreeModel


class ModelRunner:
    """A model and its KV storage. Counts the rows it computed and the KV bytes that attention read."""

    def __init__(self, model: TreeModel, slots: int, attention: str) -> None:
        self.model = model
        self.storage = KVStorage(model.layer_shapes, slots, model.device)
        self.computed_rows = 0
        self.logit_rows = 0
        self.kv_bytes_read = 0
        self.kv_bytes_unshared = 0
        self._backend = backend_class(attention)

    def run(
        self,
        plan: Plan,
        token_ids: NDArray[np.int64],
        slots: NDArray[np.int64],
        logit_rows: NDArray[np.int64],
    ) -> Tensor:
        """Compute the plan's rows: `token_ids` `[rows]`; `slots` `[rows]`, -1 where a row's KV exists
        already; `logit_rows` `[n]`. Returns float32 logits `[n, vocab]`.
        """
        device = self.model.device
        writes = np.flatnonzero(slots >= 0)
        step = _StepAttention(
            self.storage,
            self._backend,
            plan,
            torch.from_numpy(writes).to(device) if writes.size < slots.size else None,
            torch.from_numpy(slots[writes]).to(device),
        )
        logits = self.model.forward(
            torch.from_numpy(token_ids).to(device),
            torch.from_numpy(plan.row_positions.astype(np.int64)).to(device),
            torch.from_numpy(logit_rows).to(device),
            step,
        )
        self.computed_rows += plan.num_rows
        self.logit_rows += logit_rows.size
        for shape, backend in zip(self.model.layer_shapes, step.layer_backends, strict=True):
            self.kv_bytes_read += backend.kv_tokens_read * shape.bytes_per_token
            self.kv_bytes_unshared += backend.kv_tokens_unshared * shape.bytes_per_token
        return logits


class _StepAttention:
    """Answers every layer of one step."""

    def __init__(
        self,
        storage: KVStorage,
        backend: type[AttentionBackend],
        plan: Plan,
        write_rows: Tensor | None,
        write_slots: Tensor,
    ) -> None:
        self.layer_backends: list[AttentionBackend] = []
        self._storage = storage
        self._backend = backend
        self._plan = plan
        self._write_rows = write_rows
        self._write_slots = write_slots
        self._by_window: dict[int | None, AttentionBackend] = {}

    def __call__(self, call: LayerCall) -> tuple[Tensor, Tensor]:
        key, value = call.k, call.v
        if self._write_rows is not None:
            key, value = key[self._write_rows], value[self._write_rows]
        self._storage.write(call.layer, self._write_slots, key, value)
        if call.window not in self._by_window:
            self._by_window[call.window] = self._backend(self._plan, call.window, call.q.device)
        backend = self._by_window[call.window]
        self.layer_backends.append(backend)
        return backend(
            call.q,
            self._storage.keys[call.layer],
            self._storage.values[call.layer],
            call.scale,
            call.softcap,
        )
