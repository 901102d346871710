"""What the engine asks of a model."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from radixgen.core import Plan


@runtime_checkable
class Model(Protocol):
    """A causal language model over packed rows, together with its KV storage."""

    name: str
    vocab_size: int
    """Token ids are below it; it is the width of the logits or less."""
    max_model_len: int
    """Longest prompt plus output, in tokens."""
    eos_token_ids: frozenset[int]
    kv_bytes_per_token: int
    """In all layers together."""
    kv_bytes_read: int
    """Bytes that attention has read so far: the segments of every unit, in every layer."""
    kv_bytes_unshared: int
    """Bytes that the same rows would have read, had each read its own whole path."""

    def allocate(self, slots: int) -> None:
        """Make storage for the KV of `slots` tokens. Called once, before the first `run`."""

    def run(
        self,
        plan: Plan,
        token_ids: NDArray[np.int64],
        slots: NDArray[np.int64],
        logit_rows: NDArray[np.int64],
    ) -> Tensor:
        """Write the K and V of the plan's rows into their slots, then attend by the plan.

        `token_ids` `[rows]`; `slots` `[rows]`, -1 where a row's KV exists already; `logit_rows` `[n]`. Returns
        logits `[n, vocab]`, of any floating dtype.
        """

    def release(self) -> None:
        """Give back what was borrowed and drop the storage."""


@runtime_checkable
class SupportsWarmUp(Protocol):
    """A model whose first step of each kind takes longer, because something is compiled or captured for it."""

    def warm_up_steps(self, max_rows: int, max_logits: int) -> list[Callable[[], Tensor]]:
        """One call for each kind of step of up to `max_rows` rows that gives up to `max_logits` logits, to be called in
        this order after `allocate`. They write no KV and count nothing. Each returns logits `[n, vocab]` of no meaning;
        `n` is 0 where there are none.
        """


@runtime_checkable
class SupportsStepConfirmation(Protocol):
    """A model that may give results of no meaning, and learn only later that it failed."""

    def confirm_step(self) -> None:
        """Called when the host has read what a step gave, before anybody else does. Raises `EngineDead` where that
        means nothing.
        """


@runtime_checkable
class SupportsRunAhead(Protocol):
    """A model that can begin a step before the tokens of the step before it are known to the host."""

    @property
    def runs_ahead(self) -> bool:
        """Whether there are steps that it would begin."""

    def run_ahead(
        self, plan: Plan, tokens: Tensor, slots: NDArray[np.int64], logit_rows: NDArray[np.int64]
    ) -> Tensor | None:
        """As `Model.run`, of rows that all give logits, without waiting for what the device does: `tokens` int64 `[n]`,
        on the model's device, are those of the rows `logit_rows` `[n]`.

        The logits may overwrite those of the last run. None, and nothing is done, where the step has to be `run`.
        """
