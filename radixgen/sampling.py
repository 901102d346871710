"""From logits to tokens: penalties and filters as in transformers, with counter-based randomness."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixgen.core import SamplingParams, SamplingState

_WORD, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_LARGEST = torch.finfo(torch.float64).max
_FORK = 0x666F726B
"""Sets the counters of forks apart from those of draws."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token a draw; -1 where the row holds a NaN or +inf, or nothing finite. `logprobs` by draw, where asked for:
    `{token id: natural-log probability}`, the drawn one first.
    """

    tokens: list[int]
    logprobs: dict[int, dict[int, float]] = field(default_factory=dict)


def sample(logits: Tensor, rows: Sequence[int], states: Sequence[SamplingState]) -> Drawn:
    """Draw one token each: draw `i` from row `rows[i]` of float32 logits `[rows, vocab]`, for `states[i]`.

    A draw depends on its own row and state only, never on the rest of the batch.
    """
    best, likeliest = logits.max(-1)
    sound, choice = best.isfinite().tolist(), likeliest.tolist()
    tokens: list[int] = [choice[row] if sound[row] else -1 for row in rows]
    drawing = [i for i, state in enumerate(states) if not state.plain and tokens[i] >= 0]
    if drawing:
        drawn = _draw(logits[[rows[i] for i in drawing]], [states[i] for i in drawing])
        for i, token in zip(drawing, drawn, strict=True):
            tokens[i] = token
    told = [i for i, state in enumerate(states) if state.params.logprobs is not None and tokens[i] >= 0]
    if not told:
        return Drawn(tokens)
    found = token_logprobs(
        logits[[rows[i] for i in told]],
        np.array([tokens[i] for i in told]),
        [states[i].params.logprobs or 0 for i in told],
    )
    return Drawn(tokens, dict(zip(told, found, strict=True)))


def token_logprobs(logits: Tensor, tokens: NDArray[np.integer], top: Sequence[int]) -> list[dict[int, float]]:
    """For each row of logits `[n, vocab]` the natural-log probability of `tokens` `[n]`, and of the `top[i]`
    likeliest tokens.
    """
    scores = logits.log_softmax(-1)
    own = scores.gather(-1, torch.from_numpy(tokens.astype(np.int64)).to(logits.device)[:, None])[:, 0].tolist()
    ids = _likeliest(scores, min(max(top), scores.shape[1]))
    values = scores.gather(-1, ids)
    return [
        {token: value} | dict(zip(best[:count], likely[:count], strict=True))
        for token, value, best, likely, count in zip(
            tokens.tolist(), own, ids.tolist(), values.tolist(), top, strict=True
        )
    ]


def distribution(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """What each draw is made from: logits `[n, vocab]`, one row a state, to probabilities, float64; they need not
    add up to 1. Greedy states are given the likeliest token alone.
    """
    scores = shape(logits.double(), states)
    scores -= scores.amax(-1, keepdim=True)  # so that no temperature, however low, makes infinities of them
    greedy = [state.params.greedy for state in states]
    scores /= _column([1.0 if state.params.greedy else state.params.temperature for state in states], scores)
    probabilities = scores.softmax(-1)
    sorted_rows = [i for i, s in enumerate(states) if not greedy[i] and (s.params.top_k > 0 or s.params.top_p < 1.0)]
    if sorted_rows:
        some = [states[i].params for i in sorted_rows]
        probabilities[sorted_rows] = _keep_likeliest(probabilities[sorted_rows], some)
    if any(state.params.min_p for state in states):
        least = _column([state.params.min_p for state in states], scores) * probabilities.amax(-1, keepdim=True)
        probabilities *= probabilities >= least
    if any(greedy):
        chosen = torch.zeros_like(probabilities).scatter(-1, scores.argmax(-1, keepdim=True), 1.0)
        probabilities = torch.where(torch.tensor(greedy, device=scores.device)[:, None], chosen, probabilities)
    return probabilities


def shape(scores: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Bias, penalties and `min_tokens`, in place, on float64 `[n, vocab]`. Returns `scores`."""
    for state in states:
        if state.params.shaped:
            state.update()
    for change in (_add_bias, _penalize_repetition, _penalize_counts, _hold_back_ends):
        change(scores, states)
    return scores


def uniform(states: Sequence[SamplingState]) -> NDArray[np.float64]:
    """One number in [0, 1) a state, 53 bits, a function of (seed, index, tokens generated) alone."""
    seeds = np.array([state.seed for state in states], np.uint64)
    nothing = np.zeros_like(seeds)
    positions = np.array([len(state.output) for state in states], np.uint64)
    indexes = np.array([state.index for state in states], np.uint64)
    words = philox4x32((positions, indexes, nothing, nothing), (seeds & _WORD, seeds >> _HALF))
    numbers: NDArray[np.float64] = (((words[0] << _HALF) | words[1]) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


def fork_seed(seed: int, fork: int) -> int:
    """The 64-bit seed of fork number `fork` of what `seed` drives."""
    counter = tuple(np.array([word], np.uint64) for word in (fork & 0xFFFFFFFF, fork >> 32, 0, _FORK))
    key = tuple(np.array([word], np.uint64) for word in (seed & 0xFFFFFFFF, seed >> 32))
    words = philox4x32(counter, key)
    return int(words[0][0]) << 32 | int(words[1][0])


Words = Sequence[NDArray[np.uint64]]


def philox4x32(counter: Words, key: Words) -> Words:
    """Ten rounds over 32-bit words, each held in 64 bits: four counters `[n]` and two keys `[n]` to four words `[n]`.

    Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
    """
    a, b, c, d = counter
    left, right = key
    for _ in range(10):
        first, second = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (second >> _HALF) ^ b ^ left, second & _WORD, (first >> _HALF) ^ d ^ right, first & _WORD
        left, right = (left + np.uint64(0x9E3779B9)) & _WORD, (right + np.uint64(0xBB67AE85)) & _WORD
    return a, b, c, d


# -- inside -----------------------------------------------------------------------------------------------


def _draw(logits: Tensor, states: Sequence[SamplingState]) -> list[int]:
    """One token a row, by the inverse of the cumulative distribution in the order of token ids."""
    probabilities = distribution(logits, states)
    cumulative = probabilities.cumsum(-1)
    target = torch.from_numpy(uniform(states)).to(cumulative.device)[:, None] * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, target, right=True)[:, 0]
    last = (probabilities > 0).to(torch.int8).cumsum(-1).argmax(-1)
    tokens: list[int] = torch.minimum(chosen, last).tolist()
    return tokens


