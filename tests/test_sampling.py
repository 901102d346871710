"""Draws: Philox by its published vectors, filters by transformers' own, and nothing from the rest of the batch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    PreTrainedConfig,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from radixgen import SamplingParams
from radixgen.core import SamplingState
from radixgen.kernels.torch_sampling import weights
from radixgen.sampling import sampler as sampling
from radixgen.sampling.sampler import (
    SamplerOutput,
    distribution,
    fork_seed,
    likeliest,
    philox4x32,
    sample,
    shape,
    token_logprobs,
    uniform,
)

VOCAB = 37
INF = math.inf

Change = Callable[[Tensor, Tensor], Tensor]


def state(
    params: SamplingParams | None = None,
    *,
    prompt: Sequence[int] = (0,),
    output: Sequence[int] = (),
    seed: int = 7,
    index: int = 0,
    ends: Sequence[int] = (),
) -> SamplingState:
    return SamplingState(
        params or SamplingParams(), seed, index, np.array(prompt, np.int32), list(output), frozenset(ends)
    )


def random_logits(rows: int, vocab: int = VOCAB, seed: int = 1) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def draws(params: SamplingParams, count: int, logits: Tensor) -> list[int]:
    """`count` draws from one row of logits, with a seed each."""
    return sample(logits, [0] * count, [state(params, seed=seed) for seed in range(count)]).tokens


# -- randomness -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_vectors(counter: list[int], key: list[int], expected: list[int]) -> None:
    """The known answers of Random123, `philox4x32 10`."""
    words = philox4x32(*(np.array(some, np.uint64)[:, None] for some in (counter, key)))
    assert words[:, 0].tolist() == expected


@given(seed=st.integers(0, 2**64 - 1), fork=st.integers(0, 2**64 - 1))
def test_the_seed_of_a_fork_is_a_word_of_philox(seed: int, fork: int) -> None:
    halves = [fork & 0xFFFFFFFF, fork >> 32, 0, 0x666F726B], [seed & 0xFFFFFFFF, seed >> 32]
    words = philox4x32(*(np.array(some, np.uint64)[:, None] for some in halves))
    assert fork_seed(seed, fork) == int(words[0, 0]) << 32 | int(words[1, 0])


def test_uniforms_depend_on_seed_index_and_position_alone() -> None:
    states = [
        state(seed=seed, index=index, output=[0] * position)
        for seed in (0, 2**32, 2**64 - 1)
        for index in range(3)
        for position in range(100)
    ]
    together = uniform(states)
    assert together.tolist() == [uniform([one])[0] for one in states]
    assert ((together >= 0) & (together < 1)).all() and np.unique(together).size == together.size
    assert abs(together.mean() - 0.5) < 0.05
    other = state(SamplingParams(top_k=3), seed=2**32, index=1, output=[5, 4], prompt=[9, 9])
    assert uniform([other]) == uniform([state(seed=2**32, index=1, output=[1, 2])])


def test_the_first_uniform_is_made_of_the_published_words() -> None:
    assert uniform([state(seed=0)])[0] == (0x6627E8D5E169C58D >> 11) / 2**53


def test_forks_have_seeds_of_their_own() -> None:
    forks = [fork_seed(seed, fork) for seed in (0, 1, 2**64 - 1) for fork in (0, 1, 2, 2**32, 2**64 - 1)]
    assert len({*forks, 0, 1, 2**64 - 1}) == len(forks) + 3
    assert all(0 <= seed < 2**64 for seed in forks)
    firsts = uniform([state(seed=seed) for seed in forks])
    assert np.unique(firsts).size == len(forks)


def test_a_fork_is_no_draw() -> None:
    """The 53 bits of a draw at the same counters are those of another number."""
    for seed in (0, 5, 2**40):
        drawn = {int(number * 2**53) for number in uniform([state(seed=seed, output=[0] * n) for n in range(50)])}
        assert drawn.isdisjoint(fork_seed(seed, fork) >> 11 for fork in range(50))


# -- transformers -----------------------------------------------------------------------------------------


def less_counts(one: SamplingState) -> Change:
    """OpenAI's definition, token by token; transformers has none."""

    def change(_: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for token in set(one.output):
            times = one.output.count(token)
            scores[0, token] -= one.params.presence_penalty + times * one.params.frequency_penalty
        return scores

    return change


def processors(one: SamplingState) -> list[Change]:
    """What `generate` would apply, in its order; the count penalties follow the repetition penalty."""
    p, found = one.params, []
    if p.logit_bias:
        found.append(SequenceBiasLogitsProcessor({(token,): float(bias) for token, bias in p.logit_bias.items()}))
    if p.repetition_penalty != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(p.repetition_penalty))
    if p.presence_penalty or p.frequency_penalty:
        found.append(less_counts(one))
    if p.min_tokens and one.stop_ids:
        found.append(MinNewTokensLengthLogitsProcessor(one.prompt.size, p.min_tokens, sorted(one.stop_ids)))
    return found


