"""A live request forked at any step goes on as separate requests with the same randomness would; its past is computed
once.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import families
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import StampModel
from torch import nn

from radixgen import Engine, Limits, QueueFull, SamplingParams
from radixgen.sampling.sampler import fork_seed

FORKS = 8
VOCAB = 6
Outputs = list[list[int]]
Serve = Callable[..., Engine]

PROMPTS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=14)
PARAMS = st.builds(
    SamplingParams,
    n=st.sampled_from([1, 1, 2]),
    seed=st.integers(0, 2**64 - 1),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    stop_token_ids=st.sampled_from([(), (1,)]),
    max_tokens=st.integers(1, 12),
)


def oracle(**options: Any) -> Engine:
    return Engine(StampModel(VOCAB, 64), **{"kv_tokens": 400, "debug": True} | options)


@cache
def built(name: str, copy: int) -> nn.Module:
    return families.build(name)


def family(name: str, copy: int = 0, **options: Any) -> Engine:
    return Engine(built(name, copy), **{"kv_tokens": 400, "debug": True} | options)


def separate(serve: Serve, prompt: list[int], params: SamplingParams, lengths: list[int], seed: int) -> Outputs:
    """The request in an engine of its own; each sequence draws from `seed` once it has generated so much."""
    with serve() as engine:
        sequences = engine._core.requests[engine.submit(prompt, params)].sequences
        while engine.has_unfinished:
            for sequence, length in zip(sequences, lengths, strict=True):
                if len(sequence.output) == length:
                    sequence.sampling.seed = seed
            engine.step()
        return [sequence.output for sequence in sequences]


def compare(engine: Engine, serve: Serve, prompt: list[int], params: SamplingParams, steps: int) -> list[Outputs]:
    """Fork after so many steps, and compare each fork, and the origin, with a request of its own. All that they
    generated; nothing where the request had ended by then.
    """
    origin = engine.submit(prompt, params, output_kind="final")
    for _ in range(steps):
        engine.step()
    if origin not in engine._core.requests:
        return []
    lengths = [len(sequence.output) for sequence in engine._core.requests[origin].sequences]
    before = engine.stats()
    names = engine.fork(origin, FORKS)
    engine.check()
    after, ended = engine.stats(), {}
    assert (after.computed_rows, after.kv_tokens_used) == (before.computed_rows, before.kv_tokens_used)
    while engine.has_unfinished:
        ended |= {output.request_id: output for output in engine.step() if output.finished}
        engine.check()
    found = [[one.token_ids for one in ended[name].outputs] for name in (origin, *names)]
    assert params.seed is not None
    seeds = [params.seed] + [fork_seed(params.seed, fork) for fork in range(1, FORKS + 1)]
    for outputs, seed in zip(found, seeds, strict=True):
        assert outputs == separate(serve, prompt, params, lengths, seed)
    return found


def distinct(prompt: list[int], found: list[Outputs]) -> int:
    """Tokens that have to be computed: each once, and none that nothing follows."""
    paths = [(*prompt, *output)[:-1] for outputs in found for output in outputs]
    return len({path[:stop] for path in paths for stop in range(1, len(path) + 1)})


@settings(max_examples=40, deadline=None)
@given(prompt=PROMPTS, params=PARAMS, steps=st.integers(0, 12))
def test_the_past_is_computed_once(prompt: list[int], params: SamplingParams, steps: int) -> None:
    with oracle() as engine:
        found = compare(engine, oracle, prompt, params, steps)
        assert not found or engine.stats().computed_rows == distinct(prompt, found)


@settings(max_examples=25, deadline=None)
@given(
    prompt=PROMPTS,
    params=PARAMS,
    steps=st.integers(0, 20),
    slots=st.integers(26, 80),
    budget=st.sampled_from([1, 4, 64]),
    share=st.sampled_from([True, True, False]),
)
def test_forks_in_a_full_pool(
    prompt: list[int], params: SamplingParams, steps: int, slots: int, budget: int, share: bool
) -> None:
    with oracle(kv_tokens=slots, max_step_tokens=budget, share=share) as engine:
        compare(engine, oracle, prompt, params, steps)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@settings(max_examples=4, deadline=None)
@given(prompt=PROMPTS, seed=st.integers(0, 2**64 - 1), steps=st.integers(0, 10))
def test_forks_of_tiny_models(name: str, prompt: list[int], seed: int, steps: int) -> None:
    params = SamplingParams(seed=seed, temperature=0.8, max_tokens=10)
    with family(name) as engine:
        found = compare(engine, partial(family, name, 1), prompt, params, steps)
        assert not found or engine.stats().computed_rows == distinct(prompt, found)


def test_all_forks_are_made_or_none() -> None:
    """Whether there is room is asked once, for all of them: here nobody waits before, and each would have to."""
    params = SamplingParams(temperature=0.0, max_tokens=8)
    with oracle(limits=Limits(max_num_seqs=1, max_waiting=2, max_waiting_tokens=10)) as engine:
        origin = engine.submit([1] * 8, params)
        engine.step()
        forks = engine.fork(origin, 2)
        for n in (1, 2, 3):
            with pytest.raises(QueueFull):
                engine.fork(origin, n)
        assert list(engine._core.requests) == [origin, *forks]
        outputs = [output for _ in range(40) for output in engine.step() if output.finished]
        engine.check()
    assert [output.request_id for output in outputs] == [origin, *forks]
    assert all(output.outputs == outputs[0].outputs for output in outputs)


@pytest.mark.parametrize("admitted", [False, True])
def test_a_fork_has_waited_since_its_origin_arrived(admitted: bool) -> None:
    """A clock does not begin at zero."""
    clock = [1e6]
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    with oracle(limits=Limits(max_num_seqs=1), clock=lambda: clock[0]) as engine:
        engine.submit([1, 2], params)
        engine.step()
        origin, ended = engine.submit([0, 1], params), {}
        while admitted and engine._core.requests[origin].num_cached_tokens is None:
            clock[0] += 0.5
            engine.step()
        (fork,) = engine.fork(origin)
        while engine.has_unfinished:
            clock[0] += 0.5
            ended |= {output.request_id: output for output in engine.step() if output.finished}
    waited = [ended[name].queue_seconds for name in (origin, fork)]
    assert waited[0] == 2.0 and waited[1] == (2.0 if admitted else 4.0)
