"""Sampling: from logits to tokens, with penalties and filters as in transformers and counter-based random numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixgen.core import SamplingParams, SamplingState
from radixgen.kernels import torch_sampling
from radixgen.kernels.drawable_tokens import DrawableTokens
from radixgen.kernels.sharded_sampling import ShardedLogits, is_exact
from radixgen.kernels.torch_sampling import probabilities
from radixgen.kernels.upload import upload
from radixgen.sampling.beam_search import Choices

DrawTokens = Callable[[Tensor, Sequence[int], Sequence[SamplingParams], NDArray[np.float64]], Tensor]
"""As `radixgen.kernels.torch_sampling.draw_tokens`."""
_GREEDY = SamplingParams(temperature=0.0)
_WARM_UP_PARAMS: tuple[dict[str, Any], ...] = ({"temperature": 0.0}, {}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1})
_WORD, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_LARGEST = torch.finfo(torch.float64).max
_FORK = 0x666F726B
"""Separates the random counters of forks from those of draws."""
_FACTORS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_KEY_STEPS = np.arange(10, dtype=np.uint64)[:, None, None] * np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)
"""Philox's increments of the keys, `[round, 2, 1]`."""


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """One token per draw; -1 if the row has NaN, +inf, or nothing finite.

    `logprobs`, by draw, if requested: `{token id: natural-log probability}`, the sampled token first. `faults`, by
    draw: why no token was sampled, if not because of the row.
    """

    tokens: list[int]
    logprobs: dict[int, dict[int, float]] = field(default_factory=dict)
    faults: dict[int, str] = field(default_factory=dict)


