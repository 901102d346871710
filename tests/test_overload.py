"""Open-loop load on a simulated clock, with the token-stamp oracle: more than it can serve, the engine serves on.

Requests arrive on schedule whatever the engine does. Nothing here is timed: a step lasts what a cost model says.
"""

import gc
import tracemalloc
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from oracle import StampModel
from sizes import size
from torch import Tensor

from radixgen import Engine, Limits, QueueFull, SamplingParams
from radixgen.core import Plan

VOCAB, HOT_SHARE = 8, 0.96
LIMITS = Limits(max_num_seqs=16, max_waiting=48, max_overtaken=16)
PARAMS = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


class ClockedModel(StampModel):
    """A step lasts 20 ms, and 1 ms more for each row."""

    now = 0.0

    def run(self, plan: Plan, token_ids: Any, slots: Any, logit_rows: NDArray[np.int64]) -> Tensor:
        logits = super().run(plan, token_ids, slots, logit_rows)
        self._spend(plan.num_rows)
        return logits

    def run_ahead(self, plan: Plan, tokens: Tensor, slots: Any, logit_rows: NDArray[np.int64]) -> Tensor:
        logits = super().run_ahead(plan, tokens, slots, logit_rows)
        self._spend(plan.num_rows)
        return logits

    def _spend(self, rows: int) -> None:
        self.now += (0.02 + 0.001 * rows) if rows else 0.0


@dataclass
class Load:
    """What an open-loop run showed."""

    offered: int = 0
    refused: int = 0
    seconds: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)
    waits: list[tuple[int, int]] = field(default_factory=list)
    """Of each cold request, how many others were admitted after it came and before it, and how many waited when it
    came.
    """
    sizes: list[int] = field(default_factory=list)
    """Bytes that Python holds, from time to time."""

    @property
    def goodput(self) -> float:
        """Requests a second that were served to their end in time."""
        return self.reasons["length"] / self.seconds


def prompts(count: int, seed: int = 0) -> list[tuple[bool, list[int]]]:
    """96 % under one of four hot prefixes; the rest have nothing in common with anyone."""
    rng = np.random.default_rng(seed)
    hot = rng.integers(0, VOCAB, (4, 24)).tolist()
    chosen = []
    for _ in range(count):
        cold = rng.random() >= HOT_SHARE
        start = rng.integers(0, VOCAB, 24).tolist() if cold else hot[rng.integers(4)]
        chosen.append((cold, start + rng.integers(0, VOCAB, 4).tolist()))
    return chosen


def offer(
    rate: float, count: int, *, limits: Limits = LIMITS, timeout: float = 60.0, watch_memory: bool = False
) -> Load:
    """`count` requests at `rate` a second, Poisson, then nothing until all have ended."""
    model = ClockedModel(VOCAB, 64)
    load = Load(offered=count)
    times = np.cumsum(np.random.default_rng(1).exponential(1 / rate, count)).tolist()
    coming = list(zip(times, prompts(count), strict=True))[::-1]
    admitted = 0
    waiting: dict[str, tuple[bool, int, int]] = {}
    ended: set[str] = set()
    with Engine(model, kv_tokens=600, max_step_tokens=64, limits=limits, clock=lambda: model.now) as engine:
        while coming or engine.has_unfinished:
            if not engine.has_unfinished:
                model.now = max(model.now, coming[-1][0])
            while coming and coming[-1][0] <= model.now:
                cold, prompt = coming.pop()[1]
                try:
                    name = engine.submit(prompt, PARAMS, timeout=timeout, output_kind="final")
                    waiting[name] = cold, admitted, len(engine._core.scheduler.waiting) - 1
                except QueueFull:
                    load.refused += 1
            for output in engine.step():
                assert output.finished and output.request_id not in ended
                ended.add(output.request_id)
                load.reasons[str(output.outputs[0].finish_reason)] += 1
                waiting.pop(output.request_id, None)
            for sequence in engine._core.scheduler.running:
                if sequence.request.id in waiting:
                    cold, before, ahead = waiting.pop(sequence.request.id)
                    admitted += 1
                    load.waits += [(admitted - before - 1, ahead)] if cold else []
            if watch_memory and engine.stats().steps % 5 == 0:
                gc.collect()
                load.sizes.append(tracemalloc.get_traced_memory()[0])
        load.seconds = model.now
        engine.check()
        assert len(ended) + load.refused == count
        assert not engine._core.requests and not engine._loop.outputs._requests
        assert engine.stats().kv_tokens_used == engine.stats().kv_tokens_cached
    return load


@cache
def capacity() -> float:
    """Requests a second, with always one more to serve."""
    return offer(rate=1e6, count=LIMITS.max_waiting).goodput


@cache
def at(times: int) -> Load:
    return offer(capacity() * times, 600 * times)


def test_goodput_holds_under_overload() -> None:
    goodput = {times: at(times).goodput for times in (1, 2, 5, 10)}
    assert goodput[10] >= 0.9 * max(goodput.values()), goodput
    assert at(10).refused > 0.8 * at(10).offered
    assert at(1).reasons["length"] >= 0.95 * at(1).offered


@pytest.mark.parametrize("times", [1, 2, 5, 10])
def test_every_accepted_request_ends_once(times: int) -> None:
    load = at(times)
    assert sum(load.reasons.values()) + load.refused == load.offered
    assert set(load.reasons) <= {"length", "abort"}


@pytest.mark.parametrize("times", [2, 10])
def test_cold_requests_wait_no_longer_than_the_bound(times: int) -> None:
    """Behind `k` others a request sees at most `k + max_overtaken` admissions before its own."""
    waits = at(times).waits
    assert len(waits) > 20
    assert all(wait <= ahead + LIMITS.max_overtaken for wait, ahead in waits), max(waits)


def test_requests_past_their_deadline_cost_nothing_more() -> None:
    """A queue too long for its deadlines: what has no chance any more is dropped before it is computed."""
    limits = Limits(max_num_seqs=16, max_waiting=100_000)
    late = offer(capacity() * 10, 4_000, limits=limits, timeout=10.0)
    assert late.reasons["abort"] > 2_000 and not late.refused
    assert late.goodput >= 0.5 * at(10).goodput


@pytest.mark.slow
def test_memory_is_flat() -> None:
    tracemalloc.start()
    try:
        sizes = offer(capacity() * 10, size(1_200, 6_000), watch_memory=True).sizes
    finally:
        tracemalloc.stop()
    half = len(sizes) // 2
    assert half >= 10
    assert max(sizes[half:]) <= 1.1 * max(sizes[:half]), sizes
