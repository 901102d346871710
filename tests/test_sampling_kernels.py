"""The kernels that draw tokens, on a GPU or in Triton's interpreter, against their twin in PyTorch."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from radixgen import SamplingParams
from radixgen.kernels import torch_sampling, triton_sampling

INF = float("inf")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PARAMS = [
    SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for temperature, top_k, top_p, min_p in product(
        (0.0, 1e-300, 1e-3, 1.0, 30.0), (0, 1, 7, 2**31 - 1), (1.0, 0.9, 0.3, 1e-9), (0.0, 0.1)
    )
]
# NumPy's, of infinities that a GPU takes as they are
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def some_logits(rng: np.random.Generator, kind: str, vocab: int) -> Tensor:
    """A plain row, one with tokens hidden, and rows with NaN, with +inf, and with nothing that is finite."""
    logits = rng.normal(0, 3, (5, vocab))
    if kind == "ties":
        logits = np.round(logits * 2) / 2
    if kind == "flat":
        logits *= 0.01
    logits[1, 1::2] = -INF
    logits[2, vocab // 2], logits[3, 0], logits[4] = np.nan, INF, -INF
    return torch.from_numpy(logits.astype(np.float32)).to(DEVICE)


@pytest.mark.parametrize(
    ("vocab", "kind"),
    [(1, "flat"), (2, "ties"), (37, "distinct"), (37, "ties"), (2048, "distinct"), (2049, "ties"), (5000, "flat")],
)
def test_the_kernels_draw_what_pytorch_draws(vocab: int, kind: str) -> None:
    rng = np.random.default_rng(vocab)
    logits = some_logits(rng, kind, vocab)
    params = [PARAMS[at] for at in rng.choice(len(PARAMS), 7, replace=False)] + [SamplingParams()] * 4
    rows = [*rng.integers(0, 2, 8).tolist(), 2, 3, 4]
    uniforms = np.append([0.0, 1 - 2**-53], rng.random(9))
    found = triton_sampling.draw_tokens(logits, rows, params, uniforms)
    assert found.tolist() == torch_sampling.draw_tokens(logits, rows, params, uniforms).tolist()
    assert found[-3:].tolist() == [-1] * 3


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(top_p=0.8), SamplingParams(top_k=9, min_p=0.05)])
def test_frequencies_are_those_of_the_distribution(params: SamplingParams) -> None:
    """Evenly spaced numbers give each token its share, but for one draw at either end."""
    count, vocab = 20, 2100
    logits = torch.full((1, vocab), -INF, device=DEVICE)
    logits[0, 7::300] = torch.randn(7, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    uniforms = (np.arange(count) + 0.5) / count
    tokens = triton_sampling.draw_tokens(logits, [0] * count, [params] * count, uniforms)
    found = np.bincount(tokens.cpu(), minlength=vocab)
    shares = torch_sampling.probabilities(logits.double(), [params])[0]
    wanted = (shares / shares.sum() * count).cpu().numpy()
    assert (np.abs(found - wanted) <= 1).all() and found[wanted == 0].sum() == 0


def test_min_p_takes_nothing_from_what_top_p_is_a_share_of() -> None:
    """Whether or not another draw of the batch has a top-k, whose floor is searched for first."""
    logits = torch.log(torch.tensor([[0.4, 0.25, 0.12, 0.09, 0.08, 0.06]], device=DEVICE))
    params = [SamplingParams(top_p=0.7, min_p=0.21)] * 12 + [SamplingParams(top_k=2)]
    uniforms = np.append((np.arange(12) + 0.5) / 12, 0.5)
    found = triton_sampling.draw_tokens(logits, [0] * 13, params, uniforms).tolist()
    assert found == torch_sampling.draw_tokens(logits, [0] * 13, params, uniforms).tolist()
    assert set(found) == {0, 1, 2}


def test_a_draw_does_not_see_its_batch() -> None:
    logits = some_logits(np.random.default_rng(0), "ties", 2500)
    params = [PARAMS[at] for at in (3, 70, 150)]
    params.append(replace(params[0], temperature=0.7))
    rows, uniforms = [0, 1, 2, 0], np.random.default_rng(1).random(4)
    together = triton_sampling.draw_tokens(logits, rows, params, uniforms).tolist()
    for index, row in enumerate(rows):
        one = triton_sampling.draw_tokens(logits[row : row + 1], [0], [params[index]], uniforms[[index]])
        assert one.tolist() == [together[index]]


def test_scores_in_float64_that_float32_does_not_hold() -> None:
    scores = torch.tensor([[1e300, -INF, 3.0, -1e300]], dtype=torch.float64, device=DEVICE)
    uniforms, params = np.array([0.0, 0.99]), [SamplingParams()] * 2
    assert triton_sampling.draw_tokens(scores, [0, 0], params, uniforms).tolist() == [0, 0]


def test_scores_in_float64_that_float32_cannot_tell_apart() -> None:
    """Penalties leave such; and a row of which nothing else may be drawn may be far below what float32 holds."""
    scores = torch.tensor([[9.0, 9.0 + 1e-9, 3.0], [-INF, -5e300, -INF]], dtype=torch.float64, device=DEVICE)
    params = [SamplingParams(temperature=0.0), SamplingParams(temperature=1e-12), SamplingParams()]
    found = triton_sampling.draw_tokens(scores, [0, 0, 1], params, np.full(3, 0.3))
    assert (
        found.tolist() == torch_sampling.draw_tokens(scores, [0, 0, 1], params, np.full(3, 0.3)).tolist() == [1, 1, 1]
    )


@pytest.mark.parametrize("top", [1.0, 1e38, 3e38, torch.finfo(torch.float32).max, -2e38])
def test_filters_never_hide_the_likeliest_token(top: float) -> None:
    """A share that float32 rounds to 0, and logits as large as there are."""
    logits = torch.tensor([[-INF, -3e38, top, -3.1e38]], device=DEVICE)
    params = [SamplingParams(top_p=1e-300), SamplingParams(top_k=1), SamplingParams(top_k=2, top_p=0.5, min_p=0.1)]
    assert triton_sampling.draw_tokens(logits, [0] * 3, params, np.full(3, 0.7)).tolist() == [2] * 3


def test_logits_that_lie_transposed() -> None:
    logits = torch.randn(60, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE).T
    params, uniforms = [SamplingParams(), SamplingParams(top_k=5), SamplingParams(temperature=0.0)], np.full(3, 0.4)
    found = triton_sampling.draw_tokens(logits, [0, 1, 2], params, uniforms)
    assert found.tolist() == torch_sampling.draw_tokens(logits, [0, 1, 2], params, uniforms).tolist()


@pytest.mark.parametrize("vocab", [5, 2049])
def test_no_number_of_draws_compiles_a_kernel_anew(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles for addresses that are multiples of 16 bytes, and once more for others."""
    addresses: list[int] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]):
            return lambda *args, **_: addresses.extend(a.data_ptr() for a in args if isinstance(a, Tensor))

    names = ("weigh_blocks", "narrow_floors", "settle_floors", "choose")
    monkeypatch.setattr(triton_sampling, "sampling_kernels", SimpleNamespace(**dict.fromkeys(names, Kernel())))
    logits, params = torch.zeros(1, vocab, device=DEVICE), SamplingParams(top_k=3, top_p=0.5, min_p=0.1)
    for draws in range(1, 6):
        triton_sampling.draw_tokens(logits, [0] * draws, [params] * draws, np.zeros(draws))
    assert addresses and all(address % 16 == 0 for address in addresses)
