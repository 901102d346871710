"""Draws from sharded logits are those from the logits as a whole, whatever the ranks have of the vocabulary."""

import threading
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from radixgen import SamplingParams
from radixgen.kernels import sharded_sampling, torch_sampling
from radixgen.kernels.draw_settings import draw_settings
from radixgen.kernels.sharded_sampling import MAX_TOP_K, is_exact
from radixgen.kernels.torch_sharded_sampling import Shard, TorchShardSampler
from radixgen.kernels.triton_sharded_sampling import TritonShardSampler

INF = float("inf")
PARAMS = [
    SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for temperature, top_k, top_p, min_p in product(
        (0.0, 1e-300, 0.5, 1.0, 30.0), (0, 1, 7, MAX_TOP_K), (1.0, 0.9, 0.3, 1e-9), (0.0, 0.1)
    )
]
EXACT = [params for params in PARAMS if is_exact(params)]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


class Ranks:
    """An all-gather among threads, of which one runs at a time: Triton's interpreter has global state."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._parts: list[Tensor | None] = [None] * size
        self._barrier = threading.Barrier(size, timeout=60)
        self.running = threading.Lock()

    def gather(self, rank: int, own: Tensor) -> Tensor:
        assert own.dtype == torch.int32
        self._parts[rank] = own
        self.running.release()
        self._barrier.wait()
        parts = torch.stack(self._parts)
        self._barrier.wait()
        self.running.acquire()
        return parts


def draw(logits: Tensor, ranks: int, rows: list[int], params: list[SamplingParams], uniforms: np.ndarray) -> list[int]:
    """Draw with the columns dealt as by `Tensor.chunk`. The last rank may have none."""
    width = logits.shape[1]
    most, company = -(-width // ranks), Ranks(ranks)
    settings = draw_settings(rows, params, uniforms)
    drawn: list[list[int]] = [[]] * ranks

    def run(rank: int) -> None:
        first = min(rank * most, width)
        shard = Shard(rank, ranks, first, most)
        own = logits[:, first : first + most]
        gather = partial(company.gather, rank)
        with company.running:
            drawn[rank] = sharded_sampling.draw_tokens(own, shard, settings, gather).tolist()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return drawn[0]


def some_logits(rng: np.random.Generator, kind: str, vocab: int) -> Tensor:
    """Two plain rows, one with tokens hidden, and rows with NaN, with +inf, and with nothing that is finite."""
    logits = rng.normal(0, 3, (6, vocab))
    if kind == "ties":
        logits = np.round(logits)
    if kind == "flat":
        logits[:] = 0.5
    logits[2, 1::2] = -INF
    logits[3, vocab // 2], logits[4, -1], logits[5] = np.nan, INF, -INF
    return torch.from_numpy(logits.astype(np.float32))


@pytest.fixture(params=[TorchShardSampler, TritonShardSampler], ids=["torch", "triton"])
def _sampler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is TritonShardSampler:
        monkeypatch.setattr(sharded_sampling, "_sampler", TritonShardSampler)


@pytest.mark.usefixtures("_sampler")
@pytest.mark.parametrize(
    ("vocab", "ranks", "kind"),
    [(1, 2, "flat"), (9, 4, "ties"), (37, 2, "ties"), (37, 4, "flat"), (1001, 2, "distinct"), (4999, 2, "ties")],
)
def test_sharded_draws_are_those_of_all_logits(vocab: int, ranks: int, kind: str) -> None:
    """With parameters mixed; ties at the edge of top-k are all kept; the lowest of the most likely tokens wins."""
    rng = np.random.default_rng(vocab + ranks)
    logits = some_logits(rng, kind, vocab)
    params = [EXACT[at] for at in rng.choice(len(EXACT), 24, replace=False)]
    params += [SamplingParams(), SamplingParams(temperature=0.0), SamplingParams(top_k=3), SamplingParams(), EXACT[-1]]
    rows = [*rng.integers(0, 3, 26).tolist(), 3, 4, 5]
    uniforms = np.append([0.0, 1 - 2**-53], rng.random(27))
    expected = torch_sampling.draw_tokens(logits, rows, params, uniforms).tolist()
    assert draw(logits, ranks, rows, params, uniforms) == expected
    assert expected[-3:] == [-1] * 3


@pytest.mark.usefixtures("_sampler")
@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0.0), SamplingParams(), SamplingParams(top_k=2, min_p=0.2)]
)
def test_draws_of_one_kind(params: SamplingParams) -> None:
    """Without a draw beside them that needs more."""
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 2.0, -1.0, 2.0], [3.0, 1.0, 0.0, 0.0, 0.0, 0.0, 3.0]])
    uniforms = (np.arange(16) + 0.5) / 16
    rows = [0, 1] * 8
    expected = torch_sampling.draw_tokens(logits, rows, [params] * 16, uniforms).tolist()
    assert draw(logits, 3, rows, [params] * 16, uniforms) == expected
    assert set(expected) == ({1, 0} if params.greedy else set(expected)) and len(set(expected)) > 1


def test_logits_in_half_precision_have_ties_at_every_edge() -> None:
    logits = torch.randn((3, 700), generator=torch.Generator().manual_seed(0)).bfloat16()
    params = [SamplingParams(top_k=top_k, top_p=top_p) for top_k, top_p in product((20, 50, 200), (1.0, 0.8, 0.5))] * 3
    rows, uniforms = [index % 3 for index in range(27)], np.random.default_rng(1).random(27)
    expected = torch_sampling.draw_tokens(logits, rows, params, uniforms).tolist()
    assert draw(logits, 2, rows, params, uniforms) == expected


def test_which_draws_are_exact() -> None:
    assert is_exact(SamplingParams(temperature=0.0, top_p=0.5)) and is_exact(SamplingParams(min_p=0.1))
    assert is_exact(SamplingParams(top_k=MAX_TOP_K, top_p=0.5))
    assert not is_exact(SamplingParams(top_p=0.5)) and not is_exact(SamplingParams(top_k=MAX_TOP_K + 1))
