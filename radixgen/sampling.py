"""From logits to tokens: greedy, temperature, top-k, top-p, with counter-based randomness."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixgen.core import SamplingParams

_WORD, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


@dataclass(frozen=True, slots=True)
class Draw:
    """One sequence's draw: which row of the logits, how, and the counters of its randomness."""

    row: int
    params: SamplingParams
    seed: int
    """64 bits"""
    sequence: int
    """Place among the request's `n`"""
    position: int
    """How many tokens the sequence has generated"""


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token, and where asked for `{token id: natural-log probability}`, the sampled one first."""

    token: int
    logprobs: dict[int, float] | None = None


def sample(logits: Tensor, draws: Sequence[Draw]) -> list[Sampled]:
    """Draw one token each from float32 logits `[rows, vocab]`.

    A draw depends on its own row, parameters and counters only, never on the rest of the batch.
    """
    tokens = np.empty(len(draws), np.int64)
    groups: dict[str, list[int]] = {"greedy": [], "plain": [], "filtered": []}
    for index, draw in enumerate(draws):
        groups[_kind(draw.params)].append(index)
    if groups["greedy"]:
        best = logits.argmax(-1).cpu().numpy()
        tokens[groups["greedy"]] = best[[draws[i].row for i in groups["greedy"]]]
    for kind, draw_some in (("plain", _plain), ("filtered", _filtered)):
        if members := groups[kind]:
            tokens[members] = draw_some(logits, [draws[i] for i in members]).cpu().numpy()
    logprobs = _logprobs(logits, draws, tokens)
    return [Sampled(int(t), logprobs.get(i)) for i, t in enumerate(tokens.tolist())]


def uniform(draws: Sequence[Draw]) -> NDArray[np.float64]:
    """One number in [0, 1) a draw, 53 bits, a function of (seed, sequence, position) alone."""
    counter = np.zeros((4, len(draws)), np.uint64)
    counter[0] = [draw.position for draw in draws]
    counter[1] = [draw.sequence for draw in draws]
    seeds = np.array([draw.seed for draw in draws], np.uint64)
    words = philox4x32(counter, np.stack([seeds & _WORD, seeds >> _HALF]))
    numbers: NDArray[np.float64] = (((words[0] << _HALF) | words[1]) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


def philox4x32(counter: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Ten rounds over 32-bit words: counter `[4, n]`, key `[2, n]` to `[4, n]`.

    Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
    """
    for _ in range(10):
        first = counter[0] * np.uint64(0xD2511F53)
        second = counter[2] * np.uint64(0xCD9E8D57)
        counter = np.stack(
            [
                (second >> _HALF) ^ counter[1] ^ key[0],
                second & _WORD,
                (first >> _HALF) ^ counter[3] ^ key[1],
                first & _WORD,
            ]
        )
        key = np.stack([(key[0] + np.uint64(0x9E3779B9)) & _WORD, (key[1] + np.uint64(0xBB67AE85)) & _WORD])
    return counter


def _kind(params: SamplingParams) -> str:
    if params.greedy:
        return "greedy"
    return "filtered" if params.top_k > 0 or params.top_p < 1.0 else "plain"


def _plain(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The inverse of the cumulative distribution, in order of token id."""
    probabilities = _probabilities(logits, draws)
    return _invert(probabilities, draws)


def _filtered(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The same over the tokens that top-k and top-p keep, likeliest first, equal ones by token id."""
    probabilities, tokens = _probabilities(logits, draws).sort(dim=-1, descending=True, stable=True)
    width = probabilities.shape[1]
    top_k = _column([d.params.top_k if d.params.top_k > 0 else width for d in draws], logits)
    probabilities *= torch.arange(width, device=logits.device) < top_k
    cumulative = probabilities.cumsum(-1)
    before = (cumulative - probabilities) / cumulative[:, -1:]
    probabilities *= before < _column([d.params.top_p for d in draws], logits)
    return tokens.gather(-1, _invert(probabilities, draws)[:, None])[:, 0]


def _probabilities(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """float64 `[draws, vocab]`; the division and the sums then round alike in any batch."""
    rows = torch.tensor([draw.row for draw in draws], device=logits.device)
    scores = logits[rows].double()
    scores -= scores.amax(-1, keepdim=True)  # so that no temperature, however low, makes infinities of them
    return (scores / _column([draw.params.temperature for draw in draws], logits)).softmax(-1)


def _invert(probabilities: Tensor, draws: Sequence[Draw]) -> Tensor:
    cumulative = probabilities.cumsum(-1)
    target = torch.from_numpy(uniform(draws)).to(cumulative.device)[:, None] * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, target, right=True)[:, 0]
    last = (probabilities > 0).to(torch.int8).cumsum(-1).argmax(-1)
    return torch.minimum(chosen, last)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def _logprobs(logits: Tensor, draws: Sequence[Draw], tokens: NDArray[np.int64]) -> dict[int, dict[int, float]]:
    wanted = [i for i, draw in enumerate(draws) if draw.params.logprobs is not None]
    if not wanted:
        return {}
    rows = torch.tensor([draws[i].row for i in wanted], device=logits.device)
    scores = logits[rows].log_softmax(-1)
    most = max(draws[i].params.logprobs or 0 for i in wanted)
    values, ids = scores.topk(min(most, scores.shape[1]), -1)
    own = scores.gather(-1, torch.from_numpy(tokens[wanted]).to(logits.device)[:, None])[:, 0]
    found = {}
    for place, index in enumerate(wanted):
        count = draws[index].params.logprobs or 0
        best = zip(ids[place, :count].tolist(), values[place, :count].tolist(), strict=True)
        found[index] = {int(tokens[index]): float(own[place])} | dict(best)
    return found
