"""`EngineCore`: the engine's step, from token ids to token ids."""

import logging
from contextlib import nullcontext
from dataclasses import replace
from typing import Unpack

import numpy as np
from torch import Tensor

from radixgen.cache import DiskTier, ExtentPool, HostTier, KVCopies, KVMover, RadixTree, TokenArray
from radixgen.core import (
    BeamSearchParams,
    EngineDead,
    FinishReason,
    Grammar,
    Limits,
    SamplingParams,
    SegmentReuse,
    StateGuard,
    Stats,
)
from radixgen.core.reading import EXACT, ReadingPolicy
from radixgen.engine.batch_draws import BatchDraws
from radixgen.engine.check import check_engine
from radixgen.engine.deadlines import Deadlines
from radixgen.engine.make_request import make_request
from radixgen.engine.request_options import CoreOptions
from radixgen.engine.run_ahead import RunAhead, StepLogits, run_step
from radixgen.engine.sequence_updates import append_token, conclude_search, fork_sequence, request_error
from radixgen.kernels.drawable_tokens import DrawableTokens
from radixgen.model.base import Model, SupportsStepConfirmation
from radixgen.sampling.beam_search import Beam, BeamSearch
from radixgen.sampling.grammar_budget import GrammarBudget
from radixgen.sampling.sampler import SamplerOutput, likeliest, token_logprobs
from radixgen.scheduler.batch import Batch
from radixgen.scheduler.beams import branch, conclude
from radixgen.scheduler.cache_hints import CacheHints
from radixgen.scheduler.cost import CostModel
from radixgen.scheduler.planner import PlanMode, Planner
from radixgen.scheduler.reading_marks import PolicyMarks
from radixgen.scheduler.scheduler import Scheduler
from radixgen.scheduler.sequence import Request, Sequence, prompt_namespace, prompt_path

logger = logging.getLogger(__name__)


