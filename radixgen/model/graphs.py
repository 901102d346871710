"""CUDA graphs of the forward pass, captured per number of rows and logits, and replayed for any plan.

Everything that a captured pass reads has a fixed address: token ids, positions, slots, rows of logits, and the tables
of a `StaticAttention`. A step fills these and replays. If only lengths grew, the tables stay unchanged.
"""

from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixgen.cache.storage import KVStorage
from radixgen.core import Plan, Window
from radixgen.kernels.backend import AttentionBackend, StaticAttention
from radixgen.kernels.upload import Staging
from radixgen.kernels.workspace import Workspace
from radixgen.model.layer_call import LayerCall
from radixgen.model.tree_model import TreeModel

Agree = Callable[[bool], bool]
"""Returns whether all ranks of a sharded model succeeded; each passes whether it did itself."""

_FINE, _COARSE = 256, 1024
"""Row counts of graphs: powers of two up to _FINE, multiples of 128 up to _COARSE, then multiples of 256."""
FEW_LOGITS = 256
"""Rows of logits of a graph for steps that need no more."""
_PADDING = np.array([[0], [0], [-1], [0]])
"""Padding of token ids, positions, slots and rows of logits."""
_UNKNOWN = np.empty(0, np.int64)
"""Placeholder for token ids that the device fills in."""


