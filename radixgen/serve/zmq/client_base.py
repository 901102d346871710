"""What `Client` and `AsyncClient` share: the front end, and the requests that they send."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypedDict
from uuid import uuid4

from radixgen.core import (
    CacheHint,
    CompletionOutput,
    HintResult,
    InvalidRequest,
    Limits,
    PromptTokens,
    RadixgenError,
    RequestFailed,
    RequestOutput,
    SamplingParams,
    check_integer,
    check_texts,
)
from radixgen.serve.zmq import wire, wire_params
from radixgen.serve.zmq.balancer import Blocks
from radixgen.serve.zmq.endpoint import Curve
from radixgen.serve.zmq.front import FrontEnd, RemoteWorker

Tokens = Sequence[int]


class ClientOptions(TypedDict, total=False):
    """Options of a request that a client sends."""

    cache_salt: str | None
    """Only requests with the same salt share prefixes"""
    priority: int
    """Requests with a higher priority go first; 0 by default"""
    worker: int | None
    """Index of the worker; by default the router chooses one"""
    cache_hints: Sequence[CacheHint]
    """As for `Engine.submit`"""
    hint_owner: str | None


@dataclass(eq=False)
class ClientRequest:
    """A request that was sent, and the state by which its outputs are decoded."""

    request_id: str
    prompt: list[int]
    params: SamplingParams
    worker: RemoteWorker
    blocks: Blocks
    """Block hashes of the prompt, by which it was routed"""
    eos: frozenset[int]
    """End tokens that are not reported as the stop reason"""
    cached: int = 0
    cache_hints: tuple[HintResult, ...] = ()
    cumulative_logprob: float = 0.0
    finished: bool = False

    def close(self, front: FrontEnd) -> None:
        """Abort the request unless it has finished, and drop further outputs."""
        if not self.finished:
            self.finished = True
            with suppress(RadixgenError):
                front.abort(self.worker, [self.request_id])
                front.forget(self.worker, self.request_id)

    def decode(self, output: wire.Output) -> RequestOutput:
        """Convert an output of the worker to that of an engine."""
        logprobs = prompt_logprobs = None
        if output.prefill_stats is not None:
            self.cached = output.prefill_stats.num_cached_tokens
            self.cache_hints = wire_params.to_results(output.prefill_stats.cache_hints or ())
        if self.params.logprobs is not None:
            logprobs = wire.unpack_logprobs(output.new_logprobs) if output.new_logprobs else []
            self.cumulative_logprob += sum(next(iter(position.values())) for position in logprobs)
        if output.new_prompt_logprobs is not None:
            prompt_logprobs = [None, *wire.unpack_logprobs(output.new_prompt_logprobs)]
        finish, stop = output.finish_reason, output.stop_reason
        if finish == 0 and stop in self.eos:
            stop = None
        self.finished = finish is not None
        completion = CompletionOutput(
            index=0,
            text="",
            token_ids=output.new_token_ids,
            finish_reason=None if finish is None else wire.FINISH[finish],
            stop_reason=stop,
            cumulative_logprob=self.cumulative_logprob if logprobs is not None else None,
            logprobs=logprobs,
        )
        return RequestOutput(
            request_id=self.request_id,
            prompt_tokens=PromptTokens(self.prompt),
            outputs=[completion],
            finished=self.finished,
            num_cached_tokens=self.cached,
            cache_hints=self.cache_hints,
            prompt_logprobs=prompt_logprobs,
            exact=self.params.reading is None or self.params.reading.exact,
        )


class BaseClient:
    """Front end, request ids, and choice of a worker."""

    def __init__(
        self,
        address: str | None = None,
        *,
        workers: int = 1,
        curve: Curve | None = None,
        insecure_tcp: bool = False,
        limits: Limits | None = None,
        timeout: float = 60.0,
        own_salts: bool = False,
    ) -> None:
        """
        address: handshake address, `ipc://…` or `tcp://…`; default: ipc in a new folder.
        workers: number of workers to wait for before the first request is sent.
        curve: keys for TCP; without them only loopback is allowed, unless `insecure_tcp`.
        timeout: seconds to wait for the workers, and for the reply to a call.
        own_salts: whether requests with a cache salt are routed by their cached prefixes, too; then they share no
            prefix with other front ends.

        Raises `InvalidRequest`, `InsecureEndpoint`.
        """
        check_integer("workers", workers, 1, 2**16)
        self._front = FrontEnd(
            address, curve=curve, insecure_tcp=insecure_tcp, limits=limits or Limits(), own_salts=own_salts
        )
        self._workers = workers
        self._timeout = timeout
        self._tag = uuid4().hex[:12]
        self._waited = False

    @property
    def address(self) -> str:
        """Handshake address, for `radixgen worker --handshake`."""
        return self._front.address

    @property
    def workers(self) -> dict[int, wire.Ready]:
        """Handshake message of each connected worker, by its index."""
        return {worker.index: worker.ready for worker in self._front.live() if worker.ready is not None}

    def fail(self, error: RadixgenError) -> None:
        """Close, and fail open requests and calls with `error`. May be called from any thread."""
        self._front.close(error)

    def _make_request(
        self,
        prompt: Tokens,
        params: SamplingParams | None,
        *,
        cache_salt: str | None = None,
        priority: int = 0,
        worker: int | None = None,
        cache_hints: Sequence[CacheHint] = (),
        hint_owner: str | None = None,
        beside: ClientRequest | None = None,
    ) -> tuple[ClientRequest, wire.Add]:
        """Create a request and its message. Raises `InvalidRequest`, `EngineDead`.

        beside: a request with the same prompt, whose worker is used. The other options are `ClientOptions`.
        """
        params = params if params is not None else SamplingParams()
        check_texts("cache_salt", cache_salt)
        if beside is None:
            tokens = [int(token) for token in prompt]
            blocks = self._front.blocks(tokens, cache_salt)
            remote = self._front.choose(worker, blocks)
        else:
            tokens, blocks, remote = beside.prompt, beside.blocks, beside.worker
        eos = remote.ready.eos_token_ids if remote.ready is not None else []
        sampling = wire_params.from_params(params, eos)
        sampling.cache_hints, sampling.hint_owner = wire_params.from_hints(cache_hints), hint_owner
        request_id = self._new_id()
        add = wire.Add(request_id, tokens, sampling_params=sampling, cache_salt=cache_salt, priority=-priority)
        unseen = frozenset([*eos, *params.end_token_ids]) - frozenset(params.stop_token_ids)
        return ClientRequest(request_id, tokens, params, remote, blocks, unseen), add

    def _make_forks(self, request: ClientRequest, n: int) -> list[ClientRequest]:
        check_integer("n", n, 1, self._front.limits.max_n)
        # The first output of a fork holds all tokens generated so far, with their log-probabilities.
        fork = replace(request, finished=False, cumulative_logprob=0.0)
        return [replace(fork, request_id=self._new_id()) for _ in range(n)]

    def _select_worker(self, index: int | None) -> RemoteWorker:
        """Worker with this index; without an index, the only worker. Raises `InvalidRequest`, `EngineDead`."""
        if index is None and len(self._front.live()) > 1:
            raise InvalidRequest("worker", index, f"must be one of {sorted(self.workers)}")
        return self._front.choose(index)

    def _new_id(self) -> str:
        return f"{self._tag}-{self._front.new_serial()}"


def result_of(item: wire.Output | wire.Reply) -> Any:
    """Result of a call, from its reply. Raises `RequestFailed`."""
    assert isinstance(item, wire.Reply)
    if item.failure_message is not None:
        raise RequestFailed(item.failure_message)
    return item.result[1] if item.result is not None else None
