"""Outputs returned to callers. Names follow vLLM's."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from radixgen.core.cache_hints import HintResult

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True)
class CompletionOutput:
    """The output of one sequence of a request.

    `finish_reason`: `stop` at an end token, stop token or stop string; `length` at `max_tokens` or the end of the
    context; `abort` if cancelled or past its deadline; `error` if something failed for this request alone.
    `stop_reason`: the id of the stop token, the stop string, `"deadline"`, or the error message.

    `cumulative_logprob` and `logprobs` are None unless `SamplingParams.logprobs` is set. `logprobs` has one
    `{token id: natural-log probability}` per generated token, the sampled token first. A hypothesis of a beam search
    has `cumulative_logprob`, and `score = cumulative_logprob / len(token_ids) ** length_penalty`, by which hypotheses
    are ordered.
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
    """Return the last token if it ended the answer, or None if a grammar, a stop string or a limit did.

    `eos_token_ids`: the model's own end tokens. A stop token is reported in `stop_reason`.
    """
    if output.finish_reason != "stop" or isinstance(output.stop_reason, str) or not output.token_ids:
        return None
    last = output.token_ids[-1]
    return last if output.stop_reason is not None or last in eos_token_ids else None


def joined(deltas: Sequence[CompletionOutput]) -> CompletionOutput:
    """Concatenate the deltas of one sequence, given in order."""
    last = deltas[-1]
    return replace(
        last,
        text="".join(delta.text for delta in deltas),
        token_ids=[token for delta in deltas for token in delta.token_ids],
        logprobs=None if last.logprobs is None else [entry for delta in deltas for entry in delta.logprobs or ()],
    )


OutputKind = Literal["cumulative", "delta", "final"]
"""What the outputs of a request contain: everything so far, only what is new, or nothing before the final output."""


SharingReason = Literal["cold", "evicted", "namespace", "diverged"]


@dataclass(frozen=True, slots=True)
class SharingEnd:
    """Where and why prefix sharing of a prompt ended, at its admission.

    `position`: the first token of the prompt that was not in the tree. `prompt_tokens`: up to 8 tokens from there on.

    `reason`:

    - `evicted`: this continuation was cached and has been evicted, as far back as is remembered;
    - `namespace`: nothing of the prompt is known in its namespace, but another namespace knows these tokens;
    - `diverged`: the tree continues with other tokens, `cached_tokens`; of several continuations, the one in use or
      used last;
    - `cold`: the tree has no continuation.

    For the operator of the engine only: it reveals other requests, and with `namespace` other tenants. Callers must not
    see it.
    """

    reason: SharingReason
    position: int
    prompt_tokens: tuple[int, ...]
    cached_tokens: tuple[int, ...] = ()