def warpers(params: SamplingParams) -> list[Change]:
    found: list[Change] = []
    if params.temperature != 1.0:
        found.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k > 0:
        found.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        found.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        found.append(MinPLogitsWarper(params.min_p))
    return found


def apply(changes: Sequence[Change], row: Tensor, one: SamplingState) -> Tensor:
    """Logits `[vocab]` through `changes`, in float64."""
    ids = torch.tensor([[*one.prompt.tolist(), *one.output]])
    scores = row.double()[None]
    for change in changes:
        scores = change(ids, scores)
    return scores[0]


def expected_distribution(row: Tensor, one: SamplingState) -> Tensor:
    shaped = apply(processors(one), row, one)
    if one.params.greedy:
        return torch.zeros_like(shaped).index_fill(0, shaped.argmax(), 1.0)
    return apply(warpers(one.params), shaped, one).softmax(-1)


def check_rows(logits: Tensor, states: Sequence[SamplingState]) -> None:
    """A batch against the reference, row by row, in support and in value."""
    shaped, found = shape(logits.double(), states), distribution(logits, states)
    assert found.dtype == torch.float64
    found /= found.sum(-1, keepdim=True)
    for row, one in enumerate(states):
        torch.testing.assert_close(shaped[row], apply(processors(one), logits[row], one), rtol=1e-12, atol=1e-12)
        expected = expected_distribution(logits[row], one)
        assert torch.equal(found[row] > 0, expected > 0), one
        torch.testing.assert_close(found[row], expected, rtol=1e-9, atol=1e-15)


ALONE = [
    SamplingParams(),
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.3),
    SamplingParams(temperature=25.0),
    SamplingParams(top_k=1),
    SamplingParams(top_k=5),
    SamplingParams(top_k=-1),
    SamplingParams(top_k=2**31 - 1),
    SamplingParams(top_p=1e-9),
    SamplingParams(top_p=0.6),
    SamplingParams(top_p=0.999),
    SamplingParams(min_p=0.05),
    SamplingParams(min_p=1.0),
    SamplingParams(repetition_penalty=1.7),
    SamplingParams(repetition_penalty=0.4),
    SamplingParams(presence_penalty=1.5),
    SamplingParams(presence_penalty=-2.0, frequency_penalty=0.75),
    SamplingParams(frequency_penalty=-1.25),
    SamplingParams(logit_bias={0: -100.0, 1: 2.5, 2: 0.0}),
    SamplingParams(min_tokens=9),
]
COMBINED = [
    SamplingParams(temperature=0.5, top_k=7, top_p=0.8, min_p=0.1),
    SamplingParams(temperature=4.0, top_k=20, top_p=0.9),
    SamplingParams(temperature=2.0, top_p=0.7, min_p=0.3),
    SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.25, top_k=3),
    SamplingParams(logit_bias={2: 9.5, 0: -3.25}, repetition_penalty=2.0, min_tokens=9, temperature=0.0),
    SamplingParams(
        logit_bias={1: 4.5},
        repetition_penalty=0.7,
        presence_penalty=-0.5,
        frequency_penalty=0.5,
        min_tokens=9,
        temperature=1.5,
        top_k=11,
        top_p=0.85,
        min_p=0.02,
    ),
]


