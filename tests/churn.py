"""The engine under random histories, held against a shadow that knows nothing but tokens.

    python tests/churn.py --steps 1000000

runs for as many engine steps as that, shows progress, and ends with one JSON line of what happened. The short
profile is in `test_churn.py`.
"""

import argparse
import json
import logging
import sys
from collections import Counter
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from consumer import Consumer
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from oracle import extend, logits_of, run_late
from policies import PolicyModel, stamp_under
from rich.progress import Progress

from radixgen import (
    BeamSearchParams,
    CacheHint,
    CompletionOutput,
    Engine,
    InvalidRequest,
    LimitReached,
    Limits,
    RequestOutput,
    SamplingParams,
    SegmentReuse,
    UnknownRequest,
)
from radixgen.cache import BLENDED, BlockProjection, Lock, Node
from radixgen.cache.tokens import exact_len
from radixgen.core import SamplingState
from radixgen.core.reading import EXACT, BigBird, Fading, Press, ReadingPolicy, Window
from radixgen.sampling.beam_search import BeamSearch, Hypothesis
from radixgen.sampling.sampler import fork_seed, likeliest, sample

VOCAB, CONTEXT = 3, 40
LIMITS = Limits(max_waiting=24, max_waiting_tokens=400, max_num_seqs=12, max_pins=4, max_overtaken=6, max_hint_pins=3)
TOKENS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=24)
NAMESPACES = st.sampled_from(["", "", "other"])
CHUNK = 4
FILE_BYTES = 256 + 40 * CHUNK
"""Of a chunk of `StampModel`'s KV"""
HINTS = st.lists(
    st.builds(
        CacheHint,
        st.sampled_from(["retain", "pin", "prefetch", "demote", "demote", "share"]),
        st.one_of(st.none(), st.integers(0, 30)),
        st.sampled_from([None, 1.0, 6.0, 1e6]),
        st.integers(-1, 1),
    ),
    max_size=3,
)
KINDS = st.sampled_from(["cumulative", "delta", "final"])
REUSES = st.sampled_from([None, None, "prefix"])
SEEDS = st.integers(0, 2**64 - 1)
READINGS = st.sampled_from(
    [
        None,
        None,
        None,
        Window(sinks=1, window=5, block=4),
        Window(sinks=0, window=1, block=1, prompt=True),
        BigBird(block=2, window_blocks=2, global_blocks=1, random_blocks=1, seed=1),
        BigBird(block=3, window_blocks=2, global_blocks=0, random_blocks=1, prompt=True),
        Fading(sinks=2, window=3, levels=2, block=4, free=True),
        Fading(sinks=0, window=2, levels=3, block=1, prompt=True, free=True),
        Fading(sinks=1, window=2, levels=2, ratio=3, block=3, prompt=True),
        Press(ratio=0.3, window=2, sinks=1, kernel=1),
        Press(ratio=0.5, window=4, sinks=0, kernel=3),
    ]
)

DISK_LOG = logging.getLogger("radixgen.cache.disk_tier")

events: Counter[str] = Counter()
"""What has happened in this process, in engine steps and in occurrences."""


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    chosen: dict[str, Any] = {
        "n": draw(st.sampled_from([1, 1, 1, 1, 2, 3])),
        "max_tokens": draw(st.integers(1, 16)),
        "ignore_eos": draw(st.booleans()),
        "temperature": 0.0,
        "reading": draw(READINGS),
    }
    if draw(st.booleans()):
        chosen |= {"temperature": draw(st.sampled_from([0.7, 2.0])), "seed": draw(SEEDS)}
    extras = {
        "top_k": st.integers(1, 3),
        "top_p": st.floats(0.3, 1.0),
        "min_p": st.floats(0.0, 0.5),
        "repetition_penalty": st.sampled_from([0.5, 1.3]),
        "presence_penalty": st.sampled_from([-1.0, 0.5]),
        "frequency_penalty": st.sampled_from([-0.5, 1.0]),
        "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-5, 5), max_size=2),
        "stop_token_ids": st.lists(st.integers(0, VOCAB - 1), max_size=1).map(tuple),
        "min_tokens": st.integers(0, chosen["max_tokens"]),
        "logprobs": st.integers(0, 2),
        "prompt_logprobs": st.integers(0, 2),
    }
    for name in draw(st.lists(st.sampled_from(sorted(extras)), max_size=2, unique=True)):
        chosen[name] = draw(extras[name])
    return SamplingParams(**chosen)


