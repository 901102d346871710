"""A step's forward pass, captured once for a number of rows and of logits, and replayed for whatever plan comes.

Everything that a captured pass reads stands at fixed addresses: token ids, positions, slots, rows of logits, and the
tables of `StaticAttention`. A step fills them and replays; where only lengths grew, the tables stay as they are.
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
from radixgen.model.packed import LayerCall, TreeModel

Agree = Callable[[bool], bool]
"""Whether all ranks of a sharded model are fine; each says so of itself, and all get the same answer."""

_FINE, _COARSE = 256, 1024
"""Up to _FINE rows a graph for each power of two, up to _COARSE for each multiple of 128, then of 256."""
FEW_LOGITS = 256
"""Rows of logits of a graph of more rows, where a step wants no more"""
_PADDING = np.array([[0], [0], [-1], [0]])
"""Of token ids, positions, slots and rows of logits"""
_UNKNOWN = np.empty(0, np.int64)
"""Token ids that the device fills in"""


def bucket(rows: int) -> int:
    """Rows of the graph that answers `rows` rows."""
    if rows <= _FINE:
        return 1 << (rows - 1).bit_length()
    step = 128 if rows <= _COARSE else 256
    return -(-rows // step) * step


class GraphKey(NamedTuple):
    """What a graph is captured for."""

    rows: int
    logits: int
    """Rows that it gives logits of: all, or `FEW_LOGITS` of more where few are wanted, as while prompts are computed"""
    tile_rows: int
    """Of the plans"""

    @classmethod
    def of(cls, plan: Plan, logits: int) -> "GraphKey":
        """For a plan, of which so many rows give logits."""
        rows = bucket(plan.num_rows)
        return cls(rows, rows if logits > FEW_LOGITS else min(rows, FEW_LOGITS), plan.tile_rows)


def buckets(most: int) -> list[int]:
    """Rows of all graphs that answer up to `most` rows, ascending, the last one cut off there."""
    sizes, rows = [], 1
    while rows <= most:
        sizes.append(min(bucket(rows), most))
        rows = bucket(rows) + 1
    return sizes


class GraphCapture(Protocol):
    """Turns a call into one that does the same with less host work and returns the same tensor again."""

    def rehearse(self, run: Callable[[], Tensor]) -> None:
        """Run it once, where that has to be before it is recorded."""

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """The call that is replayed. Raises what capturing raises, and leaves nothing behind."""


class CudaCapture:
    """A `GraphCapture` into CUDA graphs that share one memory pool. What a graph returns is overwritten when another one is
    replayed.

    A pool ends with the last of its graphs, though tensors of theirs live on, and PyTorch can't capture into it again.
    So a pool has a first graph that does next to nothing and is kept.
    """

    def __init__(self, device: torch.device, error_mode: str = "global") -> None:
        """error_mode: `"thread_local"` where other threads use CUDA meanwhile, as NCCL's do."""
        self._device = device
        self._error_mode = error_mode
        self._first: torch.cuda.CUDAGraph | None = None

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Run, then capture. Raises what either raises, and leaves nothing behind."""
        self.rehearse(run)
        return self.record(run)

    def rehearse(self, run: Callable[[], Tensor]) -> None:
        """Run on a stream beside the current one, so that libraries and kernels are ready."""
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream(self._device).wait_stream(stream)

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """As `GraphCapture`."""
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
        """PyTorch can't end a capture that failed: its allocator goes on to use the pool, its generator raises at the
        next draw, and the pool can't be captured into again.
        """
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        with suppress(RuntimeError):  # where the capture failed before it took the pool
            torch._C._cuda_endAllocateToPool(index, self._pool)
        self._first = None
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())


def _unowned(tensor: Tensor) -> Tensor:
    """A view of a GPU tensor that does not own its memory, so that the next graph in the pool can use the same."""
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
    """Captures nothing: the plain twin, for any device."""

    def rehearse(self, run: Callable[[], Tensor]) -> None:
        """Nothing has to be ready."""

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """`run` itself."""
        return run


class NotCapturable(Exception):
    """The model's pass can't be captured, or what it was captured with is short of memory."""


class StepGraphs:
    """The captured passes of one model, made when they are first needed, one a `GraphKey`."""

    def __init__(
        self, model: TreeModel, storage: KVStorage, backend: AttentionBackend, max_rows: int, agree: Agree | None = None
    ) -> None:
        """agree: asked once a capture where the model is sharded, so that all ranks replay a graph or none does."""
        self.max_rows = max_rows
        self._model, self._storage, self._backend, self._agree = model, storage, backend, agree
        self._capture: GraphCapture = PlainCapture()
        if model.device.type == "cuda":
            self._capture = CudaCapture(model.device, "thread_local" if agree else "global")
        self._workspace = Workspace()
        self._graphs: dict[GraphKey, _Graph] = {}
        self._refused: set[GraphKey] = set()
        self.usable = True
        """Whether a step may be captured: not where the very first capture failed"""
        self._captured_any = False

    def clear(self) -> None:
        """Forget all graphs, whoever else still holds this."""
        self._graphs.clear()
        self.usable, self._capture = False, PlainCapture()

    def supports(self, plan: Plan, logit_rows: NDArray[np.int64]) -> bool:
        """Whether a step is one for a graph: not too large, nor of a size that was refused."""
        return (
            self.usable and plan.num_rows <= self.max_rows and GraphKey.of(plan, logit_rows.size) not in self._refused
        )

    @torch.inference_mode()
    def run(
        self, plan: Plan, token_ids: NDArray[np.int64], slots: NDArray[np.int64], logit_rows: NDArray[np.int64]
    ) -> Tensor:
        """As `Model.run`. The logits are overwritten by the next step.

        Raises `NotCapturable`. Steps of that size are not taken again, and none at all if none was captured before.
        Where the model is sharded, what the pass itself raises is raised: the other ranks are in its midst.
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
        """As `radixgen.model.base.SupportsRunAhead`; None where nothing was captured that answers such a step."""
        graph = self._loaded(plan, _UNKNOWN, slots, logit_rows)
        if graph is None:
            return None
        graph.fill_in(tokens)
        return graph.replay()[: logit_rows.size]

    def _loaded(
        self, plan: Plan, token_ids: NDArray[np.int64], slots: NDArray[np.int64], logit_rows: NDArray[np.int64]
    ) -> "_Graph | None":
        """The graph for a step, ready to be replayed; None where there is none, or it was too small and is gone now."""
        size = GraphKey.of(plan, logit_rows.size)
        graph = self._graphs.pop(size, None)
        if graph is None or not graph.load(plan, token_ids, slots, logit_rows):
            return None
        self._graphs[size] = graph
        return graph


