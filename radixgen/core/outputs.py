"""What callers get back. Names follow vLLM's."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True)
class CompletionOutput:
    """One sequence of a request, from its first generated token on.

    `finish_reason`: `stop` at an end token, stop token or stop string; `length` at `max_tokens` or the end of the
    context; `abort` when cancelled or past its deadline; `error` where something went wrong with this request
    alone. `stop_reason`: the stop token's id, the stop string, `"deadline"`, or what the error was.
    `cumulative_logprob` and
    `logprobs` (one `{token id: natural-log probability}` a generated token, the sampled one first) are
    None unless `SamplingParams.logprobs` asked for them. A hypothesis of a beam search has `cumulative_logprob`, and
    `score`, by which they are ordered: the same divided by `len(token_ids) ** length_penalty`.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, float]] | None = None
    score: float | None = None


def end_token(output: CompletionOutput, eos_token_ids: Container[int]) -> int | None:
    """The last token, where that ended the answer; None where a grammar, a stop string or a bound did.

    `eos_token_ids`: the model's own end tokens; a stop token is named by `stop_reason`.
    """
    if output.finish_reason != "stop" or isinstance(output.stop_reason, str) or not output.token_ids:
        return None
    last = output.token_ids[-1]
    return last if output.stop_reason is not None or last in eos_token_ids else None


def joined(deltas: Sequence[CompletionOutput]) -> CompletionOutput:
    """Deltas of one sequence, in their order, as one."""
    last = deltas[-1]
    return replace(
        last,
        text="".join(one.text for one in deltas),
        token_ids=[token for one in deltas for token in one.token_ids],
        logprobs=None if last.logprobs is None else [found for one in deltas for found in one.logprobs or ()],
    )


OutputKind = Literal["cumulative", "delta", "final"]
"""What a request's outputs tell: everything so far, what is new, or nothing before the last one."""


SharingReason = Literal["cold", "evicted", "namespace", "diverged"]


@dataclass(frozen=True, slots=True)
class SharingEnd:
    """Where and why a prompt was not shared any further, at the moment of its admission.

    `position`: its first token that was not known. `prompt_tokens`: the tokens from there on, at most 8.
    `reason`: `evicted` where this very continuation was known once and was evicted, as far back as is remembered;
    `namespace` where nothing of the prompt is known in its own namespace, and another one knows these tokens;
    `diverged` where what is known goes on otherwise, with `cached_tokens`, of several the ones in use or used last;
    `cold` where nothing follows.

    For who runs the engine: it tells of other requests, and with `namespace` of other tenants. Don't pass it on to
    them.
    """

    reason: SharingReason
    position: int
    prompt_tokens: tuple[int, ...]
    cached_tokens: tuple[int, ...] = ()


class PromptTokens:
    """The token ids of a prompt; as a list when that is first asked for, and only then."""

    __slots__ = ("_ids",)

    def __init__(self, ids: list[int] | NDArray[np.int32]) -> None:
        self._ids = ids

    @property
    def ids(self) -> list[int]:
        if isinstance(self._ids, list):
            return self._ids
        ids: list[int] = self._ids.tolist()
        self._ids = ids
        return ids

    def __len__(self) -> int:
        return len(self._ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PromptTokens) and self.ids == other.ids

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self.ids)


@dataclass(slots=True)
class RequestOutput:
    """A request as it stands after a step: everything generated so far, or what is new, as it was submitted.

    `num_cached_tokens` counts the prompt tokens whose KV was already computed when the request was admitted;
    `num_shared_tokens` those that were known and held by running requests or pins, computed or not; `sharing_ended`
    says why there were no more, and is None where all of the prompt was known.
    `prompt_logprobs`, once complete: None for the first token, then one `{token id: natural-log probability}` a
    prompt token, its own first; of several sequences, all but the first may have tokens before. `queue_seconds`: from
    submission to admission.
    """

    request_id: str
    prompt_tokens: PromptTokens
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
    num_shared_tokens: int = 0
    sharing_ended: SharingEnd | None = None
    prompt_logprobs: list[dict[int, float] | None] | None = None
    queue_seconds: float = field(default=0.0, compare=False)

    @property
    def prompt_token_ids(self) -> list[int]:
        return self.prompt_tokens.ids

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_tokens)


def merge_outputs(deltas: Sequence[RequestOutput]) -> RequestOutput:
    """Merge deltas of one request, in their order."""
    if len(deltas) == 1:
        return deltas[0]
    sequences: dict[int, list[CompletionOutput]] = {}
    for delta in deltas:
        for output in delta.outputs:
            sequences.setdefault(output.index, []).append(output)
    outputs = [joined(own) for own in sequences.values()]
    prompt_logprobs = next((delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None), None)
    return replace(deltas[-1], outputs=outputs, prompt_logprobs=prompt_logprobs)


@dataclass(frozen=True, slots=True)
class Stats:
    """Counters since the engine began, and gauges of this moment. Tokens unless the name says otherwise."""

    steps: int
    prompt_tokens: int
    """Prompt tokens of admitted requests."""
    cached_prompt_tokens: int
    """Of those, tokens whose KV was already computed at admission."""
    sharing_ended: Mapping[SharingReason, int]
    """Of admitted requests, how many were not shared to their end, by reason."""
    computed_prompt_tokens: int
    """Rows computed for sequences that had generated nothing yet."""
    computed_rows: int
    """Rows that went through the model."""
    logit_rows: int
    """Rows whose logits were computed."""
    wasted_rows: int
    """Rows that were computed ahead of their tokens and that nobody needed; not among `computed_rows`."""
    generated_tokens: int
    kv_tokens_total: int
    kv_tokens_used: int
    """Slots that hold computed KV, of live requests and cached."""
    kv_tokens_reserved: int
    kv_tokens_fenced: int
    """Freed slots that a step in flight could still touch."""
    kv_tokens_cached: int
    """Slots that could be evicted at this moment."""
    kv_tokens_pinned: int
    """Slots on the paths of pins, live or not."""
    evicted_tokens: int
    preemptions: int
    kv_bytes_read: int
    """KV bytes that attention read: the sum over the segments of every unit that ran, in every layer."""
    kv_bytes_unshared: int
    """KV bytes that the same rows would have read, had each read its own whole path."""
    num_running: int
    num_waiting: int
    """Sequences"""
    num_waiting_tokens: int
    """Prompt tokens of the requests that wait."""
    num_pins: int
    num_nodes: int
    """Of the radix tree"""
    shared_tokens: int
    """What sharing saves at this moment: the tokens of all sequences that run and of all pins, less those of the tree
    that they hold."""
    failed_captures: int = 0
    """CUDA graphs that could not be captured: after each, some steps run eagerly, and all of them after a first one."""

    @property
    def rows_saved(self) -> int:
        """Rows of prompts that were not computed, because another request had brought their tokens. While prompts
        are being computed, what they still lack counts too.
        """
        return max(0, self.prompt_tokens - self.computed_prompt_tokens)

    @property
    def kv_bytes_saved(self) -> int:
        """KV bytes that attention did not read, because rows read what they share once."""
        return max(0, self.kv_bytes_unshared - self.kv_bytes_read)
