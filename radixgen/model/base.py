"""Interface of models to the engine."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from radixgen.cache import KVCopies, KVMover
from radixgen.core import InvalidRequest, Plan
from radixgen.core.plan import ScoredPrompt
from radixgen.core.reading import Press, ReadingPolicy
from radixgen.kernels.sharded_sampling import ShardedLogits

Logits = Tensor | ShardedLogits
"""Logits `[n, vocab]` in any floating dtype, perhaps on several devices."""


@runtime_checkable
class Model(Protocol):
    """A causal language model over packed rows, and its KV storage."""

    name: str
    vocab_size: int
    """Upper bound of token ids; at most the width of the logits."""
    max_model_len: int
    """Maximum number of prompt and output tokens of a sequence."""
    eos_token_ids: frozenset[int]
    kv_bytes_per_token: int
    """In all layers together."""
    kv_bytes_read: int
    """Bytes read by attention so far: the segments of every unit, in every layer."""
    kv_bytes_unshared: int
    """Bytes that attention would have read so far if every row had read its whole path by itself."""

    def allocate(self, slots: int) -> None:
        """Allocate the KV of `slots` tokens. Called once, before the first `run`."""

    def run(
        self,
        plan: Plan,
        token_ids: NDArray[np.int64],
        slots: NDArray[np.int64],
        logit_rows: NDArray[np.int64],
    ) -> Logits:
        """Write the K and V of the plan's rows into their slots, then attend by the plan.

        `token_ids` `[rows]`; `slots` `[rows]`, -1 if a row's KV exists already; `logit_rows` `[n]`. Returns logits
        `[n, vocab]`.
        """

    def release(self) -> None:
        """Restore what was changed in the wrapped model, and free the storage."""


@runtime_checkable
class SupportsHostKV(Protocol):
    """A model whose KV can be copied to host memory and back."""

    def host_kv(self, slots: int) -> KVCopies:
        """Allocate the KV of `slots` tokens in host memory. Called at most once, after `allocate`.

        Raises `MemoryError`, `OSError` or `RuntimeError` if there is too little.
        """


@runtime_checkable
class SupportsDiskKV(SupportsHostKV, Protocol):
    """A model whose KV can be kept on disk, for later engines: `host_kv` returns `HostRecords`, too."""

    def kv_fingerprint(self) -> bytes:
        """Return a hash of all that a token's KV depends on besides the tokens up to it, 32 bytes: weights, settings,
        data types, and the versions of the code.
        """


@runtime_checkable
class SupportsKVMoves(Protocol):
    """A model whose KV can be moved to other positions."""

    def kv_mover(self) -> KVMover:
        """Return what copies and moves KV. Called at most once, after `allocate`. Raises `UnsupportedModel`."""


@runtime_checkable
class SupportsKeyScores(Protocol):
    """A model that can tell how much attention keys get. See `radixgen.model.key_scores`."""

    def run_scored(
        self,
        plan: Plan,
        token_ids: NDArray[np.int64],
        slots: NDArray[np.int64],
        logit_rows: NDArray[np.int64],
        prompts: Sequence[ScoredPrompt],
    ) -> tuple[Logits, list[NDArray[np.float32]]]:
        """As `Model.run`. Returns the logits, and for each of `prompts` the scores of its keys `[scored]`."""


def check_press(model: Model, reading: ReadingPolicy) -> None:
    """Raise `InvalidRequest` if the policy presses prompts and the model cannot score their keys."""
    if isinstance(reading, Press) and not isinstance(model, SupportsKeyScores):
        raise InvalidRequest("reading", reading.policy, f"needs a transformers model on one rank, unlike {model.name}")


@runtime_checkable
class SupportsWarmUp(Protocol):
    """A model whose first step of each kind is slow, because something is compiled or captured for it."""

    def warm_up_steps(self, max_rows: int, max_logits: int) -> Sequence[Callable[[], Logits]]:
        """Return one call for each kind of step of up to `max_rows` rows and `max_logits` rows of logits.

        The calls are made in this order, after `allocate`. They write no KV and update no counters. Each returns
        arbitrary logits `[n, vocab]`; `n` may be 0.
        """


@runtime_checkable
class SupportsStepConfirmation(Protocol):
    """A model whose results may turn out invalid only after the step."""

    def confirm_step(self) -> None:
        """Raise `EngineDead` if the results of the last step are invalid. Called after the host has read them and
        before they are used.
        """


@runtime_checkable
class SupportsRunAhead(Protocol):
    """A model that can begin a step before the host knows the tokens of the step before it."""

    @property
    def runs_ahead(self) -> bool:
        """Whether the model can begin any step ahead."""

    def run_ahead(
        self, plan: Plan, tokens: Tensor, slots: NDArray[np.int64], logit_rows: NDArray[np.int64]
    ) -> Logits | None:
        """As `Model.run`, without waiting for the device, for a step in which every row gives logits.

        `tokens` int64 `[n]`, on the model's device, are the token ids of the rows `logit_rows` `[n]`. The logits may
        overwrite those of the last run. Returns None, with nothing done, if the step needs `run`.
        """