def bucket(rows: int) -> int:
    """Return the row count of the graph for a step of `rows` rows."""
    if rows <= _FINE:
        return 1 << (rows - 1).bit_length()
    step = 128 if rows <= _COARSE else 256
    return -(-rows // step) * step


class GraphKey(NamedTuple):
    """What a graph is captured for."""

    rows: int
    logits: int
    """Rows of logits: all rows, or `FEW_LOGITS` for steps with fewer, such as prefill steps."""
    tile_rows: int
    """`Plan.tile_rows`."""
    block_rows: int
    """`Plan.block_rows`."""

    @classmethod
    def of(cls, plan: Plan, logits: int) -> "GraphKey":
        """Return the key for a plan of which `logits` rows give logits."""
        rows = bucket(plan.num_rows)
        few = rows if logits > FEW_LOGITS else min(rows, FEW_LOGITS)
        return cls(rows, few, plan.tile_rows, plan.block_rows)


def buckets(most: int) -> list[int]:
    """Return the row counts of all graphs for up to `most` rows, ascending. The last one is `most` itself."""
    sizes, rows = [], 1
    while rows <= most:
        sizes.append(min(bucket(rows), most))
        rows = bucket(rows) + 1
    return sizes


class GraphCapture(Protocol):
    """Turns a call into an equivalent one with less host work that returns the same tensor each time."""

    def rehearse(self, run: Callable[[], Tensor]) -> None:
        """Run the call once, if that is required before it is recorded."""

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return the call to replay. Raises what capturing raises, and then leaves nothing behind."""


class CudaCapture:
    """A `GraphCapture` with CUDA graphs that share one memory pool. Replaying a graph overwrites the results of the
    others.

    A pool is freed with its last graph even if tensors in it are alive, and PyTorch cannot capture into it again.
    Therefore each pool keeps a first graph that does next to nothing.
    """

    def __init__(self, device: torch.device, error_mode: str = "global") -> None:
        """`error_mode`: `"thread_local"` if other threads use CUDA at the same time, as NCCL's do."""
        self._device = device
        self._error_mode = error_mode
        self._first: torch.cuda.CUDAGraph | None = None

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Rehearse and record. Raises what either raises, and then leaves nothing behind."""
        self.rehearse(run)
        return self.record(run)

    def rehearse(self, run: Callable[[], Tensor]) -> None:
        """Run on a side stream, so that libraries and kernels are initialized."""
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream(self._device).wait_stream(stream)

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """As `GraphCapture.record`."""
        if self._first is None:
            self._pool = torch.cuda.graph_pool_handle()
            self._first, _ = self._record(lambda: torch.zeros(1, device=self._device))
        graph, result = self._record(run)
        result = _unowned(result)

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    def _record(self, run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        stream = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode=self._error_mode):
                result = run()
        except BaseException:
            torch.cuda.set_stream(stream)
            self._clean_up()
            raise
        return graph, result

    def _clean_up(self) -> None:
        """Repair PyTorch's state after a failed capture.

        Otherwise its allocator would keep using the pool, its generator would raise at the next draw, and the pool
        could not be captured into again.
        """
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        with suppress(RuntimeError):  # if the capture failed before it used the pool
            torch._C._cuda_endAllocateToPool(index, self._pool)
        self._first = None
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())


def _unowned(tensor: Tensor) -> Tensor:
    """Return a view of a GPU tensor that does not own its memory, so that the next graph in the pool can reuse it."""
    typestr = f"<i{tensor.element_size()}"
    interface = {
        "shape": tuple(tensor.shape),
        "strides": tuple(stride * tensor.element_size() for stride in tensor.stride()),
        "typestr": typestr,
        "data": (tensor.data_ptr(), False),
        "version": 3,
    }
    bits = torch.as_tensor(SimpleNamespace(__cuda_array_interface__=interface), device=tensor.device)
    return bits.view(tensor.dtype)


class PlainCapture:
    """Captures nothing: the equivalent of `CudaCapture` for any device."""

    def rehearse(self, run: Callable[[], Tensor]) -> None:
        """Do nothing."""

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return `run` itself."""
        return run


class NotCapturable(Exception):
    """The forward pass cannot be captured, or there is too little memory for the graph."""


class StepGraphs:
    """Captured forward passes of one model, one per `GraphKey`, captured on first use."""

    def __init__(
        self, model: TreeModel, storage: KVStorage, backend: AttentionBackend, max_rows: int, agree: Agree | None = None
    ) -> None:
        """`agree`: called once per capture if the model is sharded, so that either all ranks replay a graph or none
        does.
        """
        self.max_rows = max_rows
        self._model, self._storage, self._backend, self._agree = model, storage, backend, agree
        self._capture: GraphCapture = PlainCapture()
        if model.device.type == "cuda":
            self._capture = CudaCapture(model.device, "thread_local" if agree else "global")
        self._workspace = Workspace()
        self._graphs: dict[GraphKey, _Graph] = {}
        self._refused: set[GraphKey] = set()
        self.usable = True
        """Whether steps can be captured. False if the very first capture failed."""
        self._captured_any = False

    def clear(self) -> None:
        """Drop all graphs, even if others still refer to this object."""
        self._graphs.clear()
        self.usable, self._capture = False, PlainCapture()

    def supports(self, plan: Plan, logit_rows: NDArray[np.int64]) -> bool:
        """Return whether a step can use a graph: not too large, and no earlier capture of its key failed."""
        return (
            self.usable and plan.num_rows <= self.max_rows and GraphKey.of(plan, logit_rows.size) not in self._refused
        )

    @torch.inference_mode()
    def run(
        self, plan: Plan, token_ids: NDArray[np.int64], slots: NDArray[np.int64], logit_rows: NDArray[np.int64]
    ) -> Tensor:
        """As `Model.run`. The logits are overwritten by the next step.

        Raises `NotCapturable`. `supports` is then False for steps with the same `GraphKey`, and for all steps if this
        was the first capture. If the model is sharded, exceptions of the pass itself propagate, because the other ranks
        are in the same pass.
        """
        size = GraphKey.of(plan, logit_rows.size)
        graph = self._loaded(plan, token_ids, slots, logit_rows)
        if graph is not None:
            return graph.replay()[: logit_rows.size]
        graph = _Graph(self._model, self._storage, self._backend, size, self._workspace)
        graph.load(plan, token_ids, slots, logit_rows)
        try:
            logits = self._first_run(graph) if self._agree is None else self._first_run_together(graph, self._agree)
        except NotCapturable:
            self._refused.add(size)
            self.usable = self._captured_any
            raise
        self._captured_any = True
        self._graphs[size] = graph
        return logits[: logit_rows.size]

    def _first_run(self, graph: "_Graph") -> Tensor:
        try:
            self._capture.rehearse(graph.forward)
            graph.replay = self._capture.record(graph.forward)
            return graph.replay()
        except AssertionError:
            raise
        except Exception as error:
            raise NotCapturable(str(error)) from error

    def _first_run_together(self, graph: "_Graph", agree: Agree) -> Tensor:
        self._capture.rehearse(graph.forward)
        failure: Exception | None = None
        try:
            graph.replay = self._capture.record(graph.forward)
        except AssertionError:
            raise
        except Exception as error:
            failure = error
        if not agree(failure is None):
            raise NotCapturable(str(failure or "another rank could not capture it")) from failure
        return graph.replay()

    @torch.inference_mode()
    def run_ahead(
        self, plan: Plan, tokens: Tensor, slots: NDArray[np.int64], logit_rows: NDArray[np.int64]
    ) -> Tensor | None:
        """As `radixgen.model.base.SupportsRunAhead`. Returns None if no graph was captured for such a step."""
        graph = self._loaded(plan, _UNKNOWN, slots, logit_rows)
        if graph is None:
            return None
        graph.fill_in(tokens)
        return graph.replay()[: logit_rows.size]

    def _loaded(
        self, plan: Plan, token_ids: NDArray[np.int64], slots: NDArray[np.int64], logit_rows: NDArray[np.int64]
    ) -> "_Graph | None":
        """Return the graph for a step, ready to replay, or None if there is none. Drops a graph that is too small."""
        size = GraphKey.of(plan, logit_rows.size)
        graph = self._graphs.pop(size, None)
        if graph is None or not graph.load(plan, token_ids, slots, logit_rows):
            return None
        self._graphs[size] = graph
        return graph


class _Graph:
    """One captured pass and its inputs."""

    replay: Callable[[], Tensor]

    def __init__(
        self, model: TreeModel, storage: KVStorage, backend: AttentionBackend, size: GraphKey, workspace: Workspace
    ) -> None:
        self._model, self._storage, self._workspace = model, storage, workspace
        assert backend.static is not None
        self._new_attention = backend.static
        self._plan: Plan | None = None
        self._inputs = _Inputs(size, model.device)
        self._kv_writer = backend.kv_writer(self._inputs.slots, model.device)
        self._by_window: dict[Window | None, StaticAttention] = {}

    def load(
        self, plan: Plan, token_ids: NDArray[np.int64], slots: NDArray[np.int64], logit_rows: NDArray[np.int64]
    ) -> bool:
        """Fill in the inputs of a step. Returns False if the plan is too large for the captured tables."""
        self._plan = plan
        if not all(attention.load(plan) for attention in self._by_window.values()):
            return False
        self._inputs.load(token_ids, plan.row_positions, slots, logit_rows)
        return True

    def fill_in(self, tokens: Tensor) -> None:
        """Fill in the token ids of a step from the device: `tokens` `[n]`, in the order of its logit rows."""
        inputs = self._inputs
        inputs.token_ids.index_copy_(0, inputs.logit_rows[: tokens.numel()], tokens)

    def forward(self) -> Tensor:
        inputs = self._inputs
        return self._model.forward(inputs.token_ids, inputs.positions, inputs.logit_rows, self._attend)

    def _attend(self, call: LayerCall) -> tuple[Tensor, Tensor]:
        assert self._plan is not None
        k, v = self._storage.keys[call.layer], self._storage.values[call.layer]
        self._kv_writer(call.k, call.v, k, v)
        if call.window not in self._by_window:
            self._by_window[call.window] = self._new_attention(
                self._plan, call.window, self._inputs.positions, self._workspace
            )
        bounds = self._storage.bounds.of(call.layer)
        return self._by_window[call.window](call.q, k, v, call.scale, call.softcap, call.sinks, bounds)


class _Inputs:
    """Token ids, positions and slots, int64 `[rows]`, and rows of logits, int64 `[logits]`, uploaded in one copy per
    step.

    Padding rows write no KV.
    """

    def __init__(self, size: GraphKey, device: torch.device) -> None:
        every = torch.zeros((4, size.rows), dtype=torch.int64, device=device)
        self.token_ids, self.positions, self.slots, logit_rows = every
        self.logit_rows = logit_rows[: size.logits]
        self._staging = Staging(every)

    def load(self, *columns: NDArray[np.integer]) -> None:
        """Copy the columns into the static buffers. Padding is 0, or -1 for slots."""
        staged = self._staging.open()
        staged[:] = _PADDING
        for row, column in zip(staged, columns, strict=True):
            row[: column.size] = column
        self._staging.copy()