def fitted(params: SamplingParams, vocab: int) -> SamplingParams:
    bias = {token: value for token, value in (params.logit_bias or {}).items() if token < vocab}
    return replace(params, logit_bias=bias or None)


def some_states(all_params: Sequence[SamplingParams], vocab: int, seed: int = 0) -> list[SamplingState]:
    rng = np.random.default_rng(seed)
    return [
        state(
            fitted(params, vocab),
            prompt=rng.integers(0, vocab, rng.integers(1, 30)),
            output=rng.integers(0, vocab, rng.integers(0, 9)).tolist(),
            ends=range(1, min(vocab, 4)),
        )
        for params in all_params
    ]


@pytest.mark.parametrize("params", ALONE + COMBINED)
def test_each_parameter_is_that_of_transformers(params: SamplingParams) -> None:
    check_rows(random_logits(5), some_states([params] * 5, VOCAB))


@pytest.mark.parametrize("vocab", [1, 2, 3, 37, 1000])
def test_a_mixed_batch_is_that_of_transformers(vocab: int) -> None:
    every = [*ALONE, *COMBINED] * 2
    order = np.random.default_rng(vocab).permutation(len(every))
    check_rows(random_logits(len(every), vocab, vocab), some_states([every[i] for i in order], vocab, vocab))


def test_rows_that_hold_minus_infinity() -> None:
    logits = random_logits(len(COMBINED)).masked_fill(torch.arange(VOCAB) % 3 == 1, -INF)
    plain = [replace(params, logit_bias=None) for params in COMBINED]
    check_rows(logits, some_states(plain, VOCAB))


def test_the_order_is_that_of_transformers() -> None:
    one = state(replace(COMBINED[-1], presence_penalty=0.0, frequency_penalty=0.0), ends=[2])
    p = one.params
    config = GenerationConfig(
        do_sample=True,
        sequence_bias=[[[token], bias] for token, bias in (p.logit_bias or {}).items()],
        repetition_penalty=p.repetition_penalty,
        min_new_tokens=p.min_tokens,
        eos_token_id=2,
        temperature=p.temperature,
        top_k=p.top_k,
        top_p=p.top_p,
        min_p=p.min_p,
    )
    config._eos_token_tensor = torch.tensor([2])
    mixin = GenerationMixin()
    mixin.config = PreTrainedConfig()
    theirs = mixin._get_logits_processor(config, input_ids_seq_length=1)
    assert [type(change) for change in theirs] == [type(change) for change in (*processors(one), *warpers(p))]


def test_counts_follow_the_output() -> None:
    """A state counts what was appended since its last draw, once."""
    params = SamplingParams(presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.2)
    kept, logits = state(params, prompt=[3]), random_logits(1)
    for token in (5, 5, 3, 0):
        kept.output.append(token)
        fresh = state(params, prompt=[3], output=kept.output)
        assert torch.equal(distribution(logits, [kept]), distribution(logits, [fresh]))
    assert kept.counts == {5: 2, 3: 1, 0: 1} and sorted(kept.seen().tolist()) == [0, 3, 5]


@pytest.mark.parametrize("prompt", [[], [3], [7, 3, 7, 0, 3]])
def test_the_tokens_seen_are_those_of_prompt_and_output(prompt: list[int]) -> None:
    """At whatever moments one asks; in a state that begins with some of the output as in one that saw it come."""
    rng = np.random.default_rng(len(prompt))
    kept = state(SamplingParams(repetition_penalty=1.2), prompt=prompt)
    for _ in range(200):
        kept.output += rng.integers(0, 60, rng.integers(0, 3)).tolist()
        fork = state(kept.params, prompt=prompt, output=list(kept.output))
        for one in (kept, fork):
            one.update()
            assert sorted(one.seen().tolist()) == sorted({*prompt, *kept.output})
        fork.output.append(99)
        fork.update()
        assert 99 in fork.seen() and 99 not in kept.seen()


