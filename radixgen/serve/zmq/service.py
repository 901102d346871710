"""What front ends may do to one engine: requests and utilities in, messages out. No sockets, no threads, no clock."""

import logging
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import uuid4

import numpy as np
from msgspec import UNSET

from radixgen.cache import TokenArray
from radixgen.core import (
    CompletionOutput,
    InvalidRequest,
    RadixgenError,
    RequestOutput,
    SamplingParams,
    UnknownRequest,
    check_integer,
    check_text,
)
from radixgen.engine.engine import Engine
from radixgen.engine.output_processor import scores_of
from radixgen.serve.zmq import wire, wire_params
from radixgen.serve.zmq.counters import PeerCounters
from radixgen.serve.zmq.salts import salted_namespace
from radixgen.serve.zmq.utility import PENDING, UTILITIES
from radixgen.version import VERSION

logger = logging.getLogger(__name__)

Message = wire.Output | wire.Reply
Compile = Callable[["Peer", str, SamplingParams, Callable[[Exception | None], None]], Callable[[], object]]
"""Compiles a grammar elsewhere, for a peer and a namespace; what it calls afterwards, it calls between two steps.
Returns a function that drops a grammar for which nobody waits any more.
"""


@dataclass(eq=False, slots=True)
class Peer:
    """One front end's process, as the engine's side sees it."""

    name: str
    counters: PeerCounters = field(default_factory=PeerCounters)
    requests: dict[str, "LiveRequest"] = field(default_factory=dict)
    """Its live requests by its own ids"""
    pins: set[int] = field(default_factory=set)
    gone: bool = False
    """Whether it is sent nothing more"""
    salt_key: bytes = b""
    """Secret from which its cache salts become namespaces; empty: the worker's"""


@dataclass(eq=False, slots=True)
class LiveRequest:
    """A live request of a peer, which calls it `name`; the engine calls it `id`."""

    peer: Peer
    name: str
    id: str
    params: SamplingParams
    eos_token_id: int | None = None
    started: bool = False
    """Whether an output had its prompt's counts"""
    stop_reason: str | None = None
    """Why it was aborted"""
    drop_grammar: Callable[[], object] | None = None
    """While its grammar is not compiled"""


@dataclass(eq=False, slots=True)
class _Scoring:
    """A call that waits for the scores of some continuations, in their order by the engine's ids."""

    peer: Peer
    call_id: int
    waiting: set[str]
    scores: dict[str, list[float] | None]