@st.composite
def beam_search_params(draw: st.DrawFn) -> BeamSearchParams:
    return BeamSearchParams(
        beam_width=draw(st.sampled_from([1, 2, 3, 6])),
        max_tokens=draw(st.integers(1, 12)),
        min_tokens=draw(st.integers(0, 1)),
        length_penalty=draw(st.sampled_from([0.0, 1.0, 2.0])),
        early_stopping=draw(st.sampled_from([True, False, "never"])),
        ignore_eos=draw(st.booleans()),
        reading=draw(READINGS),
    )


@dataclass
class ShadowSequence:
    """What one sequence must have generated, followed token by token."""

    state: SamplingState
    stamp: bytes
    policy: ReadingPolicy
    seeds: dict[int, int]
    """From which output on which seed draws: a fork has its own from where it parted."""
    told: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)
    ended: str | None = None

    def check_next(self, token: int) -> None:
        """The next token is the one that this prefix draws, alone."""
        assert token == self.draw(), f"{self.state} after {self.told}: {token}"
        self.take(token)

    def take(self, token: int) -> None:
        """The next token, whatever it is."""
        self.told.append(token)
        self.state.output.append(token)
        self.stamp = extend(self.stamp, token, self.policy)

    def draw(self) -> int:
        self.state.seed = self.seeds.get(len(self.told), self.state.seed)
        logits = logits_of(self.stamp, VOCAB)
        return sample(torch.from_numpy(logits)[None], [0], [self.state]).tokens[0]


@dataclass
class Shadow:
    """One request that was accepted."""

    prompt: list[int]
    params: SamplingParams
    kind: str
    namespace: str
    deadline: float
    max_output: int
    sequences: list[ShadowSequence]
    forks: int = 0
    cancelled: bool = False
    failed: bool = False
    started: bool = False
    prompt_told: bool = False
    may_move: bool = False
    """Whether it may take KV from other positions. If it does, nobody knows what it generates."""

    @classmethod
    def of(cls, prompt: list[int], params: SamplingParams, kind: str, namespace: str, deadline: float) -> "Shadow":
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else {0})
        policy, tokens = params.reading or EXACT, np.array(prompt, np.int32)
        stamp = stamp_under(prompt, [], policy)
        return cls(
            prompt,
            params,
            kind,
            namespace,
            deadline,
            min(params.max_tokens, CONTEXT - len(prompt)),
            [
                ShadowSequence(SamplingState(params, 0, i, tokens, [], ends), stamp, policy, {0: params.seed or 0})
                for i in range(params.n)
            ],
        )

    def fork(self, lengths: list[int]) -> "Shadow":
        """The same once more, to part from it where its sequences have generated so many tokens."""
        self.forks += 1
        forked = Shadow.of(self.prompt, self.params, self.kind, self.namespace, self.deadline)
        forked.started, forked.max_output, forked.may_move = True, self.max_output, self.may_move
        for old, new, length in zip(self.sequences, forked.sequences, lengths, strict=True):
            seeds = {at: seed for at, seed in old.seeds.items() if at <= length}
            new.seeds = seeds | {length: fork_seed(seeds[max(seeds)], self.forks)}
        return forked

    @property
    def finished(self) -> bool:
        return all(sequence.ended for sequence in self.sequences)


@dataclass
class ShadowSearch:
    """One beam search that was accepted, run by itself as far as need be."""

    prompt: list[int]
    params: BeamSearchParams
    deadline: float
    finished = False
    cancelled: bool = False
    started: bool = False
    may_move: bool = False

    def check(self, output: RequestOutput, now: float) -> None:
        """It ended as it would alone, or tells how far it had come by some step."""
        assert output.finished and output.prompt_token_ids == self.prompt
        if not output.exact and self.params.reading is None:
            assert self.may_move
            return
        reasons = {one.finish_reason for one in output.outputs}
        told = [(one.token_ids, one.score) for one in output.outputs]
        search = self._begin()
        if reasons <= {"stop", "length"}:
            while not search.done:
                self._step(search)
            assert reasons <= {one.finish_reason for one in search.hypotheses}
            assert told == [(one.token_ids, one.score) for one in search.hypotheses]
            return
        assert len(reasons) == 1 and len({one.stop_reason for one in output.outputs}) == 1
        assert "error" in reasons or self.cancelled or now >= self.deadline
        assert "abort" in reasons or output.outputs[0].stop_reason == repr(RuntimeError("planted"))
        while told != [(one.token_ids, one.score) for one in self._ended(search)]:
            assert not search.done, f"{told} was never reached"
            self._step(search)

    def _begin(self) -> BeamSearch:
        ends = frozenset() if self.params.ignore_eos else frozenset({0})
        return BeamSearch(self.params, min(self.params.max_tokens, CONTEXT - len(self.prompt)), ends)

    def _step(self, search: BeamSearch) -> None:
        policy = self.params.reading or EXACT
        rows = [logits_of(stamp_under(self.prompt, beam.token_ids, policy), VOCAB) for beam in search.beams]
        search.select(likeliest(torch.from_numpy(np.stack(rows)), range(len(rows)), search.num_choices))

    def _ended(self, search: BeamSearch) -> list[Hypothesis]:
        closed = copy(search)
        closed.close("abort")
        return closed.hypotheses


