"""`EngineCore`: token ids in, token ids out. One step schedules, plans, runs the model, draws, moves cursors."""

import heapq
import logging
import math
from collections.abc import Mapping
from contextlib import nullcontext

import numpy as np
from torch import Tensor

from radixgen.beam_search import Beam, BeamSearch
from radixgen.cache import ExtentPool, RadixTree, TokenArray
from radixgen.core import (
    BeamSearchParams,
    EngineDead,
    FinishReason,
    Grammar,
    LimitReached,
    Limits,
    QueueFull,
    SamplingParams,
    SamplingState,
    StateGuard,
    Stats,
)
from radixgen.grammar_budget import GrammarBudget
from radixgen.model.base import Model, SupportsStepConfirmation
from radixgen.run_ahead import Ran, RunAhead
from radixgen.sampling import DrawableTokens, SamplerOutput, draw, fork_seed, likeliest, report, sample, token_logprobs
from radixgen.scheduler.batch import Batch
from radixgen.scheduler.beams import branch
from radixgen.scheduler.cost import CostModel
from radixgen.scheduler.pins import Pin
from radixgen.scheduler.planner import PlanMode, Planner
from radixgen.scheduler.scheduler import Scheduler
from radixgen.scheduler.sequence import Request, Sequence

logger = logging.getLogger(__name__)


