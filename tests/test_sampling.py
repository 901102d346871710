"""Draws: Philox by its published vectors, filters by transformers' own, and nothing from the rest of the batch."""

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from radixgen import SamplingParams
from radixgen.sampling import Draw, philox4x32, sample, uniform

VOCAB = 50


def draws(params: SamplingParams, count: int, row: int = 0) -> list[Draw]:
    return [Draw(row, params, seed=7, sequence=0, position=i) for i in range(count)]


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
    got = philox4x32(np.array(counter, np.uint64)[:, None], np.array(key, np.uint64)[:, None])
    assert got[:, 0].tolist() == expected


def test_uniforms_depend_on_their_counters_alone() -> None:
    params = SamplingParams()
    counters = [
        (seed, sequence, position) for seed in (0, 2**64 - 1) for sequence in range(3) for position in range(200)
    ]
    many = [Draw(0, params, *one) for one in counters]
    together = uniform(many)
    assert together.tolist() == [uniform([one])[0] for one in many]
    assert (together >= 0).all() and (together < 1).all()
    assert np.unique(together).size == together.size
    assert abs(together.mean() - 0.5) < 0.05


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.3, top_k=5),
        SamplingParams(top_p=0.6),
        SamplingParams(temperature=0.5, top_k=7, top_p=0.8),
        SamplingParams(top_k=1),
        SamplingParams(top_p=1e-9),
        SamplingParams(top_k=VOCAB + 9, top_p=0.9),
    ],
)
def test_distribution_is_that_of_transformers(params: SamplingParams) -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1)) * 2
    warped = TemperatureLogitsWarper(params.temperature)(None, logits)
    if params.top_k:
        warped = TopKLogitsWarper(params.top_k)(None, warped)
    if params.top_p < 1:
        warped = TopPLogitsWarper(params.top_p)(None, warped)
    expected = warped.softmax(-1)[0].double().numpy()
    count = 20_000
    tokens = [one.token for one in sample(logits, draws(params, count))]
    found = np.bincount(tokens, minlength=VOCAB) / count
    assert (found[expected == 0] == 0).all()
    spread = np.sqrt(expected * (1 - expected) / count)
    assert (np.abs(found - expected) <= 5 * spread + 1e-12).all()


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (6, 1.0), (0, 0.7), (6, 0.7)])
def test_each_draw_inverts_the_cumulative_distribution(top_k: int, top_p: float) -> None:
    """In order of token id where nothing is filtered, else likeliest first."""
    params = SamplingParams(temperature=1.7, top_k=top_k, top_p=top_p)
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(5)) * 2
    weights = (logits[0].double() / 1.7).softmax(-1).numpy()
    order = np.arange(VOCAB)
    if top_k or top_p < 1:
        order = np.argsort(-weights, kind="stable")[: top_k or VOCAB]
        kept = weights[order] / weights[order].sum()
        order = order[np.cumsum(kept) - kept < top_p]
    cumulative = np.cumsum(weights[order]) / weights[order].sum()
    asked = draws(params, 500)
    expected = order[np.searchsorted(cumulative, uniform(asked), side="right")]
    assert [one.token for one in sample(logits, asked)] == expected.tolist()


def test_of_equal_tokens_the_first_are_kept() -> None:
    """Exactly `top_k` stay; transformers would keep every token that ties with the last of them."""
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 2.0]])
    for params in (SamplingParams(top_k=3), SamplingParams(top_p=0.55)):
        assert {one.token for one in sample(logits, draws(params, 500))} == {1, 2, 3}
    assert {one.token for one in sample(logits * 0, draws(SamplingParams(top_k=1), 50))} == {0}


@pytest.mark.parametrize("temperature", [1e-5, 1e-300, 5e-324])
@pytest.mark.parametrize("top_k", [0, 2])
def test_a_temperature_next_to_nothing_is_greedy(temperature: float, top_k: int) -> None:
    """Scores overflowed to infinity below 1e-307, and every draw was token 0."""
    logits = torch.tensor([[1.0, 5.0, 2.0], [-9.0, -8.0, float("-inf")]])
    params = SamplingParams(temperature=temperature, top_k=top_k)
    assert {one.token for row in (0, 1) for one in sample(logits, draws(params, 20, row))} == {1}


def test_a_draw_does_not_see_its_batch() -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(2))
    kinds = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=2.0),
        SamplingParams(temperature=2.0, top_k=9),
        SamplingParams(temperature=2.0, top_p=0.7, logprobs=2),
    ]
    batch = [Draw(row, kinds[(row + i) % 4], 3, row, i) for row in range(4) for i in range(50)]
    together = sample(logits, batch)
    for one, drawn in zip(batch, together, strict=True):
        alone = sample(logits[one.row : one.row + 1], [Draw(0, one.params, one.seed, one.sequence, one.position)])
        assert alone[0] == drawn
        assert (drawn.logprobs is None) == (one.params.logprobs is None)


def test_greedy_takes_the_best_and_logprobs_are_of_the_model() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 2.0, -1.0]])
    params = SamplingParams(temperature=0.0, logprobs=2)
    first, second = sample(logits, [Draw(0, params, 0, 0, 0), Draw(1, params, 0, 0, 0)])
    assert (first.token, second.token) == (1, 0)
    assert first.logprobs is not None
    assert list(first.logprobs) == [1, 2]
    assert first.logprobs[2] == pytest.approx(float(logits[0].log_softmax(-1)[2]))