class PendingTokens:
    """Sampled tokens, on their way from the device."""

    tokens: Tensor
    """`[draws]` int64, on the device of the logits; -1 as in `SamplerOutput`."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = self._host = tokens
        if tokens.is_cuda:
            self._host = torch.empty_like(tokens, device="cpu", pin_memory=True)
            self._host.copy_(tokens, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def wait(self) -> list[int]:
        """Return the tokens. Does not wait for work given to the device after them."""
        if self.tokens.is_cuda:
            self._copied.synchronize()
        tokens: list[int] = self._host.tolist()
        return tokens


def sample(
    logits: Tensor | ShardedLogits,
    rows: Sequence[int],
    states: Sequence[SamplingState],
    drawable: DrawableTokens | None = None,
) -> SamplerOutput:
    """Sample one token per draw: draw `i` from row `rows[i]` of logits `[rows, vocab]`, for `states[i]`.

    Each draw depends only on its own row and state, not on the rest of the batch. `drawable` defaults to all tokens.
    """
    return report(logits, rows, states, draw(logits, rows, states, drawable).wait())


def draw(
    logits: Tensor | ShardedLogits,
    rows: Sequence[int],
    states: Sequence[SamplingState],
    drawable: DrawableTokens | None = None,
) -> PendingTokens:
    """As `sample`, without waiting for the device."""
    params = [state.params for state in states]
    uniforms = np.zeros(len(states)) if all(p.greedy for p in params) else uniform(states)
    if not isinstance(logits, Tensor):
        if not any(map(_needs_all_logits, states)):
            return PendingTokens(logits.draw_tokens(rows, params, uniforms, drawable))
        logits = logits.gather()
    draw_tokens = _fastest_draw_tokens(logits.is_cuda)
    among = logits if drawable is None else drawable.among(logits)
    shaped = [i for i, state in enumerate(states) if state.shaped]
    if not shaped:
        return PendingTokens(draw_tokens(among, rows, params, uniforms))
    # Shaped draws are made twice: first greedily from the unchanged logits, which gives -1 if the row is invalid.
    tokens = draw_tokens(among, rows, [_GREEDY if s.shaped else s.params for s in states], uniforms)
    scores = _shaped_scores(logits, [rows[i] for i in shaped], [states[i] for i in shaped], drawable)
    drawn = draw_tokens(scores, range(len(shaped)), [params[i] for i in shaped], uniforms[shaped])
    places = _index(shaped, logits)
    tokens.index_copy_(0, places, torch.where(tokens.index_select(0, places) >= 0, drawn, -1))
    return PendingTokens(tokens)


def warm_up_sampling(logits: Tensor | ShardedLogits, drawable: DrawableTokens | None = None) -> None:
    """Sample from the first rows of logits `[rows, vocab]` by every kernel, to compile them, and discard the tokens."""
    prompt = np.zeros(1, np.int32)
    for options in _WARM_UP_PARAMS:
        for penalty in (1.0, 1.1):
            params = SamplingParams(**options, repetition_penalty=penalty)
            for count in {1, min(2, len(logits))}:
                states = [SamplingState(params, 0, index, prompt, [], frozenset()) for index in range(count)]
                draw(logits, range(count), states, drawable).wait()


def report(
    logits: Tensor | ShardedLogits, rows: Sequence[int], states: Sequence[SamplingState], tokens: list[int]
) -> SamplerOutput:
    """Add the requested log-probabilities to the sampled tokens."""
    requested = [i for i, state in enumerate(states) if state.params.logprobs is not None and tokens[i] >= 0]
    if not requested:
        return SamplerOutput(tokens)
    logprobs = token_logprobs(
        _pick(logits if isinstance(logits, Tensor) else logits.gather(), [rows[i] for i in requested]),
        np.array([tokens[i] for i in requested]),
        [states[i].params.logprobs or 0 for i in requested],
    )
    return SamplerOutput(tokens, dict(zip(requested, logprobs, strict=True)))


def token_logprobs(logits: Tensor, tokens: NDArray[np.integer], top: Sequence[int]) -> list[dict[int, float]]:
    """Return, for each row of logits `[n, vocab]`, the natural-log probabilities of `tokens` `[n]` and of the `top[i]`
    most likely tokens.
    """
    scores = logits.float().log_softmax(-1)
    own = scores.gather(-1, torch.from_numpy(tokens.astype(np.int64)).to(logits.device)[:, None])[:, 0].tolist()
    ids = _likeliest(scores, min(max(top), scores.shape[1]))
    values = scores.gather(-1, ids)
    return [
        {token: value} | dict(zip(best[:count], likely[:count], strict=True))
        for token, value, best, likely, count in zip(
            tokens.tolist(), own, ids.tolist(), values.tolist(), top, strict=True
        )
    ]


def likeliest(logits: Tensor, rows: Sequence[int], count: int, drawable: DrawableTokens | None = None) -> list[Choices]:
    """For each of `rows` of the logits `[n, vocab]`, return its `count` most likely `drawable` tokens, or all if there
    are fewer.
    """
    scores = _pick(logits, rows).float().log_softmax(-1)
    if drawable is not None:
        scores, count = drawable.among(scores), min(count, drawable.count)
    ids = _likeliest(scores, min(count, scores.shape[1]))
    top = scores.gather(-1, ids).cpu().numpy(), ids.cpu().numpy()
    return [Choices(log_probs, token_ids) for log_probs, token_ids in zip(*top, strict=True)]


def distribution(logits: Tensor, states: Sequence[SamplingState], drawable: DrawableTokens | None = None) -> Tensor:
    """Convert logits `[n, vocab]`, one row per state, to the float64 probabilities of its draw, which need not sum to
    1.

    Greedy states get the most likely token only.
    """
    scores = _shaped_scores(logits, range(len(states)), states, drawable)
    return probabilities(scores, [state.params for state in states])


def shape(scores: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Apply bias, penalties, grammars and `min_tokens` to float64 scores `[n, vocab]`, in place. Returns `scores`.

    Raises what a state's grammar raises.
    """
    shaped = [state for state in states if state.shaped]
    if not shaped:
        return scores
    for state in shaped:
        state.update()
    for change in (_add_bias, _penalize_repetition, _penalize_counts, _keep_allowed, _hold_back_ends):
        change(scores, states)
    return scores