class EngineCore:
    """Runs the steps of checked requests: scheduler, tree and model.

    It handles no text and does no I/O. The caller gives the time, in seconds of any monotonic clock.
    """

    def __init__(
        self,
        model: Model,
        *,
        kv_tokens: int,
        host_kv: KVCopies | None = None,
        disk: DiskTier | None = None,
        kv_mover: KVMover | None = None,
        reuse: SegmentReuse | None = None,
        max_step_tokens: int,
        limits: Limits,
        plan: PlanMode = "auto",
        costs: tuple[CostModel, ...] = (),
        async_scheduling: bool = True,
        seed: int = 0,
        debug: bool = False,
        drawable: DrawableTokens | None = None,
        reading: ReadingPolicy = EXACT,
    ) -> None:
        """`reading`: policy of requests without one."""
        self.model = model
        self._confirm_step = model.confirm_step if isinstance(model, SupportsStepConfirmation) else None
        self._drawable = drawable
        self._kv_mover = kv_mover
        self.limits = limits
        self.seed = seed
        self.reading = reading
        self.guard = StateGuard()
        """To be entered by the caller around each call that changes something"""
        self.tree = RadixTree(ExtentPool(kv_tokens), stamps=debug)
        self.planner = Planner(self.tree, mode=plan, cost=costs)
        self.host = HostTier(self.tree, host_kv, disk, stamps=debug) if host_kv else None
        self.scheduler = Scheduler(
            self.tree,
            self.planner,
            max_step_tokens=max_step_tokens,
            limits=limits,
            host=self.host,
            reuse=reuse,
            debug=debug,
        )
        self.hints = CacheHints(self.tree, self.scheduler.pins, self.host, limits)
        self.ahead = RunAhead(model, self.scheduler, enabled=async_scheduling)
        self.grammars = GrammarBudget()
        self.requests: dict[str, Request] = {}
        trees = [self.tree, *([self.host.tree] if self.host else [])]
        self._policies = PolicyMarks(self.planner, trees, self.requests, self.guard, model.vocab_size)
        self._ended: list[Sequence] = []
        self._deadlines = Deadlines()
        self._serial = 0
        self._suspects: list[Request] = []
        self._steps = self._computed_rows = self._logit_rows = self._generated = 0

    # -- requests -----------------------------------------------------------------------------------------

    def make(
        self,
        prompt: TokenArray,
        params: SamplingParams | BeamSearchParams,
        *,
        request_id: str | None = None,
        share: bool = True,
        score_from: int | None = None,
        grammar: Grammar | None = None,
        **options: Unpack[CoreOptions],
    ) -> Request:
        """Make a request for `add`, with `n` sequences constrained by `grammar`, or with the first beam of a search.

        With `score_from`, the request generates nothing; it gets the log-probability of each prompt token after that
        position. The last token then needs no KV and does not enter the tree. Raises `QueueFull` and `InvalidRequest`.
        """
        self.require_room(1, prompt.size)
        reading = params.reading or self.reading
        mark = self._policies.mark(reading)
        self._serial += 1
        return make_request(
            self.model,
            prompt,
            params,
            request_id=self._new_id() if request_id is None else request_id,
            serial=self._serial,
            seed=self.seed,
            share=share,
            score_from=score_from,
            grammar=grammar,
            reading=reading,
            mark=mark,
            **options,
        )

    def place_of(self, prompt: TokenArray, reading: ReadingPolicy | None, namespace: str) -> tuple[TokenArray, str]:
        """Return a prompt as the tree has it if requests in `namespace` read it under this policy, by default the
        engine's; and in which namespace.
        """
        reading = reading or self.reading
        path = prompt_path(prompt, reading, self._policies.mark(reading))
        return path, prompt_namespace(prompt, reading, namespace)

    def add(self, request: Request) -> None:
        """Queue a new request."""
        self._register(request)
        self.scheduler.add(request)

    def fork(self, request: Request) -> Request:
        """Copy a live request at its current token. No KV is copied or computed. The copy's draws derive from the
        request's seed and the number of the fork. The caller must call `require_room` first.
        """
        self._serial += 1
        request.num_forks += 1
        fork = replace(
            request,
            id=self._new_id(),
            serial=self._serial,
            prompt_logprobs=list(request.prompt_logprobs),
            overtaken=0,
            num_forks=0,
            hints=(),
            hint_results=(),
            sequences=[],
            waiting=[],
            unfinished=0,
        )
        for origin in request.sequences:
            sequence = fork_sequence(origin, fork, request.num_forks)
            fork.add_sequence(sequence)
            if sequence.finish_reason is None:
                self.scheduler.fork(origin, sequence)
            else:
                self._ended.append(sequence)
        self._register(fork)
        return fork

    def require_room(self, requests: int, tokens: int) -> None:
        """Raise `QueueFull` if the queue has no room for this many more requests or prompt tokens."""
        self.scheduler.waiting.require_room(requests, tokens, self.limits)

    def _end(self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End a live sequence. Its computed tokens stay cached."""
        sequence.finish(reason, stop_reason)
        self.scheduler.drop(sequence)

    def abort(self, request: Request, reason: FinishReason = "abort", stop_reason: str | None = None) -> None:
        """End the live sequences of a request; the next step returns them."""
        self.hints.drop(request)
        if request.search is not None and not request.finished:
            request.search.close(reason)
            self._conclude(request, request.search, stop_reason)
            return
        for sequence in request.sequences:
            if sequence.finish_reason is None:
                self._end(sequence, reason, stop_reason)
                self._ended.append(sequence)

    def forget(self, request: Request) -> None:
        """Remove a finished request that was reported, so that its id is free again."""
        assert request.finished and self.requests[request.id] is request
        self.hints.end(request)
        del self.requests[request.id]

    @property
    def fetching(self) -> bool:
        """Whether KV is on its way to the pool, or has arrived and is to be pinned for a hint."""
        return self.host is not None and (self.host.fetching or any(self.hints.fetches()))

    @property
    def num_attempts(self) -> int:
        """Number of steps that ran or failed."""
        return self.tree.pool.num_steps

    # -- one step -----------------------------------------------------------------------------------------

    def step(self, now: float) -> list[Sequence]:
        """Run one step.

        Return the sequences that got a token in this step or ended since the last. The list may contain duplicates.

        If the model raises an exception, the step is undone and each of its requests is tried alone, in a step of its
        own. A request that fails again ends with `error`. `AssertionError`, `EngineDead` and interrupts are raised to
        the caller. An interrupt while the model runs or a fetch is waited for undoes the step and leaves the engine
        usable.
        """
        batch = self._schedule(now)
        logits = self._run(batch) if batch is not None else None
        if batch is None or logits is None:
            return self.take_ended()
        self._commit(batch, logits)
        self.hints.answer((s.request for s in (*batch.drawing, *batch.branching)), now)
        self._score(batch, logits)
        self._branch(batch, logits)
        if batch.drawing:
            draws = self._draw(batch, logits)
            self._begin_next(batch, draws)
            self._advance(batch, draws.wait())
        if self._confirm_step is not None:
            self._confirm_step()
        return self.take_ended() + batch.drawing

    def _schedule(self, now: float) -> Batch | None:
        """Schedule the next step: of all requests, or of the first suspect that can run, if there are any."""
        self.grammars.begin_step()
        self._expire(now)
        self.hints.begin_step(now)
        self.scheduler.now = now
        while self._suspects:
            batch = self.scheduler.schedule(only=self._suspects[0])
            if batch is not None:
                return batch
            del self._suspects[0]
        batch = self.scheduler.schedule(admit=not self.ahead.pending)
        if batch is None and self.ahead.pending:
            self.ahead.drop()
            batch = self.scheduler.schedule()
        while batch is None and self.requests and self._wait_for_fetch():
            batch = self.scheduler.schedule()
        return batch

    def _wait_for_fetch(self) -> bool:
        """Wait until a fetch can go on. Returns False if none can."""
        with self.guard.interruptible():
            return self.host is not None and self.host.fetches.wait()

    def _run(self, batch: Batch) -> StepLogits | None:
        """Return the logits of the step, or None if the model failed and the step was undone."""
        try:
            return self.ahead.claim(batch) or self._run_model(batch)
        except BaseException as error:
            self.scheduler.rollback(batch)
            if not isinstance(error, Exception):
                self.guard.undone()
                raise
            if isinstance(error, AssertionError | EngineDead):
                raise
            self._suspect(batch, error)
            return None

    def _run_model(self, batch: Batch) -> StepLogits:
        step = self.scheduler.freeze(batch)
        for moves in batch.moves:
            assert self._kv_mover is not None
            self._kv_mover.move(moves)
        return run_step(self.model, step)

    def _suspect(self, batch: Batch, error: Exception) -> None:
        """Handle a failed step: try each of its requests alone, or end the request if it was alone."""
        requests = self.scheduler.requests_of(batch)
        logger.error("a step of %d requests failed", len(requests), exc_info=error)
        if self._suspects:
            self.abort(self._suspects.pop(0), "error", repr(error))
        else:
            self._suspects = requests

    def _commit(self, batch: Batch, logits: StepLogits) -> None:
        """Mark what was scheduled as computed; it is cached from now on."""
        self.scheduler.commit(batch, logits.keys)
        del self._suspects[:1]
        self._steps += 1
        self._computed_rows += batch.num_rows
        self._logit_rows += len(logits.values)

    def _score(self, batch: Batch, logits: StepLogits) -> None:
        """Score prompt tokens, and end requests that want nothing else once all are scored."""
        at = 0
        for request, rows in batch.scoring:
            index = logits.scoring[at : at + len(rows)]
            at += len(rows)
            try:
                self._score_rows(request, logits.whole[index])
            except Exception as error:
                self.abort(
                    request, "error", request_error(error, request, "the prompt of request %s could not be scored")
                )
                continue
            if not request.scoring and not request.max_output:
                self.abort(request, "length")

    def _score_rows(self, request: Request, logits: Tensor) -> None:
        """Score the next targets of a prompt, given their logits `[targets, vocab]`."""
        assert request.targets is not None
        stop = request.next_scored + logits.shape[0]
        top = [request.params.prompt_logprobs or 0] * logits.shape[0]
        request.prompt_logprobs += token_logprobs(logits, request.targets[request.next_scored : stop], top)
        request.next_scored = stop

    def _branch(self, batch: Batch, logits: StepLogits) -> None:
        """Advance beam searches by one token per beam."""
        rows: dict[Request, dict[Sequence, int]] = {}
        for sequence, row in zip(batch.branching, logits.branching, strict=True):
            rows.setdefault(sequence.request, {})[sequence] = row
        for request, row_of in rows.items():
            assert request.search is not None
            try:
                beams = self._choose(request, request.search, logits.whole, row_of)
            except FloatingPointError as error:
                self.abort(request, "error", str(error))
                continue
            except Exception as error:
                message = "the beams of request %s could not go on"
                self.abort(request, "error", request_error(error, request, message))
                continue
            self._generated += len(row_of)
            if beams is None:
                for sequence in row_of:
                    self.scheduler.park(sequence)
            elif request.search.done:
                self._conclude(request, request.search)
            else:
                branch(self.scheduler, request, beams)

    def _choose(
        self, request: Request, search: BeamSearch, logits: Tensor, rows: dict[Sequence, int]
    ) -> list[Beam] | None:
        """Store the choices of the beams in `rows`, given their logits rows. Returns the next beams, or None until all
        current ones have choices. Raises `FloatingPointError` if logits are not finite.
        """
        likely = likeliest(logits, list(rows.values()), search.num_choices, self._drawable)
        for sequence, choices in zip(rows, likely, strict=True):
            if not np.isfinite(choices.log_probs[0]):
                raise FloatingPointError("the model's logits are not finite")
            sequence.choices = choices
        ready = [sequence.choices for sequence in request.sequences if sequence.choices is not None]
        return search.select(ready) if len(ready) == len(request.sequences) else None

    def _conclude(self, request: Request, search: BeamSearch, stop_reason: str | None = None) -> None:
        """End a search: replace its beams by its hypotheses."""
        conclude(self.scheduler, request, [hypothesis.token_ids for hypothesis in search.hypotheses])
        conclude_search(request, search, stop_reason)
        self._ended += request.sequences

    def _draw(self, batch: Batch, logits: StepLogits) -> BatchDraws:
        """Begin to draw tokens, except for sequences whose grammar took too long or failed."""
        faults = self.grammars.compute_masks(batch.drawing, alone=self._alone)
        return BatchDraws(logits.values, logits.drawing, batch.drawing, self._drawable, faults)

    def _begin_next(self, batch: Batch, draws: BatchDraws) -> None:
        """Let the device begin the next step before the tokens have reached the host."""
        if draws.all is not None and not self._suspects:
            self.ahead.begin(batch, draws.all)

    def _advance(self, batch: Batch, drawn: SamplerOutput) -> None:
        """Append the tokens to their sequences, end those that are done, and move the other cursors."""
        going: list[tuple[Sequence, int]] = []
        for index, (sequence, token) in enumerate(zip(batch.drawing, drawn.tokens, strict=True)):
            if sequence.finish_reason is not None:
                continue
            if token < 0:
                self._end(sequence, "error", drawn.faults.get(index, "the model's logits are not finite"))
                continue
            try:
                with self.grammars.counted(sequence.request) if sequence.sampling.grammar else nullcontext():
                    end = append_token(sequence, token, drawn.logprobs.get(index))
            except Exception as error:
                message = "request %s could not go on in its grammar"
                self._end(sequence, "error", request_error(error, sequence.request, message))
                continue
            if end is None:
                going.append((sequence, token))
            else:
                own = sequence.ended_by_token and token in sequence.request.params.stop_token_ids
                self._end(sequence, end, token if own else None)
        self.grammars.end_step(alone=self._alone)
        self._generated += len(drawn.tokens)
        self.scheduler.advance(going)

    def take_ended(self) -> list[Sequence]:
        """Return and clear the list of sequences that ended other than by a draw."""
        ended, self._ended = self._ended, []
        return ended

    def _expire(self, now: float) -> None:
        """Abort requests past their deadline, and release expired pins."""
        self.scheduler.pins.expire(now)
        for request in self._deadlines.take_expired(now):
            self.abort(request, "abort", "deadline")

    # -- the engine itself --------------------------------------------------------------------------------

    def reset_prefix_cache(self) -> int:
        """Evict everything that is not locked, from device, host and disk. Returns the number of tokens."""
        evicted = self.host.reset() if self.host is not None else 0
        return evicted + self.tree.reset()

    def stats(self) -> Stats:
        tree, pool, scheduler = self.tree, self.tree.pool, self.scheduler
        loading = sum(extent.length for extent in tree.loading)
        held = pool.used - loading - tree.reserved_tokens - tree.evictable_tokens + tree.unscheduled_tokens
        return Stats(
            steps=self._steps,
            prompt_tokens=scheduler.admission.prompt_tokens,
            cached_prompt_tokens=scheduler.admission.cached_prompt_tokens,
            sharing_ended=dict(scheduler.admission.sharing_ended),
            computed_prompt_tokens=scheduler.computed_prompt_tokens,
            moved_prompt_tokens=scheduler.moved_prompt_tokens,
            computed_rows=self._computed_rows,
            logit_rows=self._logit_rows,
            wasted_rows=self.ahead.wasted_rows,
            generated_tokens=self._generated,
            kv_tokens_total=pool.capacity,
            kv_tokens_used=pool.used - tree.reserved_tokens - loading,
            kv_tokens_reserved=tree.reserved_tokens,
            kv_tokens_fenced=pool.fenced,
            kv_tokens_cached=tree.evictable_tokens,
            kv_tokens_pinned=scheduler.pins.num_tokens,
            evicted_tokens=tree.evicted_tokens,
            preemptions=scheduler.preemptions,
            kv_bytes_read=self.model.kv_bytes_read,
            kv_bytes_unshared=self.model.kv_bytes_unshared,
            kv_bytes_per_token=self.model.kv_bytes_per_token,
            num_running=len(scheduler.running),
            num_waiting=scheduler.waiting.num_sequences,
            num_waiting_tokens=scheduler.waiting.num_tokens,
            num_pins=len(scheduler.pins),
            num_nodes=tree.num_nodes,
            shared_tokens=max(scheduler.path_tokens - held, 0),
            **{f"hints_{status}": count for status, count in self.hints.counts.items()},
            failed_captures=getattr(self.model, "failed_captures", 0),
            **(self.host.figures() if self.host is not None else {}),
        )

    def check(self) -> None:
        """Assert every invariant, between two steps."""
        check_engine(self.scheduler, self.hints, self.requests, self.limits)

    def close(self) -> None:
        """Release the model. Live requests end without an output."""
        self.requests.clear()
        if self.host is not None:
            self.host.close()
        self.model.release()

    # -- inside -------------------------------------------------------------------------------------------

    @property
    def _alone(self) -> bool:
        """Whether there is only one request, so that it can delay no other."""
        return len(self.requests) == 1

    def _register(self, request: Request) -> None:
        self.requests[request.id] = request
        self.hints.add(request)
        self._deadlines.add(request)

    def _new_id(self) -> str:
        serial = self._serial
        while (name := f"request-{serial}") in self.requests:
            serial += 1
        return name