def test_a_token_is_added_to_those_seen_without_a_walk_over_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, made = state(SamplingParams(repetition_penalty=1.2), prompt=list(range(50_000))), []
    for name in ("unique", "union1d", "concatenate"):
        work = getattr(np, name)
        monkeypatch.setattr(np, name, lambda *a, w=work, n=name, **k: made.append(n) or w(*a, **k))
    for token in range(49_900, 50_100):
        kept.output.append(token)
        kept.update()
        kept.seen()
    assert sorted(made) == ["concatenate", "unique"], "the prompt is read once, and once there is more room"


def test_the_caller_keeps_its_logits() -> None:
    logits = random_logits(len(COMBINED))
    before = logits.clone()
    sample(logits, range(len(COMBINED)), some_states(COMBINED, VOCAB))
    assert torch.equal(logits, before)


# -- ends, ties, extremes ---------------------------------------------------------------------------------


def test_min_tokens_holds_ends_back_until_it_is_reached() -> None:
    logits = torch.tensor([[0.0, 50.0, 1.0, 40.0]])
    params = SamplingParams(temperature=0.0, min_tokens=2)
    tokens = [sample(logits, [0], [state(params, output=[0] * n, ends=[1, 3, 900])]).tokens for n in range(4)]
    assert tokens == [[2], [2], [1], [1]]


def test_min_tokens_yields_where_nothing_but_ends_is_left() -> None:
    params = SamplingParams(min_tokens=2)
    logits = torch.tensor([[-INF, 1.0, -INF, 2.0], [1.0, 1.0, 1.0, 1.0]])
    found = distribution(logits, [state(params, ends=[1, 3]), state(params, ends=[0, 1, 3])])
    torch.testing.assert_close(found[0], logits[0].double().softmax(-1), rtol=1e-12, atol=0)
    assert found[1].tolist() == [0, 0, 1, 0]
    assert sample(torch.zeros(1, 1), [0], [state(params, ends=[0])]).tokens == [0]


def test_of_equal_tokens_top_k_keeps_all_as_transformers_does() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    one = state(SamplingParams(top_k=2))
    check_rows(logits, [one])
    assert distribution(logits, [one])[0].count_nonzero() == 4


def test_top_k_alone_keeps_what_is_next_to_impossible() -> None:
    """Pins that tokens below 1e-16 were dropped as if by top-p, though it was off."""
    logits = torch.tensor([[0.0, -50.0, -60.0], [-60.0, 0.0, -50.0]])
    check_rows(logits, [state(SamplingParams(top_k=2)), state(SamplingParams(top_k=3))])


def test_of_equal_tokens_greedy_takes_the_first() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0]])
    shaped = SamplingParams(temperature=0.0, logit_bias={0: -1.0})
    assert sample(logits, [0, 0], [state(SamplingParams(temperature=0.0)), state(shaped)]).tokens == [1, 1]


@pytest.mark.parametrize("temperature", [1e-5, 1e-300, 5e-324])
@pytest.mark.parametrize("top_k", [0, 2])
def test_a_temperature_next_to_nothing_is_greedy(temperature: float, top_k: int) -> None:
    """Pins that scores overflowed to infinity below 1e-307, and every draw was token 0."""
    params = SamplingParams(temperature=temperature, top_k=top_k)
    for row in ([1.0, 5.0, 2.0], [-9.0, -8.0, -INF], [-3e38, 3e38, 0.0]):
        assert {*draws(params, 20, torch.tensor([row]))} == {1}