def _likeliest(scores: Tensor, count: int) -> Tensor:
    """The `count` likeliest tokens of each row, of equal ones the first. `topk` alone breaks ties as it likes."""
    if not count:
        return scores.new_empty((scores.shape[0], 0), dtype=torch.int64)
    bits = scores.view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() << 32
    last = scores.shape[1] - 1
    keys = (ordered + torch.arange(last, -1, -1, device=scores.device)).topk(count, -1).values
    return last - (keys & 0xFFFFFFFF)


def _keep_likeliest(probabilities: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """top-k, with all that equal the k-th; then top-p of what is left, the likeliest always."""
    ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    width = ordered.shape[1]
    counts = [min(p.top_k, width) if p.top_k > 0 else width for p in params]
    ordered *= ordered >= ordered.gather(-1, torch.tensor(counts, device=ordered.device)[:, None] - 1)
    cumulative = ordered.cumsum(-1)
    before = (cumulative - ordered) / cumulative[:, -1:]
    ordered *= before < _column([p.top_p for p in params], ordered)
    return torch.zeros_like(ordered).scatter(-1, ids, ordered)


def _add_bias(scores: Tensor, states: Sequence[SamplingState]) -> None:
    biased = [(i, state.params.logit_bias) for i, state in enumerate(states) if state.params.logit_bias]
    if biased:
        rows = [i for i, bias in biased for _ in bias]
        ids = [token for _, bias in biased for token in bias]
        added = _values([value for _, bias in biased for value in bias.values()], scores)
        scores[rows, ids] += added


def _penalize_repetition(scores: Tensor, states: Sequence[SamplingState]) -> None:
    """Tokens of prompt and output: a positive score is divided, a negative one multiplied."""
    some = [(i, state.params.repetition_penalty) for i, state in enumerate(states)]
    some = [(i, penalty) for i, penalty in some if penalty != 1.0]
    if not some:
        return
    seen = [states[i].seen() for i, _ in some]
    rows, ids = _places([i for i, _ in some], seen, scores)
    factor = torch.repeat_interleave(_values([p for _, p in some], scores), _sizes(seen, scores))
    found = scores[rows, ids]
    scores[rows, ids] = torch.where(found < 0, found * factor, (found / factor).clamp(max=_LARGEST))


def _penalize_counts(scores: Tensor, states: Sequence[SamplingState]) -> None:
    """Tokens of the output: less `presence`, and less `frequency` for each time."""
    some = [i for i, s in enumerate(states) if s.counts and (s.params.presence_penalty or s.params.frequency_penalty)]
    if not some:
        return
    used = [np.fromiter(states[i].counts, np.int64) for i in some]
    rows, ids = _places(some, used, scores)
    presence = _values([states[i].params.presence_penalty for i in some], scores)
    frequency = _values([states[i].params.frequency_penalty for i in some], scores)
    counts = _values([count for i in some for count in states[i].counts.values()], scores)
    sizes = _sizes(used, scores)
    scores[rows, ids] -= presence.repeat_interleave(sizes) + frequency.repeat_interleave(sizes) * counts


def _hold_back_ends(scores: Tensor, states: Sequence[SamplingState]) -> None:
    """No end before `min_tokens`, unless nothing but ends could be drawn."""
    width = scores.shape[1]
    some = [(i, [t for t in s.stop_ids if t < width]) for i, s in enumerate(states) if _too_short(s)]
    rows = [i for i, ends in some for _ in ends]
    if not rows:
        return
    ids = [token for _, ends in some for token in ends]
    before = scores[rows, ids]
    scores[rows, ids] = float("-inf")
    nothing_left = scores.amax(-1).isneginf()[rows]
    scores[rows, ids] = torch.where(nothing_left, before, float("-inf"))


def _too_short(state: SamplingState) -> bool:
    return len(state.output) < state.params.min_tokens


def _places(rows: Sequence[int], tokens: Sequence[NDArray[np.int64]], like: Tensor) -> tuple[Tensor, Tensor]:
    """Row and token of every entry, for all of these tokens of each row."""
    owners = np.repeat(rows, [some.size for some in tokens])
    ids = np.concatenate(tokens)
    return torch.from_numpy(owners).to(like.device), torch.from_numpy(ids).to(like.device)


def _sizes(tokens: Sequence[NDArray[np.int64]], like: Tensor) -> Tensor:
    return torch.tensor([some.size for some in tokens], device=like.device)


def _values(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return _values(values, like)[:, None]