class EngineCore:
    """Requests, scheduler, tree and model. Its requests were checked by the caller.

    No text, no I/O: time comes in with each call, in seconds of any monotonic clock.
    """

    def __init__(
        self,
        model: Model,
        *,
        kv_tokens: int,
        max_step_tokens: int,
        limits: Limits,
        plan: PlanMode = "auto",
        costs: tuple[CostModel, ...] = (),
        async_scheduling: bool = True,
        seed: int = 0,
        debug: bool = False,
        drawable: DrawableTokens | None = None,
    ) -> None:
        self.model = model
        self._confirm_step = model.confirm_step if isinstance(model, SupportsStepConfirmation) else None
        self._drawable = drawable
        self.limits = limits
        self.seed = seed
        self.guard = StateGuard()
        """The caller's to enter, around each call that changes something"""
        self.tree = RadixTree(ExtentPool(kv_tokens), stamps=debug)
        self.planner = Planner(self.tree, mode=plan, cost=costs)
        self.scheduler = Scheduler(self.tree, self.planner, max_step_tokens=max_step_tokens, limits=limits, debug=debug)
        self.ahead = RunAhead(model, self.scheduler, enabled=async_scheduling)
        self.grammars = GrammarBudget()
        self.requests: dict[str, Request] = {}
        self._ended: list[Sequence] = []
        self._deadlines: list[tuple[float, int, Request]] = []
        self._serial = 0
        self._suspects: list[Request] = []
        self._attempts = 0
        self._steps = 0
        self._computed_rows = 0
        self._logit_rows = 0
        self._generated = 0

    # -- requests -----------------------------------------------------------------------------------------

    def make(
        self,
        prompt: TokenArray,
        params: SamplingParams | BeamSearchParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        namespace: str = "",
        share: bool = True,
        arrived: float = 0.0,
        deadline: float = math.inf,
        score_from: int | None = None,
        grammar: Grammar | None = None,
    ) -> Request:
        """A request with `n` sequences, all in `grammar`, or with the one that a beam search begins with, for `add`.

        `score_from` asks, instead of new tokens, for the log-probability of each prompt token after that
        position; the last one then needs no KV and does not enter the tree. Raises `QueueFull`.
        """
        self.require_room(1, prompt.size)
        self._serial += 1
        beams, params = (params, params.sampling) if isinstance(params, BeamSearchParams) else (None, params)
        assert grammar is not None or not params.structured, "a grammar was not compiled"
        targets, first, max_output = None, 0, min(params.max_tokens, self.model.max_model_len - prompt.size)
        if score_from is not None:
            prompt, targets, first, max_output = prompt[:-1], prompt[1:], score_from, 0
        elif params.prompt_logprobs is not None:
            targets = prompt[1:]
        request = Request(
            id=self._new_id() if request_id is None else request_id,
            serial=self._serial,
            prompt=prompt,
            params=params,
            max_output=max_output,
            priority=priority,
            namespace=namespace,
            arrived=arrived,
            deadline=deadline,
            targets=targets,
            next_read=first,
        )
        seed = params.seed if params.seed is not None else fork_seed(self.seed, self._serial)
        ends = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            ends |= self.model.eos_token_ids | frozenset(params.end_token_ids)
        if beams is not None:
            request.search = BeamSearch(beams, max_output, ends)
        for index in range(params.n):
            own = namespace if share else f"{namespace}\0{self._serial}.{index}"
            state = SamplingState(params, seed, index, prompt, [], ends, grammar.start() if grammar else None)
            request.add_sequence(Sequence(request, index, own, state))
        return request

    def add(self, request: Request) -> None:
        """Queue a request that was made just now."""
        self._register(request)
        self.scheduler.add(request)

    def fork(self, request: Request) -> Request:
        """A live request once more, from the token that it has reached: no KV is copied and none computed. From
        here on its draws are its own, derived from the request's seed and the number of the fork. The caller has
        required room for it.
        """
        self._serial += 1
        request.num_forks += 1
        fork = Request(
            id=self._new_id(),
            serial=self._serial,
            prompt=request.prompt,
            params=request.params,
            max_output=request.max_output,
            priority=request.priority,
            namespace=request.namespace,
            arrived=request.arrived,
            deadline=request.deadline,
            targets=request.targets,
            next_read=request.next_read,
            prompt_logprobs=list(request.prompt_logprobs),
            num_cached_tokens=request.num_cached_tokens,
            queue_seconds=request.queue_seconds,
            num_shared_tokens=request.num_shared_tokens,
            sharing_ended=request.sharing_ended,
            grammar_debt=request.grammar_debt,
        )
        for origin in request.sequences:
            before = origin.sampling
            seed = fork_seed(before.seed, request.num_forks)
            grammar = before.grammar.fork() if before.grammar else None
            state = SamplingState(
                before.params, seed, before.index, before.prompt, list(before.output), before.stop_ids, grammar
            )
            own = origin.namespace
            if own != request.namespace:
                own = f"{request.namespace}\0{self._serial}.{origin.index}"
            sequence = Sequence(fork, origin.index, own, state)
            sequence.logprobs = list(origin.logprobs)
            sequence.finish_reason, sequence.stop_reason = origin.finish_reason, origin.stop_reason
            sequence.ended_by_token = origin.ended_by_token
            fork.add_sequence(sequence)
            if sequence.finish_reason is None:
                self.scheduler.fork(origin, sequence)
            else:
                self._ended.append(sequence)
        self._register(fork)
        return fork

    def require_room(self, requests: int, tokens: int) -> None:
        """Raise `QueueFull` where the queue cannot take so much more."""
        waiting, limits = self.scheduler.waiting, self.limits
        if len(waiting) + requests > limits.max_waiting:
            raise QueueFull("waiting", len(waiting) + requests, f"at most {limits.max_waiting} requests wait")
        if waiting.num_tokens + tokens > limits.max_waiting_tokens and len(waiting):
            limit = f"at most {limits.max_waiting_tokens} prompt tokens wait"
            raise QueueFull("waiting_tokens", waiting.num_tokens + tokens, limit)

    def end(self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End a live sequence. Its tokens stay cached."""
        sequence.finish(reason, stop_reason)
        self.scheduler.drop(sequence)

    def abort(self, request: Request, reason: FinishReason = "abort", stop_reason: str | None = None) -> None:
        """End what is still live of a request; the next step returns it."""
        if request.search is not None and not request.finished:
            request.search.close(reason)
            self._conclude(request, request.search, stop_reason)
            return
        for sequence in request.sequences:
            if sequence.finish_reason is None:
                self.end(sequence, reason, stop_reason)
                self._ended.append(sequence)

    def forget(self, request: Request) -> None:
        """A finished request was reported: its id is free again."""
        assert request.finished and self.requests[request.id] is request
        del self.requests[request.id]

    @property
    def num_attempts(self) -> int:
        """Steps that ran or failed."""
        return self._attempts

    # -- pins ---------------------------------------------------------------------------------------------

    def pin(self, tokens: TokenArray, namespace: str, priority: int, expires: float) -> Pin | None:
        """Keep what is cached of `tokens`; None where nothing of it is. Raises `LimitReached`."""
        self.require_pins(1)
        return self.scheduler.pins.add(tokens, namespace, priority, expires)

    def require_pins(self, count: int) -> None:
        """Raise `LimitReached` where there may not be so many pins more."""
        pins = len(self.scheduler.pins) + count
        if pins > self.limits.max_pins:
            raise LimitReached("pins", pins, f"at most {self.limits.max_pins} prefixes are pinned")

    def unpin(self, pin_id: int) -> bool:
        """False where the pin is gone already."""
        found = pin_id in self.scheduler.pins
        if found:
            self.scheduler.pins.release(pin_id)
        return found

    @property
    def pins(self) -> frozenset[int]:
        """Those that hold."""
        return frozenset(pin.id for pin in self.scheduler.pins)

    # -- one step -----------------------------------------------------------------------------------------

    def step(self, now: float) -> list[Sequence]:
        """Run one step. Returns the sequences that gained a token, or ended since the step before; one may be there
        twice.

        Where the model raises, the step is undone. The requests that had a part in it then run alone, one step
        each, and one for which it raises again ends with `error`. A failed assertion of our own, `EngineDead`, and an
        interrupt go on to the caller. An interrupt while the model runs undoes the step and leaves the engine usable.
        """
        self.grammars.begin_step()
        self._expire(now)
        self.scheduler.now = now
        batch = self._schedule()
        if batch is None:
            return self.take_ended()
        self._attempts += 1
        try:
            ran = self.ahead.claim(batch) or self._run(batch)
        except BaseException as error:
            self.scheduler.rollback(batch)
            if not isinstance(error, Exception):
                self.guard.undone()
                raise
            if isinstance(error, AssertionError | EngineDead):
                raise
            self._suspect(batch, error)
            return self.take_ended()
        self.scheduler.commit(batch)
        del self._suspects[:1]
        self._steps += 1
        self._computed_rows += batch.num_rows
        self._logit_rows += ran.logits.shape[0]
        self._score(batch, ran)
        self._branch(batch, ran)
        self._draw(batch, ran)
        if self._confirm_step is not None:
            self._confirm_step()
        return self.take_ended() + batch.drawing

    def _run(self, batch: Batch) -> Ran:
        frozen = self.scheduler.freeze(batch)
        logits = self.model.run(frozen.plan, frozen.token_ids, frozen.slots, frozen.logit_rows)
        return Ran(logits, frozen.drawing, frozen.branching, frozen.reading)

    def _schedule(self) -> Batch | None:
        """The next step: of all requests, or while there are suspects, of the first of them that can run."""
        while self._suspects:
            batch = self.scheduler.schedule(only=self._suspects[0])
            if batch is not None:
                return batch
            del self._suspects[0]
        batch = self.scheduler.schedule(admit=not self.ahead.pending)
        if batch is None and self.ahead.pending:
            self.ahead.drop()
            batch = self.scheduler.schedule()
        return batch

    def _suspect(self, batch: Batch, error: Exception) -> None:
        """The model raised: each request of the step is tried alone, and one that was alone is to blame."""
        requests = self.scheduler.requests_of(batch)
        logger.error("a step of %d requests failed", len(requests), exc_info=error)
        if self._suspects:
            self.abort(self._suspects.pop(0), "error", repr(error))
        else:
            self._suspects = requests

    def take_ended(self) -> list[Sequence]:
        """The sequences that ended outside a step since the last one, each once."""
        ended, self._ended = self._ended, []
        return ended

    def _expire(self, now: float) -> None:
        """End the requests whose deadline has passed, and the pins that have expired."""
        self.scheduler.pins.expire(now)
        while self._deadlines and self._deadlines[0][0] <= now:
            self.abort(heapq.heappop(self._deadlines)[2], "abort", "deadline")

    def _score(self, batch: Batch, ran: Ran) -> None:
        """Log-probabilities of prompt tokens; a request that wants nothing else ends with the last of them."""
        at = 0
        for request, rows in batch.reads:
            index = ran.reading[at : at + len(rows)]
            at += len(rows)
            try:
                self._score_one(request, ran.logits[index])
            except Exception as error:
                logger.exception("the prompt of request %s could not be scored", request.id)
                self.abort(request, "error", repr(error))
                continue
            if not request.reading and not request.max_output:
                self.abort(request, "length")

    def _score_one(self, request: Request, logits: Tensor) -> None:
        """Score the next targets of a prompt by logits `[targets, vocab]`."""
        assert request.targets is not None
        stop = request.next_read + logits.shape[0]
        top = [request.params.prompt_logprobs or 0] * logits.shape[0]
        request.prompt_logprobs += token_logprobs(logits, request.targets[request.next_read : stop], top)
        request.next_read = stop

    def _branch(self, batch: Batch, ran: Ran) -> None:
        """Beam searches go on by a generation."""
        rows: dict[Request, dict[Sequence, int]] = {}
        for sequence, row in zip(batch.branching, ran.branching, strict=True):
            rows.setdefault(sequence.request, {})[sequence] = row
        for request, found in rows.items():
            assert request.search is not None
            try:
                beams = self._choose(request, request.search, ran.logits, found)
            except AssertionError:
                raise
            except FloatingPointError as error:
                self.abort(request, "error", str(error))
                continue
            except Exception as error:
                logger.exception("the beams of request %s could not go on", request.id)
                self.abort(request, "error", repr(error))
                continue
            self._generated += len(found)
            if beams is None:
                for sequence in found:
                    self.scheduler.park(sequence)
            elif request.search.done:
                self._conclude(request, request.search)
            else:
                branch(self.scheduler, request, beams)

    def _choose(
        self, request: Request, search: BeamSearch, logits: Tensor, rows: dict[Sequence, int]
    ) -> list[Beam] | None:
        """The next generation; None until all beams of this one have their logits, as those do whose `rows` these are.
        Raises `FloatingPointError`.
        """
        found = likeliest(logits, list(rows.values()), search.num_choices, self._drawable)
        for sequence, choices in zip(rows, found, strict=True):
            if not np.isfinite(choices.log_probs[0]):
                raise FloatingPointError("the model's logits are not finite")
            sequence.choices = choices
        ready = [sequence.choices for sequence in request.sequences if sequence.choices is not None]
        return search.select(ready) if len(ready) == len(request.sequences) else None

    def _conclude(self, request: Request, search: BeamSearch, stop_reason: str | None = None) -> None:
        """A search is over: its hypotheses take the place of its beams."""
        state = request.sequences[0].sampling
        for sequence in list(request.sequences):
            self.scheduler.drop(sequence)
            request.remove_sequence(sequence)
        for index, found in enumerate(search.hypotheses):
            own = SamplingState(state.params, state.seed, index, state.prompt, found.token_ids, state.stop_ids)
            sequence = Sequence(request, index, request.namespace, own)
            sequence.finish_reason = found.finish_reason
            sequence.ended_by_token = found.finish_reason == "stop"
            stops = found.finish_reason == "stop" and found.token_ids[-1] in state.params.stop_token_ids
            sequence.stop_reason = found.token_ids[-1] if stops else stop_reason
            request.add_sequence(sequence)
        self._ended += request.sequences

    def _draw(self, batch: Batch, ran: Ran) -> None:
        """Draw tokens, end the sequences that are done, move the others' cursors."""
        if not batch.drawing:
            return
        alone = len(self.requests) == 1
        drawn = self._sample(batch, ran, self.grammars.compute_masks(batch.drawing, alone=alone))
        going: list[tuple[Sequence, int]] = []
        for index, (sequence, token) in enumerate(zip(batch.drawing, drawn.tokens, strict=True)):
            if sequence.finish_reason is not None:
                continue
            if token < 0:
                self.end(sequence, "error", drawn.faults.get(index, "the model's logits are not finite"))
                continue
            try:
                with self.grammars.counted(sequence.request) if sequence.sampling.grammar else nullcontext():
                    end = self._take(sequence, token, drawn.logprobs.get(index))
            except AssertionError:
                raise
            except Exception as error:
                logger.exception("request %s could not go on in its grammar", sequence.request.id)
                self.end(sequence, "error", repr(error))
                continue
            if end is None:
                going.append((sequence, token))
            else:
                own = sequence.ended_by_token and token in sequence.request.params.stop_token_ids
                self.end(sequence, end, token if own else None)
        self.grammars.end_step(alone=alone)
        self._generated += len(drawn.tokens)
        self.scheduler.advance(going)

    def _take(self, sequence: Sequence, token: int, logprobs: dict[int, float] | None) -> FinishReason | None:
        """Give a sequence the token that was drawn for it. Returns why it ends, where that is the last one. Raises what
        its grammar raises; then the token is not taken.
        """
        request, state, output = sequence.request, sequence.sampling, sequence.output
        grammar, params = state.grammar, request.params
        is_end = token in state.stop_ids and (
            len(output) >= params.min_tokens or (grammar is not None and not grammar.allows(token))
        )
        if grammar is not None and not is_end:
            if grammar.complete:  # which its mask told, and there was no end token to draw
                return "stop"
            grammar.accept(token)
        output.append(token)
        if logprobs is not None:
            sequence.logprobs.append(logprobs)
        sequence.ended_by_token = is_end
        if is_end or (grammar is not None and grammar.complete):
            return "stop"
        return "length" if len(output) >= request.max_output else None

    def _sample(self, batch: Batch, ran: Ran, faults: Mapping[int, str]) -> SamplerOutput:
        """All draws at once, and the next step begun with them; where drawing raises, one by one, and those for whom it
        raises end with `error`. Those with `faults` draw nothing, and the next step waits for their end.
        """
        if faults:
            return self._sample_others(batch, ran, faults)
        states = [sequence.sampling for sequence in batch.drawing]
        try:
            draws = draw(ran.logits, ran.drawing, states, self._drawable)
        except Exception:
            logger.exception("drawing %d tokens at once failed; drawing them one by one", len(states))
            return self._sample_each(batch, ran, {})
        if not self._suspects:
            self.ahead.begin(batch, draws)
        return report(ran.logits, ran.drawing, states, draws.wait())

    def _sample_others(self, batch: Batch, ran: Ran, faults: Mapping[int, str]) -> SamplerOutput:
        """Of those without faults, all at once."""
        places = [place for place in range(len(batch.drawing)) if place not in faults]
        try:
            rows, states = [ran.drawing[at] for at in places], [batch.drawing[at].sampling for at in places]
            some = sample(ran.logits, rows, states, self._drawable)
        except Exception:
            logger.exception("drawing %d tokens at once failed; drawing them one by one", len(places))
            return self._sample_each(batch, ran, faults)
        tokens = [-1] * len(batch.drawing)
        for place, token in zip(places, some.tokens, strict=True):
            tokens[place] = token
        return SamplerOutput(tokens, {places[at]: found for at, found in some.logprobs.items()}, dict(faults))

    def _sample_each(self, batch: Batch, ran: Ran, before: Mapping[int, str]) -> SamplerOutput:
        tokens, logprobs, faults = [], {}, dict(before)
        for index, (row, sequence) in enumerate(zip(ran.drawing, batch.drawing, strict=True)):
            if index in before:
                tokens.append(-1)
                continue
            try:
                one = sample(ran.logits, [row], [sequence.sampling], self._drawable)
            except Exception as error:
                logger.exception("request %s could not be sampled", sequence.request.id)
                tokens.append(-1)
                faults[index] = repr(error)
                continue
            tokens += one.tokens
            if one.logprobs:
                logprobs[index] = one.logprobs[0]
        return SamplerOutput(tokens, logprobs, faults)

    # -- the engine itself --------------------------------------------------------------------------------

    def stats(self) -> Stats:
        tree, pool, scheduler = self.tree, self.tree.pool, self.scheduler
        held = pool.used - tree.reserved_tokens - tree.evictable_tokens + tree.unscheduled_tokens
        return Stats(
            steps=self._steps,
            prompt_tokens=scheduler.prompt_tokens,
            cached_prompt_tokens=scheduler.cached_prompt_tokens,
            sharing_ended=dict(scheduler.sharing_ended),
            computed_prompt_tokens=scheduler.computed_prompt_tokens,
            computed_rows=self._computed_rows,
            logit_rows=self._logit_rows,
            wasted_rows=self.ahead.wasted_rows,
            generated_tokens=self._generated,
            kv_tokens_total=pool.capacity,
            kv_tokens_used=pool.used - tree.reserved_tokens,
            kv_tokens_reserved=tree.reserved_tokens,
            kv_tokens_fenced=pool.fenced,
            kv_tokens_cached=tree.evictable_tokens,
            kv_tokens_pinned=scheduler.pins.num_tokens,
            evicted_tokens=tree.evicted_tokens,
            preemptions=scheduler.preemptions,
            kv_bytes_read=self.model.kv_bytes_read,
            kv_bytes_unshared=self.model.kv_bytes_unshared,
            num_running=len(scheduler.running),
            num_waiting=scheduler.waiting.num_sequences,
            num_waiting_tokens=scheduler.waiting.num_tokens,
            num_pins=len(scheduler.pins),
            num_nodes=tree.num_nodes,
            shared_tokens=max(scheduler.path_tokens - held, 0),
            failed_captures=getattr(self.model, "failed_captures", 0),
        )

    def check(self) -> None:
        """Assert every invariant: slots have one owner, references are those of the live cursors and pins, counts
        add up, bounds hold, and each request is in one legal state (I1 to I12).
        """
        self.tree.check()
        scheduler = self.scheduler
        locks: dict[int, int] = {}
        for holder in (*scheduler.running, *scheduler.pins):
            lock = holder.cursor if isinstance(holder, Sequence) else holder.lock
            assert lock is not None
            locks[lock.held.id] = locks.get(lock.held.id, 0) + 1
        for node in self.tree.nodes():
            assert node.lock_count == locks.get(node.id, 0), f"{node} has a lock without a cursor or pin"
        for sequence in scheduler.running:
            assert sequence.cursor is not None and sequence.finish_reason is None
            node = sequence.cursor.held
            assert np.array_equal(node.path_tokens(), sequence.tokens()), "a cursor left its tokens"
            assert node.namespace == sequence.namespace
        for pin in scheduler.pins:
            assert pin.lock.held.end == pin.num_tokens and pin.lock.held.complete, "a pin left its tokens"
        scheduler.waiting.check()
        assert all(s.cursor is None and s.finish_reason is None for s in scheduler.waiting)
        followed = {one.followed: one for one in scheduler.waiting if one.followed is not None}
        assert followed.keys() == set(self.tree.followed()), "a match is followed that nobody waits for"
        for match, sequence in followed.items():
            assert match.namespace == sequence.namespace and np.array_equal(match.tokens, sequence.tokens())
        self._check_bounds()
        self._check_states()

    def _check_bounds(self) -> None:
        scheduler, limits = self.scheduler, self.limits
        new = sum(s.request.num_cached_tokens is None and s.index == 0 for s in scheduler.waiting)
        assert new <= limits.max_waiting and len(scheduler.running) <= limits.max_num_seqs
        assert len(scheduler.pins) <= limits.max_pins

    def _check_states(self) -> None:
        waiting, running = list(self.scheduler.waiting), list(self.scheduler.running)
        live = [s for r in self.requests.values() for s in r.sequences if s.finish_reason is None]
        parked = [s for s in live if s.choices is not None]
        assert len(waiting) + len(running) + len(parked) == len(live)
        assert {*waiting, *running, *parked} == {*live}
        for name, request in self.requests.items():
            assert request.id == name
            assert request.unfinished == sum(s.finish_reason is None for s in request.sequences)
            for sequence in request.sequences:
                assert len(sequence.output) <= request.max_output
                assert sequence.finish_reason is None or sequence.cursor is None
                assert sequence.choices is None or sequence.cursor is None
            if request.search is not None and not request.finished:
                assert [s.output for s in request.sequences] == [beam.token_ids for beam in request.search.beams]
                assert any(s.choices is None for s in request.sequences), "beams wait for nobody"

    def close(self) -> None:
        """Release the model; live requests end without a report."""
        self.requests.clear()
        self.model.release()

    # -- inside -------------------------------------------------------------------------------------------

    def _register(self, request: Request) -> None:
        self.requests[request.id] = request
        if request.deadline == math.inf:
            return
        heapq.heappush(self._deadlines, (request.deadline, request.serial, request))
        if len(self._deadlines) > 2 * len(self.requests) + 64:
            self._deadlines = [entry for entry in self._deadlines if not entry[2].finished]
            heapq.heapify(self._deadlines)

    def _new_id(self) -> str:
        serial = self._serial
        while (name := f"request-{serial}") in self.requests:
            serial += 1
        return name