@pytest.mark.parametrize("penalty", [5e-324, 1e-300, 1e4])
@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1.0, 1e4])
def test_extreme_penalties_leave_something_to_draw(penalty: float, temperature: float) -> None:
    """A small penalty divides to infinity: its token is the only choice, and not a NaN."""
    params = SamplingParams(repetition_penalty=penalty, temperature=temperature)
    logits = torch.tensor([[-2.0, 3.0, 1.0], [-3e38, 3e38, 0.0]])
    found = distribution(logits, [state(params, prompt=[0, 1]), state(params, prompt=[0, 1])])
    assert found.isfinite().all() and (found.sum(-1) > 0).all()
    if penalty < 1:
        assert found.argmax(-1).tolist() == [1, 1]


def test_many_ends_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `min_tokens` looks at is a row of logits for a sequence, not one for each of its ends."""
    sizes: list[int] = []
    amax = Tensor.amax

    def watched(scores: Tensor, *args: object, **kwargs: object) -> Tensor:
        sizes.append(scores.numel())
        return amax(scores, *args, **kwargs)

    monkeypatch.setattr(Tensor, "amax", watched)
    distribution(random_logits(3, 200), [state(SamplingParams(min_tokens=5), ends=range(128))] * 3)
    assert max(sizes) <= 3 * 200


# -- draws ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [ALONE[0], ALONE[2], ALONE[5], ALONE[9], ALONE[11], *COMBINED[:3]])
def test_frequencies_are_those_of_the_distribution(params: SamplingParams) -> None:
    count, logits = 20_000, random_logits(1, 11)
    wanted = expected_distribution(logits[0], state(params)).numpy() * count
    found = np.bincount(draws(params, count, logits), minlength=11)
    assert (found[wanted == 0] == 0).all()
    likely = wanted > 5
    freedom = likely.sum() - 1
    chi_square = ((found - wanted)[likely] ** 2 / wanted[likely]).sum()
    assert chi_square <= freedom + 4 * math.sqrt(2 * freedom) + 1e-6


def test_each_draw_inverts_the_cumulative_distribution() -> None:
    """In the order of token ids, whatever was filtered."""
    logits = random_logits(1)
    for params in (*ALONE, *COMBINED):
        one = replace(params, min_tokens=0)
        states = [state(one, seed=seed) for seed in range(100)]
        cumulative = np.cumsum(expected_distribution(logits[0], states[0]).numpy())
        wanted = np.searchsorted(cumulative, uniform(states) * cumulative[-1], side="right")
        assert draws(one, 100, logits) == wanted.tolist()


def test_no_order_of_summing_moves_a_draw() -> None:
    """Pins that sums of floats decided draws and top-p: on a GPU they depend on the rest of the batch."""
    probabilities = random_logits(4, 1000).double().softmax(-1)
    summed = weights(probabilities)
    assert torch.equal(summed.flip(-1).cumsum(-1)[:, -1], summed.cumsum(-1)[:, -1])
    assert not torch.equal(probabilities.flip(-1).cumsum(-1)[:, -1], probabilities.cumsum(-1)[:, -1])
    torch.testing.assert_close(summed.double() / 2**62, probabilities, rtol=1e-9, atol=2**-62)


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-53])
def test_the_ends_of_the_range_stay_inside(number: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radixgen.sampling.sampler.uniform", lambda states: np.full(len(states), number))
    logits = torch.cat([random_logits(4), torch.zeros(1, VOCAB)])
    logits[:, :2] = logits[:, -2:] = -INF
    states = [state(params) for params in (ALONE[0], ALONE[5], ALONE[9], COMBINED[0], ALONE[0])]
    kept = distribution(logits, states) > 0
    tokens = sample(logits, range(5), states).tokens
    assert all(kept[row, token] for row, token in enumerate(tokens))


def test_known_draws() -> None:
    """Pins the draws themselves: whoever changes one changes everyone's seeded output."""
    logits = random_logits(1)
    states = [state(COMBINED[1], seed=2024, index=index, output=[1] * n) for index in range(2) for n in range(6)]
    assert [fork_seed(0, 0), fork_seed(7, 1)] == [0x23AE00530F167D74, 0xD296F208167A5305]
    assert [number.hex() for number in uniform(states[:2])] == ["0x1.3516d6e689812p-1", "0x1.629853bdbe5b0p-2"]
    assert sample(logits, [0] * 12, states).tokens == [30, 20, 28, 30, 9, 26, 19, 26, 13, 30, 32, 28]


