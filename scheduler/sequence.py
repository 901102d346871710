"""Requests as the scheduler sees them: a request has `n` sequences, and each has a cursor in the tree."""

from dataclasses import dataclass, field

import numpy as np

from radixgen.cache import Lock, TokenArray
from radixgen.core import FinishReason, SamplingParams


@dataclass(eq=False, slots=True)
class Request:
    """What a caller submitted. `serial` orders requests by arrival."""

    id: str
    serial: int
    prompt: TokenArray
    params: SamplingParams
    seed: int
    priority: int = 0
    namespace: str = ""
    num_cached_tokens: int | None = None
    """Prompt tokens that had their KV when the request was first admitted; None before."""
    sequences: list["Sequence"] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return all(sequence.finish_reason is not None for sequence in self.sequences)


@dataclass(eq=False, slots=True)
class Sequence:
    """One of a request's `n` continuations. While it runs, `cursor` locks its place in the tree."""

    request: Request
    index: int
    namespace: str
    cursor: Lock | None = None
    output: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    scheduled_in: int = -1
    """The last step that this sequence has a part in."""

    @property
    def rank(self) -> tuple[int, int, int]:
        """Who goes first: priority, then arrival, then place among the `n`."""
        return -self.request.priority, self.request.serial, self.index

    def tokens(self) -> TokenArray:
        """Prompt and output."""
        if not self.output:
            return self.request.prompt
        return np.concatenate([self.request.prompt, np.array(self.output, np.int32)])
