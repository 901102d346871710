"""What admission costs: comparisons and calls, counted."""

import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType

import numpy as np
import pytest
from oracle import StampModel

from radixgen import Engine, Limits, SamplingParams

VOCAB = 200
PARAMS = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
RNG = np.random.default_rng(0)
PREFIX = RNG.integers(0, VOCAB, 300).tolist()


def calls_of(run: Callable[[], object]) -> Counter[str]:
    """How often each Python function was called."""
    calls: Counter[str] = Counter()

    def profile(frame: FrameType, event: str, argument: object) -> None:
        calls[frame.f_code.co_name] += event == "call"

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


def engine_of(**options: int) -> Engine:
    model = StampModel(VOCAB, 2048, frozenset())
    return Engine(model, kv_tokens=20_000, max_step_tokens=2048, limits=Limits(**options), debug=True)


def drained(engine: Engine) -> None:
    while engine.has_unfinished:
        engine.step()
        engine.check()


def apart(count: int) -> list[list[int]]:
    """Behind one prefix."""
    return [PREFIX + RNG.integers(0, VOCAB, 6).tolist() for _ in range(count)]


def inside(count: int) -> list[list[int]]:
    """Each leaves the prefix at another place, the last ones first."""
    return [[*PREFIX[: 290 - 2 * index], VOCAB - 1] for index in range(count)]


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("prompts", [apart(100), inside(100)], ids=["apart", "inside"])
def test_a_waiting_request_is_matched_once(prompts: list[list[int]], cached: bool) -> None:
    """Pins: each admission matched up to 64 candidates' whole prompts again, 60 times a request."""
    with engine_of(max_num_seqs=16) as engine:
        if cached:
            engine.generate([PREFIX], PARAMS)
        for prompt in prompts:
            engine.submit(prompt, PARAMS)
        calls = calls_of(lambda: [engine.step() for _ in range(100) if engine.has_unfinished])
        assert not engine.has_unfinished
        assert calls["match_prefix"] <= len(prompts) + (not cached)
        assert calls["common_prefix_len"] <= 4 * len(prompts)


def test_the_work_of_a_burst_grows_with_it() -> None:
    def work(count: int) -> int:
        with engine_of() as engine:
            engine.generate([PREFIX], PARAMS)
            for prompt in apart(count):
                engine.submit(prompt, PARAMS)
            return calls_of(engine.step).total()

    assert work(240) < 5 * work(60)


def test_siblings_share_their_match() -> None:
    with engine_of() as engine:
        engine.submit(PREFIX, SamplingParams(n=40, max_tokens=2, seed=1))
        assert calls_of(engine.step)["match_prefix"] == 1
        drained(engine)


def test_a_large_crowd_comes_in_over_several_steps() -> None:
    with engine_of(max_num_seqs=1000) as engine:
        for prompt in apart(600):
            engine.submit(prompt, PARAMS)
        admitted = []
        for _ in range(3):
            engine.step()
            admitted.append(600 - engine.stats().num_waiting)
        assert admitted == [256, 512, 600]
        drained(engine)


def test_matches_stay_right_while_others_come_and_go() -> None:
    """`check` compares each with a fresh one: prefixes are evicted, split and grown below those who wait."""
    with engine_of(max_num_seqs=3) as engine:
        for index in range(60):
            base = apart(1)[0]
            names = [engine.submit(base[: int(RNG.integers(1, 306))], PARAMS, priority=index % 2) for _ in range(3)]
            engine.cancel(names[int(RNG.integers(0, 3))])
            engine.step()
            engine.check()
            if index % 7 == 0:
                engine._core.tree.evict(int(RNG.integers(1, 400)))
                engine.check()
        drained(engine)