TOKEN_PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-3, 0.7, 1.0, 30.0]),
    top_k=st.sampled_from([0, -1, 1, 2, 50]),
    top_p=st.sampled_from([1.0, 0.9, 0.3, 1e-6]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.5, 0.5]),
    presence_penalty=st.sampled_from([0.0, 1.0]),
    frequency_penalty=st.sampled_from([0.0, -0.5]),
    logit_bias=st.none() | st.dictionaries(st.integers(0, 2), st.floats(-100, 100), max_size=3),
    min_tokens=st.integers(0, 3),
    logprobs=st.none() | st.integers(0, 20),
)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, list[int], list[SamplingState]]:
    """Logits full of ties, with bad rows among them, and several draws from some of the rows."""
    vocab, rows = draw(st.sampled_from([3, 5, 64, 300])), draw(st.integers(1, 5))
    seed = draw(st.integers(0, 2**32))
    logits = torch.from_numpy(np.random.default_rng(seed).integers(-3, 4, (rows, vocab)).astype(np.float32))
    for row, bad in draw(st.dictionaries(st.integers(0, rows - 1), st.sampled_from([math.nan, INF, -INF]))).items():
        logits[row, draw(st.integers(0, vocab - 1))] = bad
    tokens = st.integers(0, vocab - 1)
    states = st.builds(
        state,
        TOKEN_PARAMS,
        prompt=st.lists(tokens, min_size=1, max_size=5),
        output=st.lists(tokens, max_size=5),
        seed=st.integers(0, 2**64 - 1),
        index=st.integers(0, 127),
        ends=st.sets(tokens, max_size=3),
    )
    asked = draw(st.lists(st.tuples(st.integers(0, rows - 1), states), min_size=1, max_size=8))
    return logits, [row for row, _ in asked], [one for _, one in asked]


def by_draw(drawn: SamplerOutput) -> list[tuple[int, list[tuple[int, float]] | None]]:
    """Token and log-probabilities of each draw, the latter in their order."""
    return [
        (token, list(drawn.logprobs[i].items()) if i in drawn.logprobs else None)
        for i, token in enumerate(drawn.tokens)
    ]


@settings(max_examples=150, deadline=None)
@given(batches(), st.randoms(use_true_random=False))
def test_a_draw_does_not_see_its_batch(batch: tuple[Tensor, list[int], list[SamplingState]], order: object) -> None:
    logits, rows, states = batch
    together = by_draw(sample(logits, rows, states))
    for row, one, found in zip(rows, states, together, strict=True):
        assert by_draw(sample(logits[row : row + 1], [0], [one])) == [found]
    places = list(range(len(rows)))
    order.shuffle(places)
    shuffled = by_draw(sample(logits, [rows[i] for i in places], [states[i] for i in places]))
    assert shuffled == [together[i] for i in places]


@settings(max_examples=150, deadline=None)
@given(batches())
def test_a_drawn_token_could_be_drawn(batch: tuple[Tensor, list[int], list[SamplingState]]) -> None:
    logits, rows, states = batch
    for row, one, token in zip(rows, states, sample(logits, rows, states).tokens, strict=True):
        sound = not logits[row].isnan().any() and logits[row].amax().isfinite()
        assert (token >= 0) == sound
        if sound:
            assert distribution(logits[row : row + 1], [one])[0, token] > 0