class EngineMachine(RuleBasedStateMachine):
    """Requests come, branch, stop and vanish in a pool that is always full."""

    @initialize(
        slots=st.sampled_from([48, 48, 52, 60, 60, 75, 100, 200, 400]),
        budget=st.sampled_from([1, 5, 16, 16, 64, 64]),
        share=st.sampled_from([True, True, True, True, False]),
        plan=st.sampled_from(["auto", "auto", "unshared", "naive"]),
        block_size=st.sampled_from([1, 2, 3, 5]),
        host_slots=st.sampled_from([0, 20, 100, 400]),
        files=st.sampled_from([0, 0, 2, 10, 1000]),
        max_overtaken=st.sampled_from([0, 6]),
        reuse=st.one_of(
            st.just("prefix"), st.builds(SegmentReuse, st.sampled_from([2, 3, 6]), st.sampled_from([0.0, 0.15, 0.5]))
        ),
        rates=st.sampled_from([(0.0, 0.0, 0.0), (0.0, 0.0, 0.0), (1.0, 0.0, 2.0), (1.0, 2.0, 0.0)]),
        max_mark=st.sampled_from([2, 4, 4]),
    )
    def begin(
        self,
        slots: int,
        budget: int,
        share: bool,
        plan: str,
        block_size: int,
        host_slots: int,
        files: int,
        max_overtaken: int,
        rates: tuple[float, float, float],
        reuse: str | SegmentReuse,
        max_mark: int,
    ) -> None:
        """`rates`: seconds per token of computing, fetching and reading, as if they had been measured."""
        self.now = 0.0
        self.rates = rates
        self.moves = share and reuse != "prefix"
        self.max_mark = max_mark
        self.folder = Path(mkdtemp()) if files and host_slots else None
        DISK_LOG.disabled = True
        self.options: dict[str, Any] = {
            "kv_tokens": slots,
            "host_kv_tokens": host_slots,
            "kv_dir": self.folder,
            "kv_dir_bytes": files * FILE_BYTES if self.folder else None,
            "max_step_tokens": budget,
            "share": share,
            "reuse": reuse if share else "prefix",
            "plan": plan,
            "limits": replace(LIMITS, max_overtaken=max_overtaken),
            "clock": lambda: self.now,
            "debug": True,
        }
        self.block_size = block_size
        self.live: dict[str, Shadow | ShadowSearch] = {}
        self.pins: list[int] = []
        self.texts: list[list[int]] = []
        self.seen: Counter[str] = Counter()
        self._start()

    def _start(self) -> None:
        self.model = PolicyModel(VOCAB, CONTEXT, frozenset({0}))
        with patch("radixgen.model.kv_dir.CHUNK_TOKENS", CHUNK):
            self.engine = Engine(self.model, **self.options)
        self.model.watch(self.engine._core)
        self.engine._core._policies.max_mark = self.max_mark
        self.host = self.engine._core.host
        if self.host is not None:
            self.host.fetches.min_fetch = 1
            costs = self.host.fetches.costs
            costs.seconds_per_computed, costs.seconds_per_fetched, costs.seconds_per_read = self.rates
            if self.folder is not None:
                run_late(self.host._disk)
        self.router = Consumer(self.block_size)
        self.blocks = BlockProjection(self.engine._core.tree, self.router, self.block_size)
        self.host_router = Consumer(self.block_size)
        if self.host is not None:
            self.host_blocks = BlockProjection(self.host.tree, self.host_router, self.block_size)
        self._watch()

    @precondition(lambda self: self.host is not None)
    @rule(copy=st.integers(0, 4), file=st.integers(0, 4))
    def copy_slowly(self, copy: int, file: int) -> None:
        self.host._copies.delay = copy
        if self.folder is not None:
            self.host._disk._reader.delay = self.host._disk._writer.delay = file

    @precondition(lambda self: self.folder is not None and not self.live)
    @rule(kill=st.booleans())
    def restart(self, kill: bool) -> None:
        """Another engine takes over the folder. After `kill -9`, what was not written yet is lost."""
        self.seen["restart"] += 1
        self.pins.clear()
        if kill:
            self.host._disk._writer.shutdown(cancel_futures=True)
        self.engine.close()
        self._start()

    @precondition(lambda self: self.folder is not None)
    @rule(every=st.booleans(), file=st.integers(0, 99), place=st.integers(1, FILE_BYTES), cut=st.booleans())
    def damage_files(self, every: bool, file: int, place: int, cut: bool) -> None:
        """Change a byte, counted from the end, of one file or of all, or cut them off there."""
        paths = sorted(self.folder.glob("*.safetensors"))
        for path in paths if every else paths[file % max(len(paths), 1) :][:1]:
            content = bytearray(path.read_bytes())
            if place <= len(content):
                content[-place] ^= 1
                path.write_bytes(content[:-place] if cut else content)

    # -- what callers do ----------------------------------------------------------------------------------

    @rule(
        prompt=TOKENS,
        params=sampling_params(),
        namespace=NAMESPACES,
        priority=st.sampled_from([0, 0, 0, 1]),
        timeout=st.sampled_from([None, None, 4.0]),
        kind=KINDS,
        hints=st.one_of(st.just([]), HINTS),
        reuse=REUSES,
    )
    def submit(self, **request: Any) -> None:
        self._submit(**request)

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), more=st.lists(st.integers(0, VOCAB - 1), max_size=6), params=sampling_params(), kind=KINDS)
    def continue_conversation(self, data: st.DataObject, more: list[int], params: SamplingParams, kind: str) -> None:
        text = data.draw(st.sampled_from(self.texts))
        self._submit((text + more)[: CONTEXT - 1], params, kind=kind)

    @rule(prompt=TOKENS, params=sampling_params(), count=st.integers(2, 4))
    def burst(self, prompt: list[int], params: SamplingParams, count: int) -> None:
        for _ in range(count):
            self._submit(prompt, params)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), retry=st.booleans())
    def cancel(self, data: st.DataObject, retry: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.live)))
        shadow = self.live[name]
        if shadow.finished or shadow.cancelled:
            return
        self.seen["cancel"] += shadow.started
        self.engine.cancel(name)
        shadow.cancelled = True
        try:
            self.engine.cancel(name)
        except UnknownRequest:
            pass
        else:
            raise AssertionError("a request was cancelled twice")
        if retry and isinstance(shadow, Shadow) and shadow.max_output:
            self._submit(shadow.prompt, shadow.params, kind=shadow.kind)

    @precondition(lambda self: any(not s.finished and not s.cancelled for s in self.live.values()))
    @rule(data=st.data(), n=st.integers(1, 3))
    def fork(self, data: st.DataObject, n: int) -> None:
        alive = sorted(name for name, s in self.live.items() if not s.finished and not s.cancelled)
        name = data.draw(st.sampled_from(alive))
        rows = self.model.rows
        lengths = [len(sequence.output) for sequence in self.engine._core.requests[name].sequences]
        try:
            forks = self.engine.fork(name, n)
        except LimitReached:
            return
        except InvalidRequest:
            assert isinstance(self.live[name], ShadowSearch)
            return
        assert self.model.rows == rows
        self.seen["fork"] += 1
        for fork in forks:
            self.live[fork] = self.live[name].fork(lengths)

    @rule(
        prompt=TOKENS,
        params=beam_search_params(),
        namespace=NAMESPACES,
        priority=st.sampled_from([0, 0, 1]),
        timeout=st.sampled_from([None, None, 4.0]),
        kind=KINDS,
    )
    def search(
        self,
        prompt: list[int],
        params: BeamSearchParams,
        namespace: str,
        priority: int,
        timeout: float | None,
        kind: str,
    ) -> None:
        try:
            name = self.engine.submit(
                prompt, params, namespace=namespace, priority=priority, timeout=timeout, output_kind=kind
            )
        except (InvalidRequest, LimitReached):
            return
        self.live[name] = ShadowSearch(prompt, params, self.now + (timeout or np.inf), may_move=self.moves)

    @rule(prompt=TOKENS, continuations=st.lists(TOKENS.map(lambda t: t[:8]), min_size=1, max_size=3))
    def score(self, prompt: list[int], continuations: list[list[int]]) -> None:
        for continuation in continuations:
            try:
                name = self.engine.submit_score(prompt, continuation)
            except (InvalidRequest, LimitReached):
                continue
            params = SamplingParams(max_tokens=1, prompt_logprobs=0)
            shadow = Shadow.of(prompt + continuation, params, "final", "", np.inf)
            shadow.max_output = 0
            shadow.may_move = self.moves
            self.live[name] = shadow

    @precondition(lambda self: self.texts)
    @rule(
        data=st.data(),
        namespace=NAMESPACES,
        priority=st.integers(0, 2),
        ttl=st.sampled_from([None, 2.0, 9.0]),
        reading=READINGS,
    )
    def pin(
        self, data: st.DataObject, namespace: str, priority: int, ttl: float | None, reading: ReadingPolicy | None
    ) -> None:
        text = data.draw(st.sampled_from(self.texts))
        try:
            pin = self.engine.pin(text, namespace=namespace, priority=priority, ttl=ttl, reading=reading)
        except LimitReached:
            pin = None
        if pin is not None:
            self.seen["pin"] += 1
            self.pins.append(pin)

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), namespace=NAMESPACES, hints=HINTS)
    def hint(self, data: st.DataObject, namespace: str, hints: list[CacheHint]) -> None:
        text = data.draw(st.sampled_from(self.texts))
        results = self.engine.apply_hints(text[: CONTEXT - 1], hints, namespace=namespace)
        for hint, result in zip(hints, results, strict=True):
            assert hint.action == result.action and 0 <= result.num_tokens <= len(text)
            assert bool(result.reason) == (result.status != "accepted")
            self.seen[f"{result.action} {result.status}"] += 1

    @precondition(lambda self: self.pins)
    @rule()
    def unpin(self) -> None:
        self.engine.unpin(self.pins.pop(0))

    @rule(count=st.integers(1, 60))
    def evict(self, count: int) -> None:
        self.engine._core.tree.evict(count)

    @rule(seconds=st.sampled_from([0.5, 5.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(bad=st.sampled_from([[], [VOCAB], [-1], [0] * CONTEXT, ["a"], None, 3]))
    def submit_nonsense(self, bad: object) -> None:
        try:
            self.engine.submit(bad)
        except InvalidRequest:
            return
        raise AssertionError(f"{bad} was accepted")

    @precondition(lambda self: self.live)
    @rule(times=st.integers(1, 3))
    def fail_steps(self, times: int) -> None:
        """The model raises: a request for which it does so twice, the second time alone, ends; all others go on."""
        log = logging.getLogger("radixgen.engine.core")
        log.disabled = True
        for _ in range(times):
            self.model.fail_next = RuntimeError("planted")
            self._step()
        self.model.fail_next = None
        log.disabled = False

    @rule(prompts=st.lists(TOKENS, min_size=2, max_size=5), kind=KINDS)
    def crowd(self, prompts: list[list[int]], kind: str) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
        for prompt in prompts:
            self._submit(prompt, params, kind=kind)

    @rule(count=st.integers(1, 5))
    def step(self, count: int) -> None:
        for _ in range(count):
            self._step()

    # -- what must hold -----------------------------------------------------------------------------------

    def _submit(
        self,
        prompt: list[int],
        params: SamplingParams,
        namespace: str = "",
        priority: int = 0,
        timeout: float | None = None,
        kind: str = "cumulative",
        hints: list[CacheHint] | None = None,
        reuse: str | None = None,
    ) -> None:
        try:
            name = self.engine.submit(
                prompt,
                params,
                namespace=namespace,
                priority=priority,
                timeout=timeout,
                output_kind=kind,
                cache_hints=hints or [],
                reuse=reuse,
            )
        except (InvalidRequest, LimitReached):
            self.engine.check()
            return
        assert name not in self.live
        self.live[name] = Shadow.of(prompt, params, kind, namespace, self.now + (timeout or np.inf))
        self.live[name].may_move = self.moves and reuse is None

    def _step(self) -> None:
        before, rows, sparse = self.engine.stats(), self.model.rows, self.model.sparse_rows
        pressed = self.model.scored_prompts
        outputs = self.engine.step()
        self.engine.check()
        self.router.check(self.engine._core.tree)
        if self.host is not None:
            self.host_router.check(self.host.tree)
        for extent in self.engine._core.tree.pool.free_extents():
            self.model.poison(range(extent.start, extent.end))
        if self.moves:
            self._check_kv()
        after = self.engine.stats()
        self.seen["move"] += after.moved_prompt_tokens - before.moved_prompt_tokens
        self.seen["slots freed"] += any(node.extent_positions is not None for node in self.engine._core.tree.nodes())
        self.seen["press"] += self.model.scored_prompts - pressed
        self.seen["read inexactly"] += self.model.sparse_rows - sparse
        self.seen["save"] += after.host_saved_tokens - before.host_saved_tokens
        self.seen["fetch"] += after.host_fetched_tokens - before.host_fetched_tokens
        self.seen["compute instead of fetching"] += after.host_recomputed_tokens - before.host_recomputed_tokens
        self.seen["read from disk"] += after.disk_read_tokens - before.disk_read_tokens
        self.seen["file failed"] += after.disk_failed_files - before.disk_failed_files
        self.seen["evict"] += after.evicted_tokens - before.evicted_tokens
        self.seen["preempt"] += after.preemptions - before.preemptions
        ahead = self.engine._core.ahead.pending
        assert after.computed_rows + after.wasted_rows + ahead == self.model.rows + self.model.rows_ahead
        self.seen["use what was begun"] += after.computed_rows - before.computed_rows and self.model.rows == rows
        for output in outputs:
            self._compare(output)
        self.seen["park"] += any(
            s.choices is not None for r in self.engine._core.requests.values() for s in r.sequences
        )
        for shadow in self.live.values():
            assert not shadow.cancelled and shadow.deadline > self.now, "a request outlives its end"
        for sequence in self.engine._core.scheduler.running:
            self.live[sequence.request.id].started = True
        self._count()

    def _check_kv(self) -> None:
        """Each slot holds its node's token, and what exact requests find was computed at its own place."""
        for node in self.engine._core.tree.nodes():
            tokens = node.path_tokens(0, node.start + node.computed)
            if not node.computed or any(part.extent_positions is not None for part in node.path()):
                continue
            slots = node.path_slots(0, exact_len(tokens))
            assert self.model.tokens_at(slots[node.start :]) == tokens[node.start : slots.size].tolist()
            if BLENDED not in node.namespace and slots.size:
                assert self.model.is_exact(slots), f"{node} holds moved keys"

    def _compare(self, output: RequestOutput) -> None:
        shadow = self.live[output.request_id]
        if isinstance(shadow, ShadowSearch):
            shadow.check(output, self.now)
            self.seen["search"] += 1
            del self.live[output.request_id]
            return
        moved = not output.exact and shadow.params.reading is None
        assert output.exact <= (shadow.params.reading is None)
        assert output.prompt_token_ids == shadow.prompt[: len(output.prompt_token_ids)]
        assert shadow.kind != "final" or output.finished
        assert not moved or shadow.may_move
        self.seen["moved"] += moved
        for one in output.outputs:
            self._compare_sequence(shadow, one, not moved)
        if output.prompt_logprobs is not None and not moved:
            self._compare_prompt(shadow, output.prompt_logprobs)
        assert output.finished == shadow.finished
        if output.finished:
            del self.live[output.request_id]
            whole = shadow.prompt + shadow.sequences[0].told
            self.texts = [*self.texts, shadow.prompt, whole][-16:]

    def _compare_sequence(self, shadow: Shadow, one: CompletionOutput, exact: bool) -> None:
        sequence = shadow.sequences[one.index]
        assert sequence.ended is None or (shadow.kind == "cumulative" and one.finish_reason == sequence.ended)
        tokens = one.token_ids
        if shadow.kind == "cumulative":
            assert tokens[: len(sequence.told)] == sequence.told
            tokens = tokens[len(sequence.told) :]
        logprobs = one.logprobs[-len(tokens) :] if one.logprobs is not None and tokens else [None] * len(tokens)
        assert (one.logprobs is None) == (shadow.params.logprobs is None)
        for token, found in zip(tokens, logprobs, strict=True):
            if not exact:
                sequence.take(token)
                continue
            if found is not None:
                _check_logprobs(found, sequence.stamp, token, shadow.params.logprobs)
            sequence.check_next(token)
        sequence.ended = one.finish_reason
        self._check_end(shadow, sequence, one)

    def _check_end(self, shadow: Shadow, sequence: ShadowSequence, one: CompletionOutput) -> None:
        told = sequence.told
        over = bool(told) and told[-1] in sequence.state.stop_ids and len(told) > shadow.params.min_tokens
        if sequence.ended == "stop":
            assert over
        elif sequence.ended == "length":
            assert len(told) == shadow.max_output
        elif sequence.ended == "abort":
            assert shadow.cancelled or self.now >= shadow.deadline
        elif sequence.ended == "error":
            assert one.stop_reason == repr(RuntimeError("planted")), one
            self.seen["error"] += 1
        else:
            assert not over and len(told) < shadow.max_output

    def _compare_prompt(self, shadow: Shadow, logprobs: list[dict[int, float] | None]) -> None:
        first = len(shadow.prompt) - len(logprobs) + 1
        assert logprobs[0] is None and (first == 1 or shadow.max_output == 0)
        policy = shadow.params.reading if shadow.params.reading and shadow.params.reading.reads_prompt else EXACT
        stamp = stamp_under(shadow.prompt[:first], [], policy)
        for token, found in zip(shadow.prompt[first:], logprobs[1:], strict=True):
            _check_logprobs(found, stamp, token, shadow.params.prompt_logprobs)
            stamp = extend(stamp, token, policy)
        self.seen["prompt_logprobs"] += 1

    # -- counting -----------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Count splits, and cursors that meet a cached child."""
        tree, split, advance = self.engine._core.tree, self.engine._core.tree.split, self.engine._core.tree.advance

        def counted_split(node: Node, offset: int) -> Node:
            self.seen["split"] += 1
            return split(node, offset)

        def counted_advance(locks: "list[Lock]", token: int) -> Node:
            self.seen["meet"] += token in locks[0].held.children
            return advance(locks, token)

        tree.split, tree.advance = counted_split, counted_advance

    def _count(self) -> None:
        seen, self.seen = self.seen, Counter()
        events["steps"] += 1
        events["evict, split or preempt"] += any(seen[name] for name in ("evict", "split", "preempt"))
        for name, count in seen.items():
            events[name] += bool(count)

    def teardown(self) -> None:
        """All faults over, everything drains, and every slot is free again."""
        if not hasattr(self, "engine"):
            return
        for _ in range(5_000):
            if not self.engine.has_unfinished:
                break
            self._step()
        assert not self.engine.has_unfinished and not self.live, "the engine does not drain"
        while self.pins:
            self.unpin()
        self.now += 1e7  # what hints retain, ends
        while self.engine.pins or (self.host is not None and self.host.fetching):
            self._step()
        self._step()
        self.blocks.check()
        self.engine.reset_prefix_cache()
        self.engine.check()
        assert not self.router.held and not len(self.blocks)
        pool = self.engine._core.tree.pool
        assert pool.free == pool.capacity and self.engine._core.tree.num_nodes == 0
        assert self.host is None or (self.host.tree.num_nodes == 0 and not self.host.tree.pool.used)
        self.engine.close()
        if self.folder is not None:
            assert not list(self.folder.iterdir()), "files are left after a reset"
            self.folder.rmdir()
        DISK_LOG.disabled = False


def _check_logprobs(found: dict[int, float], stamp: bytes, token: int, top: int | None) -> None:
    expected = torch.from_numpy(logits_of(stamp, VOCAB)).log_softmax(-1)
    assert next(iter(found)) == token
    assert len(found) in (top, (top or 0) + 1)
    for one, value in found.items():
        assert abs(value - float(expected[one])) < 1e-5, (found, expected)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    profile = settings(
        max_examples=50,
        stateful_step_count=120,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    with Progress(transient=True) as bar:
        task = bar.add_task("engine steps", total=options.steps)
        while events["steps"] < options.steps:
            run_state_machine_as_test(EngineMachine, settings=profile)
            bar.update(task, completed=events["steps"])
    print(json.dumps(dict(sorted(events.items()))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