def uniform(states: Sequence[SamplingState]) -> NDArray[np.float64]:
    """Return one number in [0, 1) per state, with 53 bits, a function of seed, index and number of generated tokens."""
    seeds = np.array([state.seed for state in states], np.uint64)
    counters = np.zeros((4, len(states)), np.uint64)
    counters[0] = [len(state.output) for state in states]
    counters[1] = [state.index for state in states]
    words = philox4x32(counters, np.stack((seeds & _WORD, seeds >> _HALF)))
    numbers: NDArray[np.float64] = (((words[0] << _HALF) | words[1]) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


def fork_seed(seed: int, fork: int) -> int:
    """Derive the 64-bit seed of fork number `fork` from `seed`."""
    words = _philox_single((fork & 0xFFFFFFFF, fork >> 32, 0, _FORK), seed)
    return words[0] << 32 | words[1]


def philox4x32(counters: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Philox4x32-10 over 32-bit words, each held in 64 bits: counters `[4, n]` and keys `[2, n]` to words `[4, n]`.

    (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.)
    """
    multiplied, mixed = counters[0::2], counters[1::2]
    for key in (keys + _KEY_STEPS) & _WORD:
        products = (multiplied * _FACTORS)[::-1]
        multiplied, mixed = (products >> _HALF) ^ mixed ^ key, products & _WORD
    return np.stack((multiplied, mixed), 1).reshape(4, -1)


# -- inside -----------------------------------------------------------------------------------------------


def _needs_all_logits(state: SamplingState) -> bool:
    """Return whether a sequence's draw needs all logits on one device, where each rank has some of them."""
    return state.shaped or state.params.logprobs is not None or not is_exact(state.params)


def _philox_single(counter: tuple[int, int, int, int], key: int) -> tuple[int, int, int, int]:
    """`philox4x32` of one 128-bit counter and one 64-bit key, without the overhead of arrays."""
    first, second, third, fourth = counter
    low, high = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        left, right = first * 0xD2511F53, third * 0xCD9E8D57
        first, second = (right >> 32) ^ second ^ low, right & 0xFFFFFFFF
        third, fourth = (left >> 32) ^ fourth ^ high, left & 0xFFFFFFFF
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return first, second, third, fourth


def _shaped_scores(
    logits: Tensor, rows: Sequence[int], states: Sequence[SamplingState], drawable: DrawableTokens | None
) -> Tensor:
    """Return the logits of `rows`, one row per state, of drawable tokens, after `shape`: float64 `[n, vocab]`."""
    scores = _pick(logits, rows).double()
    if drawable is not None:
        drawable.hide(scores)
    return shape(scores, states)


@cache
def _fastest_draw_tokens(cuda: bool) -> DrawTokens:
    """Return the Triton implementation on a GPU if Triton is installed, else PyTorch's."""
    if not cuda or find_spec("triton") is None:
        return torch_sampling.draw_tokens
    from radixgen.kernels import triton_sampling

    return triton_sampling.draw_tokens


def _pick(logits: Tensor, rows: Sequence[int]) -> Tensor:
    """Return rows of the logits as float32 or float64 `[n, vocab]`."""
    picked = logits.index_select(0, _index(rows, logits))
    return picked if picked.dtype == torch.float64 else picked.float()


def _index(places: Sequence[int], like: Tensor) -> Tensor:
    return upload(np.array(places, np.int64), like.device)


def _likeliest(scores: Tensor, count: int) -> Tensor:
    """Return the `count` most likely tokens of each row, ties in order of token id. `topk` alone breaks ties
    arbitrarily.
    """
    if not count:
        return scores.new_empty((scores.shape[0], 0), dtype=torch.int64)
    bits = scores.view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() << 32
    last = scores.shape[1] - 1
    keys = (ordered + torch.arange(last, -1, -1, device=scores.device)).topk(count, -1).values
    return last - (keys & 0xFFFFFFFF)


def _add_bias(scores: Tensor, states: Sequence[SamplingState]) -> None:
    biased = [(i, state.params.logit_bias) for i, state in enumerate(states) if state.params.logit_bias]
    if biased:
        rows = [i for i, bias in biased for _ in bias]
        ids = [token for _, bias in biased for token in bias]
        added = _values([value for _, bias in biased for value in bias.values()], scores)
        scores[rows, ids] += added


def _penalize_repetition(scores: Tensor, states: Sequence[SamplingState]) -> None:
    """Penalize tokens of prompt and output: positive scores are divided, negative ones multiplied."""
    some = [(i, state.params.repetition_penalty) for i, state in enumerate(states)]
    some = [(i, penalty) for i, penalty in some if penalty != 1.0]
    if not some:
        return
    seen = [states[i].seen() for i, _ in some]
    rows, ids = _places([i for i, _ in some], seen, scores)
    factor = torch.repeat_interleave(_values([p for _, p in some], scores), _sizes(seen, scores))
    values = scores[rows, ids]
    scores[rows, ids] = torch.where(values < 0, values * factor, (values / factor).clamp(max=_LARGEST))


def _penalize_counts(scores: Tensor, states: Sequence[SamplingState]) -> None:
    """Penalize tokens of the output by `presence`, and by `frequency` for each occurrence."""
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


def _keep_allowed(scores: Tensor, states: Sequence[SamplingState]) -> None:
    """Keep only tokens that grammars allow, and end tokens if they accept. A row without any is left unchanged: the
    grammar rejects what is sampled from it.
    """
    some = [(i, state.grammar.allowed()) for i, state in enumerate(states) if state.grammar is not None]
    if not some:
        return
    distinct = {id(allowed): allowed.mask for _, allowed in some}
    place = {key: at for at, key in enumerate(distinct)}
    masks = _unpack(upload(np.stack(list(distinct.values())), scores.device), scores.shape[1])
    allows = masks.index_select(0, _index([place[id(allowed)] for _, allowed in some], scores))
    ends = [(at, t) for at, (i, allowed) in enumerate(some) if allowed.accepts for t in states[i].stop_ids]
    ends = [(at, token) for at, token in ends if token < scores.shape[1]]
    if ends:
        allows[[at for at, _ in ends], [token for _, token in ends]] = True
    rows = _index([i for i, _ in some], scores)
    before = scores.index_select(0, rows)
    kept = before.masked_fill(~allows, float("-inf"))
    nothing_left = kept.amax(-1, keepdim=True).isneginf()
    scores.index_copy_(0, rows, torch.where(nothing_left, before, kept))


def _unpack(masks: Tensor, width: int) -> Tensor:
    """Unpack bits `[n, words]`, lowest first, to booleans `[n, width]`, padded with false."""
    bits = masks[:, :, None] >> torch.arange(32, dtype=torch.int32, device=masks.device)
    flags = (bits & 1).bool().flatten(1)[:, :width]
    return torch.nn.functional.pad(flags, (0, width - flags.shape[1]))


def _hold_back_ends(scores: Tensor, states: Sequence[SamplingState]) -> None:
    """Suppress end tokens before `min_tokens`, unless only end tokens can be sampled."""
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
    """Return row and token indices of these tokens of each row."""
    owners = np.repeat(rows, [some.size for some in tokens])
    ids = np.concatenate(tokens)
    return upload(owners, like.device), upload(ids, like.device)


def _sizes(tokens: Sequence[NDArray[np.int64]], like: Tensor) -> Tensor:
    return upload(np.array([some.size for some in tokens]), like.device)


def _values(values: Sequence[float], like: Tensor) -> Tensor:
    return upload(np.array(values, np.float64), like.device)
