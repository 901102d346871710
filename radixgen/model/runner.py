"""Run one step on the device: in each layer, write the new KV, then attend by the plan."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixgen.cache.storage import KVStorage
from radixgen.calibration import cost_models, flash_cost
from radixgen.core import Plan, Window
from radixgen.core.plan import ScoredPrompt
from radixgen.kernels.backend import Attention, AttentionBackend, KVWriter
from radixgen.kernels.flash_backend import backend_with_flash
from radixgen.kernels.quantized import KV_DTYPES
from radixgen.kernels.upload import upload
from radixgen.model.fingerprint import kv_fingerprint
from radixgen.model.graphs import Agree, NotCapturable, StepGraphs
from radixgen.model.host_kv import HostKV
from radixgen.model.key_scores import KeyScorer
from radixgen.model.layer_call import LayerCall
from radixgen.model.lockstep import ModelInput
from radixgen.model.moved_keys import KeyMover, find_rotaries
from radixgen.model.tree_model import TreeModel
from radixgen.model.warm_up import WarmUpStep, warm_up_steps
from radixgen.scheduler.cost import CostModel

logger = logging.getLogger(__name__)

MAX_GRAPH_ROWS = 2048
"""Maximum rows of a captured step. Beyond, the device takes longer than the host."""
WARM_UP_SLOTS = 512
"""Slots that warm-up steps read at most."""


class ModelRunner:
    """The engine's `Model` for transformers: a `TreeModel`, its KV storage and an attention backend.

    With `graphs`, steps of up to `max_graph_rows` rows are captured and replayed. Steps that cannot be captured run
    eagerly.
    """

    def __init__(
        self,
        model: TreeModel,
        attention: str,
        eos_token_ids: frozenset[int],
        *,
        kv_dtype: str = "auto",
        graphs: bool = True,
        max_graph_rows: int = MAX_GRAPH_ROWS,
        agree: Agree | None = None,
    ) -> None:
        """`kv_dtype`: the model's own for `"auto"`, or one of `KV_DTYPES`. `agree`: coordinates the ranks of a sharded
        model, which capture together.
        """
        self.model = model
        self.name = model.name
        self.vocab_size = model.vocab_size
        self.max_model_len = model.max_model_len
        self.eos_token_ids = eos_token_ids
        quantized = KV_DTYPES.get(kv_dtype)
        self.kv_shapes = [replace(shape, dtype=quantized or shape.dtype) for shape in model.layer_shapes]
        self.kv_bytes_per_token = sum(shape.bytes_per_token for shape in self.kv_shapes)
        self.kv_bytes_read = 0
        self.kv_bytes_unshared = 0
        self.failed_captures = 0
        """Captures that failed. After each, some steps run eagerly."""
        self._window_bytes: Counter[Window | None] = Counter()
        for window, shape in zip(model.windows, self.kv_shapes, strict=True):
            self._window_bytes[window] += shape.bytes_per_token
        geometry = model.geometry and replace(model.geometry, kv_dtype=quantized)
        flash = flash_cost(model.device, geometry) if geometry and not quantized else None
        self._backend = backend_with_flash(attention, model.device, flash)
        self._agree = agree
        self._max_graph_rows = max_graph_rows if graphs and self._backend.static else 0
        self.costs: tuple[CostModel, ...] = ()
        if self._backend.name == "triton" and geometry is not None:
            self.costs = cost_models(model.device, geometry)
        self.allocate(0)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def allocate(self, slots: int) -> None:
        self._slots = slots
        self.storage = KVStorage(self.kv_shapes, slots, self.model.device)
        self.storage.zero(WARM_UP_SLOTS)  # warm-up steps read these slots before they are written
        self._graphs: StepGraphs | None = None
        if self._max_graph_rows:
            self._graphs = StepGraphs(self.model, self.storage, self._backend, self._max_graph_rows, self._agree)

    def host_kv(self, slots: int) -> HostKV:
        """As `radixgen.model.base.SupportsHostKV`."""
        return HostKV(self.storage, slots, self.device)

    def kv_mover(self) -> KeyMover:
        """As `radixgen.model.base.SupportsKVMoves`."""
        return KeyMover(self.storage, find_rotaries(self.model), self.device)

    def kv_fingerprint(self) -> bytes:
        """As `radixgen.model.base.SupportsDiskKV`."""
        return kv_fingerprint(self.model.model, self.kv_shapes)

    def run(
        self,
        plan: Plan,
        token_ids: NDArray[np.int64],
        slots: NDArray[np.int64],
        logit_rows: NDArray[np.int64],
    ) -> Tensor:
        """As `Model.run`. The logits are valid until the next call."""
        self.count(plan)
        self.storage.prepare(plan, slots)
        graphs = self._graphs_for(plan, logit_rows)
        logits = None if graphs is None else self._replay(graphs, plan, token_ids, slots, logit_rows)
        return self._run_eagerly(plan, token_ids, slots, logit_rows) if logits is None else logits

    def run_scored(
        self,
        plan: Plan,
        token_ids: NDArray[np.int64],
        slots: NDArray[np.int64],
        logit_rows: NDArray[np.int64],
        prompts: Sequence[ScoredPrompt],
    ) -> tuple[Tensor, list[NDArray[np.float32]]]:
        """As `radixgen.model.base.SupportsKeyScores`. The step is not captured."""
        self.count(plan)
        self.storage.prepare(plan, slots)
        inputs, step = self._inputs(plan, token_ids, slots)
        scorer = KeyScorer(step, self.storage, plan, prompts, self.device)
        logits = self.model.forward(*inputs, upload(logit_rows, self.device), scorer)
        return logits, scorer.scores()

    def warm_up_steps(self, max_rows: int, max_logits: int) -> list[Callable[[], Tensor]]:
        """As `radixgen.model.base.SupportsWarmUp`."""
        return [partial(self._warm_up, kind) for kind in self.warm_up_kinds(max_rows, max_logits)]

    def warm_up_kinds(self, max_rows: int, max_logits: int) -> list[WarmUpStep]:
        """Return the kinds of steps that `warm_up_steps` runs."""
        depth = min(self._slots, self.max_model_len)
        costs = self.costs or (CostModel(),)
        kinds = warm_up_steps(
            costs, max_rows=max_rows, graph_rows=self._max_graph_rows, max_logits=max_logits, max_depth=depth
        )
        return list(kinds)

    def warm_up_inputs(self, kind: WarmUpStep) -> ModelInput:
        """Return a step of this kind that writes no KV."""
        plan = kind.plan(self._slots, self.max_model_len)
        return ModelInput(plan, np.zeros(kind.rows, np.int64), np.full(kind.rows, -1), np.arange(kind.num_logits))

    def profile_run(self, max_rows: int) -> None:
        """Run a step of `max_rows` rows before `allocate`, so that its memory counts as used. Logs a warning if there
        is too little.
        """
        self.allocate(WARM_UP_SLOTS)
        try:
            self.warm_up_steps(max_rows, 1)[0]()
        except torch.OutOfMemoryError as error:
            logger.warning("%s: no memory for a step of %d rows: %s", self.name, max_rows, error)
        self.allocate(0)

    def count(self, plan: Plan) -> None:
        """Add the bytes read by a step to the totals."""
        for window, size in self._window_bytes.items():
            seen = plan.within(window)
            self.kv_bytes_read += seen.kv_tokens_read * size
            self.kv_bytes_unshared += seen.kv_tokens_unshared * size

    @property
    def runs_ahead(self) -> bool:
        """Whether steps are captured."""
        return self._graphs is not None and self._graphs.usable

    def run_ahead(
        self, plan: Plan, tokens: Tensor, slots: NDArray[np.int64], logit_rows: NDArray[np.int64]
    ) -> Tensor | None:
        """As `radixgen.model.base.SupportsRunAhead`, for steps that were captured before."""
        graphs = self._graphs_for(plan, logit_rows)
        self.storage.prepare(plan, slots)
        logits = None if graphs is None else graphs.run_ahead(plan, tokens, slots, logit_rows)
        if logits is not None:
            self.count(plan)
        return logits

    def _warm_up(self, kind: WarmUpStep) -> Tensor:
        return self.warm_up(*self.warm_up_inputs(kind))

    def warm_up(
        self,
        plan: Plan,
        token_ids: NDArray[np.int64],
        slots: NDArray[np.int64],
        logit_rows: NDArray[np.int64],
    ) -> Tensor:
        """As `run`, without updating counters. If a step cannot be captured, which is logged, the logits are empty."""
        graphs = self._graphs_for(plan, logit_rows)
        if graphs is None:
            return self._run_eagerly(plan, token_ids, slots, logit_rows)
        logits = self._replay(graphs, plan, token_ids, slots, logit_rows)
        return torch.empty((0, self.vocab_size), device=self.device) if logits is None else logits

    def _graphs_for(self, plan: Plan, logit_rows: NDArray[np.int64]) -> StepGraphs | None:
        """Return the graphs to replay a step with; None if it runs eagerly."""
        return self._graphs if self._graphs is not None and self._graphs.supports(plan, logit_rows) else None

    def _replay(
        self,
        graphs: StepGraphs,
        plan: Plan,
        token_ids: NDArray[np.int64],
        slots: NDArray[np.int64],
        logit_rows: NDArray[np.int64],
    ) -> Tensor | None:
        """Run a captured pass. Returns None, with a warning, if it cannot be captured."""
        try:
            return graphs.run(plan, token_ids, slots, logit_rows)
        except NotCapturable as error:
            self.failed_captures += 1
            steps = f"steps like one of {plan.num_rows} rows run" if graphs.usable else "runs"
            logger.warning("%s: %s without CUDA graphs from now on: %s", self.name, steps, error)
            return None

    def _run_eagerly(
        self, plan: Plan, token_ids: NDArray[np.int64], slots: NDArray[np.int64], logit_rows: NDArray[np.int64]
    ) -> Tensor:
        device = self.model.device
        inputs, step = self._inputs(plan, token_ids, slots)
        wanted = logit_rows if logit_rows.size else np.zeros(1, np.int64)
        if not self.model.picks_rows or 2 * wanted.size > plan.num_rows:
            return self.model.forward(*inputs, upload(logit_rows, device), step)
        picked, places = np.unique(wanted, return_inverse=True)
        step.pick(picked)
        logits = self.model.forward(*inputs, upload(picked, device), step, step.write)
        return logits.index_select(0, upload(places[: logit_rows.size], device))

    def _inputs(
        self, plan: Plan, token_ids: NDArray[np.int64], slots: NDArray[np.int64]
    ) -> tuple[tuple[Tensor, Tensor], "_StepAttention"]:
        """Return tokens and positions `[rows]` on the device, and the attention of the step."""
        device = self.model.device
        inputs = upload(token_ids, device), upload(plan.row_positions.astype(np.int64), device)
        return inputs, _StepAttention(self.storage, self._backend, plan, self._backend.kv_writer(slots, device))

    def drop_graphs(self) -> None:
        """Release all graphs; later steps run eagerly."""
        if self._graphs is not None:
            self._graphs.clear()
        self._graphs = None

    def release(self) -> None:
        self.drop_graphs()
        self.model.release()
        self.storage.release()


class _StepAttention:
    """Computes attention for every layer of one step; in the last layer only for picked rows, if any."""

    def __init__(self, storage: KVStorage, backend: AttentionBackend, plan: Plan, kv_writer: KVWriter) -> None:
        self._storage = storage
        self._backend = backend
        self._plan = plan
        self._kv_writer = kv_writer
        self._picked: Plan | None = None
        self._by_window: dict[Window | None, Attention] = {}

    def pick(self, rows: NDArray[np.int64]) -> None:
        """Compute only these rows, ascending, in the last layer, once its K and V are written."""
        self._picked = self._plan.select(rows)

    def write(self, call: LayerCall) -> None:
        """Store the K and V of all rows."""
        self._kv_writer(call.k, call.v, self._storage.keys[call.layer], self._storage.values[call.layer])

    def __call__(self, call: LayerCall) -> tuple[Tensor, Tensor]:
        if self._picked is not None and call.q.shape[0] == self._picked.num_rows:
            return self._answer(call, self._backend.attention(self._picked, call.window, call.q.device))
        self.write(call)
        if call.window not in self._by_window:
            self._by_window[call.window] = self._backend.attention(self._plan, call.window, call.q.device)
        return self._answer(call, self._by_window[call.window])

    def _answer(self, call: LayerCall, attention: Attention) -> tuple[Tensor, Tensor]:
        k, v = self._storage.keys[call.layer], self._storage.values[call.layer]
        bounds = self._storage.bounds.of(call.layer)
        return attention(call.q, k, v, call.scale, call.softcap, call.sinks, bounds)
