"""The engine's `Model` over onnxruntime: runs an exported decoder step on the CPU."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixgen.core import InvalidRequest, Plan, RadixgenError, Window
from radixgen.kernels.unit_groups import UnitTables, lay_out_groups
from radixgen.model.onnx_step import METADATA, MODEL_FILE, StepDescription


class OnnxModel:
    """A decoder step that `radixgen.model.onnx_export` wrote, with its KV pool.

    The pool's memory is both input and output of the step, which writes it in place.
    """

    def __init__(self, folder: str | Path, max_model_len: int | None = None) -> None:
        """`max_model_len`: at most that of the export, the default. Raises `InvalidRequest` and `RadixgenError`."""
        self._session = _open(Path(folder).expanduser() / MODEL_FILE)
        metadata = self._session.get_modelmeta().custom_metadata_map
        if METADATA not in metadata:
            raise InvalidRequest("model", str(folder), "holds an ONNX file that radixgen has not exported")
        self.step = StepDescription.from_json(metadata[METADATA])
        self.name = f"{self.step.name} over onnxruntime"
        self.vocab_size = self.step.vocab_size
        self.max_model_len = max_model_len or self.step.max_model_len
        if self.max_model_len > self.step.max_model_len:
            limit = f"must be at most {self.step.max_model_len}, as exported"
            raise InvalidRequest("max_model_len", max_model_len, limit)
        self.eos_token_ids = frozenset(self.step.eos_token_ids)
        floats = [heads * (size + v_size) for heads, size, v_size in self.step.layers]
        self.kv_bytes_per_token = 4 * sum(floats)
        self.kv_bytes_read = 0
        self.kv_bytes_unshared = 0
        self._window_bytes: Counter[Window | None] = Counter()
        for window, size in zip(self.step.windows, floats, strict=True):
            self._window_bytes[window] += 4 * size
        self._pool: list[NDArray[np.float32]] = []

    def allocate(self, slots: int) -> None:
        self._slots = slots
        layers = self.step.layers  # one slot more: rows whose KV exists write there
        shapes = [(h * (slots + 1), k) for h, k, _ in layers] + [(h * (slots + 1), v) for h, _, v in layers]
        self._pool = [np.zeros(shape, np.float32) for shape in shapes]
        self._binding = self._session.io_binding()
        for inside, outside, pool in zip(self.step.pool_names(), self.step.pool_names("new_"), self._pool, strict=True):
            self._binding.bind_input(inside, "cpu", 0, np.float32, pool.shape, pool.ctypes.data)
            self._binding.bind_output(outside, "cpu", 0, np.float32, pool.shape, pool.ctypes.data)

    def run(
        self, plan: Plan, token_ids: NDArray[np.int64], slots: NDArray[np.int64], logit_rows: NDArray[np.int64]
    ) -> Tensor:
        """As `Model.run`. Raises `InvalidRequest` for a step beyond the bounds of the export."""
        if plan.selects:
            raise InvalidRequest("reading", "TopBlocks", f"{self.name} reads all keys of a unit")
        inputs = self._inputs(plan, token_ids, slots, logit_rows)
        for name, array in inputs.items():
            self._binding.bind_cpu_input(name, array)
        logits = np.empty((logit_rows.size, self.vocab_size), np.float32)
        self._binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self._session.run_with_iobinding(self._binding)
        return torch.from_numpy(logits)

    def _inputs(
        self, plan: Plan, token_ids: NDArray[np.int64], slots: NDArray[np.int64], logit_rows: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        """Return the inputs of a step besides the pool, and count the bytes that it reads."""
        self.step.bounds.check("rows", plan.num_rows, self.step.bounds.rows)
        inputs: dict[str, NDArray[Any]] = {
            "token_ids": np.ascontiguousarray(token_ids),
            "positions": plan.row_positions.astype(np.int64),
            "logit_rows": np.ascontiguousarray(logit_rows),
            "write_slots": np.where(slots < 0, self._slots, slots),
        }
        for index, window in enumerate(self.step.distinct_windows):
            seen = plan.within(window)
            tables = lay_out_groups(seen, self.step.bounds.groups)
            self._check(tables)
            self.kv_bytes_read += tables.kv_tokens_read * self._window_bytes[window]
            self.kv_bytes_unshared += seen.kv_tokens_unshared * self._window_bytes[window]
            inputs[f"partials_{index}"] = tables.partials
            for number, group in enumerate(tables.groups):
                inputs[f"unit_rows_{index}_{number}"] = group.rows
                inputs[f"unit_slots_{index}_{number}"] = group.slots
                inputs[f"unit_bias_{index}_{number}"] = group.bias
        return inputs

    def _check(self, tables: UnitTables) -> None:
        bounds = self.step.bounds
        units = max(tables.partials.shape[1], *(group.rows.shape[0] for group in tables.groups))
        bounds.check("units", units, bounds.units)
        bounds.check("keys", max(group.slots.shape[1] for group in tables.groups), bounds.keys)

    def release(self) -> None:
        self._pool.clear()
        self._binding = None


def open_exported(folder: str | Path, max_model_len: int | None, options: Mapping[str, object]) -> OnnxModel:
    """Return the model that `radixgen export` has written to `folder`. Raises `InvalidRequest` for any of the engine's
    `options` that it does not have.
    """
    allowed = {"dtype": ("auto", "float32", torch.float32), "device": ("auto", "cpu"), "tensor_parallel_size": (1,)}
    for field, value in options.items():
        if value not in allowed.get(field, ("auto",)):
            first = allowed.get(field, ("auto",))[0]
            raise InvalidRequest(
                field, value, f"must be {first}: an exported model runs as it was exported, on the CPU"
            )
    return OnnxModel(folder, max_model_len)


def _open(path: Path) -> Any:
    """Return an onnxruntime session on PyTorch's number of threads."""
    try:
        import onnxruntime
    except ImportError as error:
        raise RadixgenError("onnxruntime not installed: pip install 'radixgen[onnx]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise InvalidRequest("model", str(path), f"cannot be loaded by onnxruntime: {error}") from error
