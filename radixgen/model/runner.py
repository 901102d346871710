"""One step on the device: packed rows in, logits out; per layer, write the new KV, then attend by the
plan.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixgen.cache.storage import KVStorage
from radixgen.calibration import cost_models
from radixgen.core import Plan
from radixgen.kernels import Attention, Backend, Writes, backend
from radixgen.model.packed import LayerCall, TreeModel
from radixgen.scheduler.cost import CostModel


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
        self._backend = backend(attention, model.device)
        self.costs: tuple[CostModel, ...] = ()
        if self._backend.name == "triton" and model.geometry is not None:
            self.costs = cost_models(model.device, model.geometry)
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
        step = _StepAttention(self.storage, self._backend, plan, self._backend.writes(slots, device))
        logits = self.model.forward(
            torch.from_numpy(token_ids).to(device),
            torch.from_numpy(plan.row_positions.astype(np.int64)).to(device),
            torch.from_numpy(logit_rows).to(device),
            step,
        )
        for shape, attention in zip(self.model.layer_shapes, step.layers, strict=True):
            self.kv_bytes_read += attention.kv_tokens_read * shape.bytes_per_token
            self.kv_bytes_unshared += attention.kv_tokens_unshared * shape.bytes_per_token
        return logits

    def release(self) -> None:
        self.model.release()
        self.storage.keys.clear()
        self.storage.values.clear()


class _StepAttention:
    """Answers every layer of one step."""

    def __init__(self, storage: KVStorage, backend: Backend, plan: Plan, writes: Writes) -> None:
        self.layers: list[Attention] = []
        self._storage = storage
        self._backend = backend
        self._plan = plan
        self._writes = writes
        self._by_window: dict[int | None, Attention] = {}

    def __call__(self, call: LayerCall) -> tuple[Tensor, Tensor]:
        k, v = self._storage.keys[call.layer], self._storage.values[call.layer]
        self._writes(call.k, call.v, k, v)
        if call.window not in self._by_window:
            self._by_window[call.window] = self._backend.attention(self._plan, call.window, call.q.device)
        attention = self._by_window[call.window]
        self.layers.append(attention)
        return attention(call.q, k, v, call.scale, call.softcap, call.sinks)