class PromptTokens:
    """The token ids of a prompt, converted to a list on first access."""

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
    """The state of a request after a step. `outputs` holds everything generated so far or only what is new, by
    `OutputKind`.

    `num_cached_tokens`: prompt tokens whose KV was computed already at admission. `num_shared_tokens`: prompt tokens
    held by running requests or pins at admission, computed or not. `sharing_ended`: why no more tokens were shared;
    None if the whole prompt was known.

    `prompt_logprobs`, once complete: None for the first token, then one `{token id: natural-log probability}` per
    prompt token, the token itself first. With several sequences, all but the first may output tokens before it is
    complete.

    `queue_seconds`: time from submission to admission. `cache_hints`: answers to the request's hints, in their order,
    once its prompt is computed.

    `exact`: whether all keys were read, and were computed at their own places. If not, the outputs are those of the
    model under the request's reading policy, or KV of `num_moved_tokens` prompt tokens was moved from other positions.
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
    cache_hints: tuple[HintResult, ...] = ()
    num_moved_tokens: int = 0
    exact: bool = True

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
    """Counters since the engine started, and gauges of the current state. In tokens unless the name says otherwise."""

    steps: int
    prompt_tokens: int
    """Prompt tokens of admitted requests."""
    cached_prompt_tokens: int
    """Prompt tokens whose KV was computed already at admission."""
    sharing_ended: Mapping[SharingReason, int]
    """Admitted requests that shared less than their whole prompt, by reason."""
    computed_prompt_tokens: int
    """Rows computed for sequences without output."""
    computed_rows: int
    """Rows that went through the model."""
    logit_rows: int
    """Rows whose logits were computed."""
    wasted_rows: int
    """Rows computed ahead and then not needed. Not included in `computed_rows`."""
    generated_tokens: int
    kv_tokens_total: int
    kv_tokens_used: int
    """Slots with computed KV, of live requests and of the cache."""
    kv_tokens_reserved: int
    kv_tokens_fenced: int
    """Freed slots that a step in flight may still access."""
    kv_tokens_cached: int
    """Slots that can be evicted now."""
    kv_tokens_pinned: int
    """Slots on the paths of pins, whether or not running requests share them."""
    evicted_tokens: int
    preemptions: int
    kv_bytes_read: int
    """KV bytes read by attention: all segments of all units, in every layer."""
    kv_bytes_unshared: int
    """KV bytes that attention would have read if every row had read its whole path by itself."""
    num_running: int
    num_waiting: int
    """Waiting sequences."""
    num_waiting_tokens: int
    """Prompt tokens of waiting requests."""
    num_pins: int
    num_nodes: int
    """Nodes of the radix tree."""
    shared_tokens: int
    """Tokens saved by sharing now: the path lengths of all running sequences and pins, less the distinct tokens they
    hold.
    """
    moved_prompt_tokens: int = 0
    """Prompt tokens whose KV was copied from runs that are no prefix, instead of being computed."""
    failed_captures: int = 0
    """CUDA graph captures that failed. After each, some steps run eagerly; if the very first failed, all steps do."""
    hints_accepted: int = 0
    """Cache hints by their answer: accepted, clipped to a bound, or refused."""
    hints_clipped: int = 0
    hints_refused: int = 0
    kv_bytes_per_token: int = 0
    """KV bytes of one token in all layers, in the pool and in the host."""
    kv_tokens_host_total: int = 0
    """Slots of the host tier; without one, this and all figures of it are 0."""
    kv_tokens_host_used: int = 0
    host_saved_tokens: int = 0
    """Tokens copied from the pool to the host."""
    host_fetched_tokens: int = 0
    """Tokens copied back to the pool for waiting requests."""
    host_recomputed_tokens: int = 0
    """Tokens in the host that were computed again, because that took less time or the pool was full."""
    host_evicted_tokens: int = 0
    host_fetch_seconds: float = 0.0
    """Duration of the copies back to the pool."""
    host_waited_seconds: float = 0.0
    """Time in which nothing could run because KV was on its way from host or disk."""
    kv_bytes_disk_total: int = 0
    """Maximum size of the files of the disk tier; without one, this and all figures of it are 0."""
    kv_bytes_disk_used: int = 0
    kv_tokens_disk: int = 0
    """Tokens whose KV is on disk, including those of other models and settings."""
    disk_written_tokens: int = 0
    disk_read_tokens: int = 0
    """Tokens read from disk to the host."""
    disk_evicted_tokens: int = 0
    disk_skipped_tokens: int = 0
    """Tokens that were not written, because the disk was too slow or an error occurred."""
    disk_failed_files: int = 0
    """Files that were damaged or could not be read. They are deleted, and their tokens computed again."""
    disk_read_seconds: float = 0.0

    @property
    def rows_saved(self) -> int:
        """Prompt rows not computed because another request computed them.

        While prompts are being prefilled, their missing tokens are included.
        """
        return max(0, self.prompt_tokens - self.computed_prompt_tokens)

    @property
    def host_hidden_seconds(self) -> float:
        """Time in which KV was on its way to the pool from host or disk while something else could run."""
        return max(0.0, self.host_fetch_seconds + self.disk_read_seconds - self.host_waited_seconds)

    @property
    def kv_bytes_saved(self) -> int:
        """KV bytes that attention did not read because rows shared a read."""
        return max(0, self.kv_bytes_unshared - self.kv_bytes_read)
