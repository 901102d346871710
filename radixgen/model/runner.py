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
    """transformers' model behind the engine's `Model`: a `TreeModel`, its KV storage and an attention backend."""

    def __init__(self, model: TreeModel, attention: str, eos_token_ids: frozenset[int]) -> None:
        self.model = model
        self.name = model.name
        self.vocab_size = model.vocab_size
        self.max_model_len = model.max_model_len
        self.eos_token_ids = eos_token_ids
        self.kv_bytes_per_token = sum(shape.bytes_per_token for shape in model.layer_shapes)
        self.kv_bytes_read = 0
        self.kv_bytes_unshared = 0
        self._backend = backend_class(attention)
        self.allocate(0)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def allocate(self, slots: int) -> None:
        self.storage = KVStorage(self.model.layer_shapes, slots, self.model.device)

    def run(
        self,
        plan: Plan,
        token_ids: NDArray[np.int64],
        slots: NDArray[np.int64],
        logit_rows: NDArray[np.int64],
    ) -> Tensor:
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
        for shape, backend in zip(self.model.layer_shapes, step.layer_backends, strict=True):
            self.kv_bytes_read += backend.kv_tokens_read * shape.bytes_per_token
            self.kv_bytes_unshared += backend.kv_tokens_unshared * shape.bytes_per_token
        return logits

    def release(self) -> None:
        self.model.release()
        self.storage.keys.clear()
        self.storage.values.clear()


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