class Service:
    """One engine's requests of any number of peers. Belongs to the thread that steps.

    Every accepted request ends in exactly one output with a finish reason, whatever its peer, the engine or other
    requests do; a request that is refused has no other output. `take` gives the messages.
    """

    def __init__(self, engine: Engine, salt_key: bytes, *, compile_grammar: Compile | None = None) -> None:
        """
        salt_key: secret from which cache salts become namespaces, of peers that have none of their own.
        compile_grammar: without one, the grammars of requests are compiled between two steps.
        """
        self.engine = engine
        self.draining = False
        """While it drains, new requests are turned away."""
        self._salt_key = salt_key
        self._compile = compile_grammar
        self._requests: dict[str, LiveRequest] = {}
        self._scorings: dict[str, _Scoring] = {}
        self._messages: deque[tuple[Peer, Message]] = deque()
        self._serial = 0
        self._started = 0
        self._reported = 0, 0, 0

    # -- requests -----------------------------------------------------------------------------------------

    def add(self, peer: Peer, request: wire.Add) -> None:
        """Queue a request. If it can't be served, it ends at once with `error` and the reason."""
        name = request.request_id
        if name in peer.requests:
            if not peer.counters.duplicates:
                logger.warning(
                    "%s: dropped a request under the id of a live one, and will not mention others", peer.name
                )
            peer.counters.duplicates += 1
            return
        if self.draining:
            peer.counters.turned_away += 1
            self._send(peer, wire.Output(name, [], finish_reason=_FINISH["abort"], stop_reason="draining"))
            return
        try:
            self._add(peer, request)
        except AssertionError:
            raise
        except Exception as error:
            if not isinstance(error, RadixgenError):
                logger.exception("%s: a request could not be queued", peer.name)
            self.refuse(peer, name, error)

    def _add(self, peer: Peer, request: wire.Add) -> None:
        engine, limits = self.engine, self.engine.limits
        engine.inputs.check_name("request_id", request.request_id)
        wire_params.check_served(request)
        sampling = request.sampling_params
        assert sampling is not None and request.prompt_token_ids is not None
        tokens = engine.tokenize(_as_array(request.prompt_token_ids, self.max_len))
        params = wire_params.to_params(sampling, self.max_len - tokens.size, limits)
        namespace = self.namespace(request.cache_salt, peer.salt_key)
        hints = wire_params.to_hints(sampling.cache_hints)
        hints += wire_params.to_kv_hints(request.kv_hints, tokens.size, limits.max_cache_hints - len(hints))
        live = LiveRequest(peer, request.request_id, self._new_id(), params, sampling.eos_token_id)

        def submit() -> None:
            # The wire's lower priorities go first, the engine's higher ones do.
            engine.submit(
                tokens,
                params,
                request_id=live.id,
                priority=-request.priority,
                namespace=namespace,
                output_kind="delta",
                cache_hints=hints,
                hint_owner=sampling.hint_owner,
            )

        if params.structured and self._compile is not None:
            compiled = partial(self._compiled, live, submit)
            live.drop_grammar = self._compile(peer, namespace, params, compiled)
            self._open(live)
        else:
            submit()
            self._open(live)
        if request.abort_immediately:
            self.abort(peer, [request.request_id])

    def _compiled(self, live: LiveRequest, submit: Callable[[], None], error: Exception | None) -> None:
        """Submit a request whose grammar was compiled, or end it with the error."""
        live.drop_grammar = None
        if live.id not in self._requests:
            return
        try:
            if error is not None:
                raise error
            submit()
        except AssertionError:
            raise
        except Exception as fault:
            self._end(live, "error", _format_error(fault))

    def refuse(self, peer: Peer, name: str, error: Exception) -> None:
        """End a request that never began."""
        peer.counters.refused += 1
        self._send(peer, _refusal(name, error))

    def refuse_unread(self, peer: Peer, name: str, error: Exception) -> None:
        """End a request of which only the name could be read; not where that is a live one's."""
        if name not in peer.requests:
            peer.counters.unread += 1
            self._send(peer, _refusal(name, error))

    def fork(self, peer: Peer, name: str, names: list[str]) -> None:
        """As `Engine.fork`; the forks' names are the peer's. Raises what that raises, and `InvalidRequest`."""
        live = peer.requests.get(name)
        if live is None:
            raise UnknownRequest("request_id", name, "names no live request")
        check_integer("len(names)", len(names), 1, self.engine.limits.max_n)
        taken = set(peer.requests)
        for fork_name in names:
            self.engine.inputs.check_name("names", fork_name)
            if fork_name in taken:
                raise InvalidRequest("names", fork_name, "is taken")
            taken.add(fork_name)
        for fork_name, fork_id in zip(names, self.engine.fork(live.id, len(names)), strict=True):
            peer.counters.forks += 1
            self._open(LiveRequest(peer, fork_name, fork_id, live.params, live.eos_token_id))

    def abort(self, peer: Peer, names: Iterable[str], stop_reason: str | None = None) -> None:
        """Abort those of these requests that are live."""
        for name in names:
            live = peer.requests.get(name)
            if live is not None:
                self._abort(live, stop_reason)

    def abort_overflowed(self, peer: Peer, stop_reason: str) -> None:
        """Abort all requests of a front end that does not read."""
        peer.counters.overflow_aborted += len(peer.requests)
        self.abort(peer, list(peer.requests), stop_reason)

    def abort_all(self, stop_reason: str) -> None:
        """End every request with `abort`, and every call that is not answered yet."""
        for live in list(self._requests.values()):
            self._abort(live, stop_reason)
        for scoring in dict.fromkeys(self._scorings.values()):
            self._give_up(scoring, stop_reason)

    def leave(self, peer: Peer) -> None:
        """A front end is gone: abort its requests, release its pins, send it nothing more."""
        peer.gone = True
        self.abort(peer, list(peer.requests))
        for pin in peer.pins:
            self.engine.unpin(pin)
        peer.pins.clear()
        for name, scoring in list(self._scorings.items()):
            if scoring.peer is peer:
                self._cancel(name)

    def fail(self, reason: str) -> None:
        """The engine failed as a whole: end every open request and call."""
        for live in list(self._requests.values()):
            self._end(live, "error", reason)
        for scoring in dict.fromkeys(self._scorings.values()):
            self._send(scoring.peer, wire.Reply(scoring.call_id, reason))
        self._scorings.clear()

    # -- utilities ----------------------------------------------------------------------------------------

    def call(self, peer: Peer, call: wire.Call) -> None:
        """Run a utility, and reply with its result or what it raised."""
        try:
            result = self._call(peer, call)
        except AssertionError:
            raise
        except Exception as error:
            if not isinstance(error, RadixgenError):
                logger.exception("%s: %s could not be called", peer.name, call.method)
            self._send(peer, wire.Reply(call.call_id, _format_error(error)))
        else:
            if result is not PENDING:
                self._send(peer, wire.Reply(call.call_id, None, (None, result)))

    def _call(self, peer: Peer, call: wire.Call) -> Any:
        utility = UTILITIES.get(call.method)
        if utility is None:
            raise InvalidRequest("method", call.method, f"must be one of {', '.join(UTILITIES)}")
        return utility(self, peer, call)

    def score(
        self, peer: Peer, call_id: int, prompt: list[int], continuations: list[list[int]], salt: str | None
    ) -> None:
        """As `Engine.score`; the reply follows when all are scored. Raises what `Engine.submit_score` raises; then none
        is queued.
        """
        if not 0 < len(continuations) <= self.engine.limits.max_num_seqs:
            most = self.engine.limits.max_num_seqs
            raise InvalidRequest("len(continuations)", len(continuations), f"must be from 1 to {most}")
        scoring = _Scoring(peer, call_id, set(), {})
        namespace = self.namespace(salt, peer.salt_key)
        tokens = self.engine.tokenize(_as_array(prompt, self.max_len))
        try:
            for continuation in continuations:
                name, rest = self._new_id(), _as_array(continuation, self.max_len)
                self.engine.submit_score(tokens, rest, request_id=name, namespace=namespace)
                scoring.scores[name] = None
                scoring.waiting.add(name)
                self._scorings[name] = scoring
        except Exception:
            for name in list(scoring.waiting):
                self._cancel(name)
            raise

    # -- steps --------------------------------------------------------------------------------------------

    @property
    def num_live(self) -> int:
        return len(self._requests)

    @property
    def max_len(self) -> int:
        """The longest prompt plus output that can be served, in tokens: the last one needs no slot."""
        return min(self.engine.max_model_len, self.engine.inputs.kv_tokens + 1)

    def report(self, outputs: Iterable[RequestOutput]) -> None:
        """Queue messages about the outputs of a step."""
        for output in outputs:
            live = self._requests.get(output.request_id)
            if live is not None:
                self._report(live, output)
            elif output.request_id in self._scorings and output.finished:
                self._scored(output)

    def take(self) -> list[tuple[Peer, Message]]:
        """The messages since the last call, in order."""
        messages = list(self._messages)
        self._messages.clear()
        return messages

    def load(self) -> wire.Load:
        """The load now, and how much of prompts was cached since the last call."""
        stats = self.engine.stats()
        used = (stats.kv_tokens_used + stats.kv_tokens_reserved) / max(stats.kv_tokens_total, 1)
        admitted = self._started, stats.prompt_tokens, stats.cached_prompt_tokens
        requests, queries, hits = (now - before for now, before in zip(admitted, self._reported, strict=True))
        self._reported = admitted
        return wire.Load(stats.num_running, stats.num_waiting, used, wire.PrefixCacheStats(requests, queries, hits))

    def ready(self) -> wire.Ready:
        """Describe the engine, for front ends."""
        slots, max_num_seqs = self.engine.inputs.kv_tokens, self.engine.limits.max_num_seqs
        return wire.Ready(
            max_model_len=self.max_len,
            num_gpu_blocks=slots // wire.BLOCK_SIZE,
            dtype=self.engine.dtype,
            instance_id=uuid4().hex,
            radixgen_version=VERSION,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=self.engine.max_step_tokens,
            kv_cache_size_tokens=slots,
            kv_cache_max_concurrency=slots / self.max_len,
            eos_token_ids=sorted(self.engine.eos_token_ids),
            host_kv_tokens=self.engine.stats().kv_tokens_host_total or UNSET,
        )

    def namespace(self, salt: str | None, key: bytes = b"") -> str:
        """Return the namespace of a cache salt: its HMAC under `key`, or the service's own key.

        So it cannot be guessed. Requests without a salt share ''. Raises `InvalidRequest`.
        """
        if not salt:
            return ""
        most = self.engine.limits.max_salt_len
        if len(salt) > most:
            raise InvalidRequest("len(cache_salt)", len(salt), f"must be at most {most}")
        check_text("cache_salt", salt)
        return salted_namespace(salt, key or self._salt_key)

    def check(self) -> None:
        """Assert the engine's invariants, and that each request is its peer's."""
        self.engine.check()
        for live in self._requests.values():
            assert live.peer.requests[live.name] is live

    # -- inside -------------------------------------------------------------------------------------------

    def _open(self, live: LiveRequest) -> None:
        self._requests[live.id] = live
        live.peer.requests[live.name] = live
        live.peer.counters.accepted += 1

    def _abort(self, live: LiveRequest, stop_reason: str | None) -> None:
        try:
            self.engine.cancel(live.id)
        except UnknownRequest:
            if not self.engine.knows(live.id):  # its grammar is still being compiled
                self._end(live, "abort", stop_reason)
        else:
            live.stop_reason = stop_reason

    def _cancel(self, scoring_id: str) -> None:
        del self._scorings[scoring_id]
        with suppress(UnknownRequest):  # it has ended, and its output is on its way
            self.engine.cancel(scoring_id)

    def _end(self, live: LiveRequest, reason: str, stop_reason: str | None) -> None:
        """End a request that the engine does not have."""
        finish = _FINISH[reason]
        self._close(live, reason)
        self._send(live.peer, wire.Output(live.name, [], finish_reason=finish, stop_reason=stop_reason))

    def _close(self, live: LiveRequest, reason: str) -> None:
        if live.drop_grammar is not None:
            live.drop_grammar()
        del self._requests[live.id]
        del live.peer.requests[live.name]
        finished = live.peer.counters.finished
        finished[reason] = finished.get(reason, 0) + 1

    def _report(self, live: LiveRequest, output: RequestOutput) -> None:
        """Queue a message about what is new of a request."""
        (new,) = output.outputs
        if new.finish_reason == "stop" and new.stop_reason is None and live.eos_token_id is not None:
            _add_end(new, live.eos_token_id)
        message = wire.Output(live.name, new.token_ids)
        if new.logprobs:
            message.new_logprobs = wire.pack_logprobs(new.logprobs, live.params.logprobs or 0)
        if output.prompt_logprobs is not None:
            positions = [logprobs for logprobs in output.prompt_logprobs if logprobs is not None]
            message.new_prompt_logprobs = wire.pack_logprobs(positions, live.params.prompt_logprobs or 0)
        if not live.started:
            live.started = True
            self._started += 1
            prompt, cached = output.num_prompt_tokens, output.num_cached_tokens
            message.prefill_stats = wire.PrefillStats(prompt, prompt - cached, cached, cached)
            if output.cache_hints:
                message.prefill_stats.cache_hints = wire_params.from_results(output.cache_hints)
        if output.finished:
            assert new.finish_reason is not None
            message.finish_reason = _FINISH[new.finish_reason]
            message.stop_reason = live.stop_reason if new.finish_reason == "abort" else new.stop_reason
            if new.finish_reason == "stop" and new.stop_reason == live.eos_token_id:
                message.stop_reason = None
            self._close(live, new.finish_reason)
        self._send(live.peer, message)

    def _scored(self, output: RequestOutput) -> None:
        """Take the score of one continuation; the reply follows the last."""
        scoring = self._scorings.pop(output.request_id)
        scoring.waiting.discard(output.request_id)
        try:
            scoring.scores[output.request_id] = scores_of(output)
        except RadixgenError as error:
            self._give_up(scoring, _format_error(error))
            return
        if not scoring.waiting:
            self._send(scoring.peer, wire.Reply(scoring.call_id, None, (None, list(scoring.scores.values()))))

    def _give_up(self, scoring: _Scoring, reason: str) -> None:
        for name in scoring.waiting:
            self._cancel(name)
        self._send(scoring.peer, wire.Reply(scoring.call_id, reason))

    def _send(self, peer: Peer, message: Message) -> None:
        if not peer.gone:
            self._messages.append((peer, message))

    def _new_id(self) -> str:
        self._serial += 1
        return f"served-{self._serial}"


_FINISH: dict[str, int] = {reason: number for number, reason in enumerate(wire.FINISH)}


def _add_end(output: CompletionOutput, token: int) -> None:
    """Add the end token that a sequence did without as its grammar was complete: front ends leave out the text of the
    last token of a sequence that stopped.
    """
    output.token_ids = [*output.token_ids, token]
    if output.logprobs is not None:
        output.logprobs = [*output.logprobs, {token: 0.0}]


def _as_array(tokens: list[int], most: int) -> TokenArray:
    """Token ids whose range the engine checks. Raises `InvalidRequest`."""
    if len(tokens) > most:
        raise InvalidRequest("len(prompt_token_ids)", len(tokens), f"at most {most} tokens can be served")
    try:
        return np.array(tokens, np.int64)
    except OverflowError:
        raise InvalidRequest("prompt_token_ids", "…", "holds an integer of more than 64 bits") from None


def _refusal(name: str, error: Exception) -> wire.Output:
    return wire.Output(name, [], finish_reason=_FINISH["error"], stop_reason=_format_error(error))


def _format_error(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}"[:1_000]
