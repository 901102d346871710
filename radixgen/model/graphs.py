"""A step's forward pass, captured once for a number of rows and replayed for whatever plan comes.

Everything that a captured pass reads stands at fixed addresses: token ids, positions, slots, rows of logits, and the
tables of `StaticAttention`. A step fills them and replays; where only lengths grew, the tables stay as they are.
"""

from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixgen.cache.storage import KVStorage
from radixgen.core import Plan, Window
from radixgen.kernels.backend import Backend, StaticAttention
from radixgen.kernels.upload import Staging
from radixgen.model.packed import LayerCall, TreeModel

Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Turns a call into one that does the same with less host work and returns the same tensor again."""

_FINE, _COARSE = 256, 128
"""Up to _FINE rows a graph for each power of two, beyond it for each multiple of _COARSE."""


_PADDING = np.array([[0], [0], [-1], [0]])
_UNKNOWN = np.empty(0, np.int64)
"""Token ids that the device fills in"""


def bucket(rows: int) -> int:
    """Rows of the graph that answers `rows` rows."""
    if rows > _FINE:
        return -(-rows // _COARSE) * _COARSE
    return 1 << (rows - 1).bit_length()


class CudaCapture:
    """A `Capture` into CUDA graphs that share one memory pool.

    A pool ends with the last of its graphs, though tensors of theirs live on, and PyTorch can't capture into it again.
    So a pool has a first graph that does next to nothing and is kept.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._first: torch.cuda.CUDAGraph | None = None

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Run, then capture. Raises what capturing raises, and leaves nothing behind."""
        if self._first is None:
            self._pool = torch.cuda.graph_pool_handle()
            self._first, _ = self._record(lambda: torch.zeros(1, device=self._device))
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph, result = self._record(run)

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    def _record(self, run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        stream = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
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


def call(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Captures nothing: the plain twin, for any device."""
    return run


def _key(plan: Plan) -> tuple[int, int]:
    """Which graph answers a plan."""
    return bucket(plan.num_rows), plan.tile_rows


class NotCapturable(Exception):
    """The model's pass can't be captured, or what it was captured with is short of memory."""


class StepGraphs:
    """The captured passes of one model, made when they are first needed: one for a number of rows and a launch."""

    def __init__(self, model: TreeModel, storage: KVStorage, backend: Backend, max_rows: int) -> None:
        self.max_rows = max_rows
        self._model, self._storage, self._backend = model, storage, backend
        self._capture = CudaCapture(model.device) if model.device.type == "cuda" else call
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._refused: set[tuple[int, int]] = set()
        self.usable = True
        """Whether a step may be captured: not where the very first capture failed"""
        self._captured_any = False

    def takes(self, plan: Plan, logit_rows: NDArray[np.int64]) -> bool:
        """Whether a step is one for a graph: not too large, and most of its rows give logits, as in decoding. A graph
        makes as many logits as it has rows.
        """
        decodes = plan.num_rows <= self.max_rows and 2 * logit_rows.size >= plan.num_rows
        return decodes and self.usable and _key(plan) not in self._refused

    @torch.inference_mode()
    def run(
        self, plan: Plan, token_ids: NDArray[np.int64], slots: NDArray[np.int64], logit_rows: NDArray[np.int64]
    ) -> Tensor:
        """As `Model.run`. The logits are overwritten by the next step.

        Raises `NotCapturable`. Steps of that size are not taken again, and none at all if none was captured before.
        """
        key = _key(plan)
        graph = self._loaded(plan, token_ids, slots, logit_rows)
        if graph is not None:
            return graph.replay()[: logit_rows.size]
        graph = _Graph(self._model, self._storage, self._backend, key[0])
        graph.load(plan, token_ids, slots, logit_rows)
        try:
            graph.replay = self._capture(graph.forward)
            logits = graph.replay()
        except AssertionError:
            raise
        except Exception as error:
            self._refused.add(key)
            self.usable = self._captured_any
            raise NotCapturable(str(error)) from error
        self._captured_any = True
        self._graphs[key] = graph
        return logits[: logit_rows.size]

    @torch.inference_mode()
    def run_ahead(
        self, plan: Plan, tokens: Tensor, slots: NDArray[np.int64], logit_rows: NDArray[np.int64]
    ) -> Tensor | None:
        """As `radixgen.model.base.RunsAhead`; None where nothing was captured that answers such a step."""
        graph = self._loaded(plan, _UNKNOWN, slots, logit_rows)
        if graph is None:
            return None
        graph.fill_in(tokens)
        return graph.replay()[: logit_rows.size]

    def _loaded(
        self, plan: Plan, token_ids: NDArray[np.int64], slots: NDArray[np.int64], logit_rows: NDArray[np.int64]
    ) -> "_Graph | None":
        """The graph for a step, ready to be replayed; None where there is none, or it was too small and is gone now."""
        graph = self._graphs.pop(_key(plan), None)
        if graph is None or not graph.load(plan, token_ids, slots, logit_rows):
            return None
        self._graphs[_key(plan)] = graph
        return graph


class _Graph:
    """One captured pass and what it reads."""

    replay: Callable[[], Tensor]

    def __init__(self, model: TreeModel, storage: KVStorage, backend: Backend, rows: int) -> None:
        self._model, self._storage = model, storage
        assert backend.static is not None
        self._new_attention = backend.static
        self._plan: Plan | None = None
        self._inputs = _Inputs(rows, model.device)
        self._writes = backend.writes(self._inputs.slots, model.device)
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
        self._writes(call.k, call.v, k, v)
        if call.window not in self._by_window:
            self._by_window[call.window] = self._new_attention(self._plan, call.window, self._inputs.positions)
        return self._by_window[call.window](call.q, k, v, call.scale, call.softcap, call.sinks)


class _Inputs:
    """Token ids, positions, slots and rows of logits, int64 `[rows]` each, in one copy a step; rows beyond the step's
    own write no KV.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        every = torch.zeros((4, rows), dtype=torch.int64, device=device)
        self.token_ids, self.positions, self.slots, self.logit_rows = every
        self._staging = Staging(every)

    def load(self, *columns: NDArray[np.integer]) -> None:
        """The columns in this order, each padded with 0, slots with -1."""
        staged = self._staging.open()
        staged[:] = _PADDING
        for row, column in zip(staged, columns, strict=True):
            row[: column.size] = column
        self._staging.copy()