@pytest.mark.parametrize("params", [SamplingParams(temperature=0.0), *COMBINED])
@pytest.mark.parametrize(
    "bad",
    [
        [math.nan] + [0.0] * (VOCAB - 1),
        [0.0] * (VOCAB - 1) + [math.nan],
        [INF] + [0.0] * (VOCAB - 1),
        [-INF] * VOCAB,
        [math.nan] * VOCAB,
        [INF, math.nan] + [-INF] * (VOCAB - 2),
    ],
)
def test_unsound_rows_give_no_token_and_disturb_nobody(bad: list[float], params: SamplingParams) -> None:
    logits = random_logits(3)
    states = some_states([replace(params, logprobs=3)] * 3, VOCAB)
    alone = by_draw(sample(logits, [0, 1, 2], states))
    logits[1] = torch.tensor(bad)
    assert by_draw(sample(logits, [0, 1, 2], states)) == [alone[0], (-1, None), alone[2]]


# -- log-probabilities ------------------------------------------------------------------------------------


def test_logprobs_are_of_the_model_itself() -> None:
    """Before bias, penalties and temperature; the drawn token first, then the likeliest."""
    logits = random_logits(2)
    params = [replace(COMBINED[-1], logprobs=3), SamplingParams(logprobs=0), SamplingParams()]
    rows, states = [1, 0, 1], some_states(params, VOCAB)
    drawn = sample(logits, rows, states)
    assert drawn.logprobs.keys() == {0, 1}
    for i, found in drawn.logprobs.items():
        scores = logits[rows[i]].log_softmax(-1)
        top = scores.topk(params[i].logprobs or 0).indices.tolist()
        assert list(found) == list(dict.fromkeys([drawn.tokens[i], *top]))
        assert found == pytest.approx({token: float(scores[token]) for token in found}, abs=1e-6)


@pytest.mark.parametrize("vocab", [1, 2, 3, 37, 1000])
def test_token_logprobs(vocab: int) -> None:
    logits, tokens = random_logits(4, vocab), np.arange(4) % vocab
    found = token_logprobs(logits, tokens, [0, 1, 20, vocab + 5])
    scores = logits.double().log_softmax(-1)
    for row, (token, top) in enumerate(zip(tokens.tolist(), (0, 1, 20, vocab), strict=True)):
        best = scores[row].argsort(descending=True)[:top].tolist()
        assert list(found[row]) == list(dict.fromkeys([token, *best]))
        assert found[row] == pytest.approx({one: float(scores[row, one]) for one in found[row]}, abs=1e-5)


def test_logprobs_of_impossible_tokens() -> None:
    """Minus infinity, and no NaN, where the model rules a token out."""
    found = token_logprobs(torch.tensor([[-INF, 0.0, -INF]]), np.array([0]), [3])[0]
    assert found == {0: -INF, 1: 0.0, 2: -INF}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_any_dtype_are_told_of(dtype: torch.dtype) -> None:
    logits = random_logits(3, VOCAB).to(dtype)
    scores = logits.float().log_softmax(-1)
    found = likeliest(logits, [2, 0], 4)
    for row, choices in zip((2, 0), found, strict=True):
        assert choices.log_probs.tolist() == scores[row].topk(4).values.tolist()
        assert choices.log_probs.tolist() == scores[row][choices.token_ids].tolist()
    told = token_logprobs(logits, np.array([1, 2, 3]), [2, 2, 2])
    assert [one[token] for one, token in zip(told, (1, 2, 3), strict=True)] == scores[[0, 1, 2], [1, 2, 3]].tolist()


def test_greedy_draws_take_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """They cost the host as much as all else that a step of many greedy sequences draws."""
    monkeypatch.setattr(sampling, "uniform", None)
    logits = random_logits(2)
    greedy = SamplingParams(temperature=0.0)
    states = [state(greedy), state(replace(greedy, logit_bias={3: 50.0}))]
    assert sample(logits, [1, 0], states).tokens == [int(logits[1].argmax()), 3]
