"""The oracle of greedy decoding: transformers alone, one unpadded prompt at a time.

An engine replaces the attention of the instance that it loads, so the oracle needs another with
equal weights: `families.build` once more, or a second `from_pretrained`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

LOGIT_TIE = 1e-4
ROUTER_TIE = 1e-5


@dataclass(frozen=True, slots=True)
class Reference:
    """What greedy decoding of one prompt gives."""

    prompt_ids: list[int]
    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A difference at output `index` that no near-tie explains.

    want, got: None where that output has ended.
    gap: the reference's logit of `want` less that of `got`; infinite where either is None.
    """

    index: int
    want: int | None
    got: int | None
    gap: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far the outputs were compared, and what differed.

    tokens: output positions compared; fewer than asked for after a mismatch, or after a tie that
        nothing continued.
    ties, router_ties: differences at a near-tie of the logits, or else of a router.
    mismatches: none or one, which ends the comparison.
    """

    tokens: int
    ties: int = 0
    router_ties: int = 0
    mismatches: tuple[Mismatch, ...] = ()


@dataclass(frozen=True, slots=True)
class _Forced:
    """Of one teacher-forced forward: logits `[tokens, vocab]` and router margins `[tokens]`."""

    logits: Tensor
    router_margins: Tensor


def reference_greedy(model: PreTrainedModel, prompt_ids: Sequence[int], max_new_tokens: int) -> Reference:
    """Exactly `max_new_tokens` greedy tokens by `generate`.

    What the checkpoint would add (stop tokens, repetition penalties) is set aside. The model's
    attention must be transformers' eager or SDPA, else ValueError; transformers itself refuses SDPA
    where that would drop a soft cap or sinks.
    """
    _require_own_attention(model)
    prompt = torch.tensor([list(prompt_ids)], device=model.device)
    own = model.generation_config
    model.generation_config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0)
    try:
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt))
    finally:
        model.generation_config = own
    return Reference(list(prompt_ids), out[0, prompt.shape[1] :].tolist())


def margins(model: PreTrainedModel, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> np.ndarray:
    """Top-1 minus top-2 logit where each of `token_ids` was drawn: float64 `[tokens]`."""
    top = _force(model, prompt_ids, token_ids).logits.topk(2).values
    return (top[:, 0] - top[:, 1]).numpy()


def compare(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    got: Sequence[int],
    max_new_tokens: int,
    tau: float = LOGIT_TIE,
    continue_with: Callable[[list[int], int], list[int]] | None = None,
) -> Comparison:
    """Compare an engine's greedy output with the reference's.

    A difference is a tie where the reference's logits of its own token and of the one got are less
    than `tau` apart. It is a router tie where some router chose its experts by less than
    `ROUTER_TIE` at that position or an earlier one, whose K and V this one reads. After either,
    `continue_with(token_ids, max_new_tokens)` lets the engine go on from the reference's tokens up
    to and including that position; without it the comparison ends there.
    """
    want = reference_greedy(model, prompt_ids, max_new_tokens).token_ids
    got, ties, router_ties = list(got), 0, 0
    while (index := _first_difference(want, got)) is not None:
        missing = index >= min(len(want), len(got))
        forced = _force(model, prompt_ids, want)
        gap = float("inf") if missing else _gap(forced.logits[index], want[index], got[index])
        if gap < tau:
            ties += 1
        elif not missing and forced.router_margins[index] < ROUTER_TIE:
            router_ties += 1
        else:
            found = Mismatch(index, _at(want, index), _at(got, index), gap)
            return Comparison(min(index + 1, len(want)), ties, router_ties, (found,))
        done = want[: index + 1]
        if continue_with is None:
            return Comparison(len(done), ties, router_ties)
        rest = len(want) - len(done)
        got = done + (continue_with([*prompt_ids, *done], rest) if rest else [])
    return Comparison(len(want), ties, router_ties)


def _require_own_attention(model: PreTrainedModel) -> None:
    attention = model.config._attn_implementation
    if attention not in ("eager", "sdpa"):
        raise ValueError(f"attention is {attention!r}: the oracle needs an instance of its own")


def _first_difference(want: list[int], got: list[int]) -> int | None:
    return next((i for i, (a, b) in enumerate(zip_longest(want, got)) if a != b), None)


def _at(tokens: list[int], index: int) -> int | None:
    return tokens[index] if index < len(tokens) else None


def _gap(logits: Tensor, want: int, got: int) -> float:
    return float(logits[want] - logits[got])


@torch.inference_mode()
def _force(model: PreTrainedModel, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> _Forced:
    """Logits and router margins (infinite without routers), in float64 on the CPU.

    A router margin is the least in any layer at any position up to that of the output.
    """
    _require_own_attention(model)
    input_ids = torch.tensor([[*prompt_ids, *token_ids][:-1]], device=model.device)
    chosen_by: list[Tensor] = []

    def record(router: nn.Module, _: Any, output: tuple[Tensor, ...]) -> None:
        chosen_by.append(_router_margin(router, output[0].double()).reshape(-1).cpu())

    hooks = [
        module.register_forward_hook(record)
        for module in model.modules()
        if type(module).__name__.lower().endswith("topkrouter")
    ]
    try:
        logits = model(input_ids=input_ids, use_cache=False).logits[0].double().cpu()
    finally:
        for hook in hooks:
            hook.remove()
    least = torch.full((input_ids.shape[1],), float("inf"), dtype=torch.float64)
    for margin in chosen_by:
        least = least.minimum(margin)
    first = len(prompt_ids) - 1
    return _Forced(logits[first:], least.cummin(0).values[first:])


def _router_margin(router: Any, logits: Tensor) -> Tensor:
    """How far the last expert chosen leads the first left out.

    logits: `[positions, experts]`; returns `[positions]`, in logits. DeepSeek-V3 chooses groups,
    then experts within them, by biased sigmoids: there the lesser of both margins, in those scores.
    """
    if not hasattr(router, "e_score_correction_bias"):
        return _choice_margin(logits, router.top_k)
    scores = logits.sigmoid() + router.e_score_correction_bias
    groups = scores.unflatten(-1, (router.num_group, -1))
    group_scores = groups.topk(2).values.sum(-1)
    best = group_scores.topk(router.topk_group).indices
    inside = torch.zeros_like(group_scores, dtype=torch.bool).scatter(-1, best, True)
    kept = groups.masked_fill(~inside[..., None], float("-inf")).flatten(-2)
    of_groups = _choice_margin(group_scores, router.topk_group)
    return _choice_margin(kept, router.top_k).minimum(of_groups)


def _choice_margin(scores: Tensor, chosen: int) -> Tensor:
    """Between the last chosen and the first left out; infinite where all are chosen."""
    if chosen >= scores.shape[-1]:
        return torch.full_like(scores[..., 0], float("inf"))
    top = scores.topk(chosen + 1).values
    return top[..., -2] - top[..., -1]