class _Graph:
    """One captured pass and what it reads."""

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
        """Fill in a step's inputs; False where its plan is too large for what was captured."""
        self._plan = plan
        if not all(attention.load(plan) for attention in self._by_window.values()):
            return False
        self._inputs.load(token_ids, plan.row_positions, slots, logit_rows)
        return True

    def fill_in(self, tokens: Tensor) -> None:
        """Take the token ids of a step from the device: `tokens` `[n]`, in the order of its logit rows."""
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
        return self._by_window[call.window](call.q, k, v, call.scale, call.softcap, call.sinks)


class _Inputs:
    """Token ids, positions and slots, int64 `[rows]` each, and rows of logits, int64 `[logits]`, in one copy a step;
    rows beyond the step's own write no KV.
    """

    def __init__(self, size: GraphKey, device: torch.device) -> None:
        every = torch.zeros((4, size.rows), dtype=torch.int64, device=device)
        self.token_ids, self.positions, self.slots, logit_rows = every
        self.logit_rows = logit_rows[: size.logits]
        self._staging = Staging(every)

    def load(self, *columns: NDArray[np.integer]) -> None:
        """The columns in this order, each padded with 0, slots with -1."""
        staged = self._staging.open()
        staged[:] = _PADDING
        for row, column in zip(staged, columns, strict=True):
            row[: column.size] = column
        self._staging.copy()
