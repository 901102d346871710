"""How one request is to be sampled. Names and defaults follow vLLM's `SamplingParams`."""

import math
from dataclasses import dataclass

from radixgen.core.errors import InvalidRequest
from radixgen.core.limits import Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request.

    `temperature` 0 is greedy. `top_k` 0 or -1 and `top_p` 1.0 switch those filters off. `logprobs=k`
    reports the sampled token's natural-log probability and the `k` likeliest alternatives, both of the
    model's own distribution, before temperature and filters. `seed` fixes the draws; without one the
    engine derives them from its own seed and the order of submission.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 16
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def validate(self, limits: Limits) -> None:
        """Raise `InvalidRequest` for the first field that is out of its range."""
        _integer("n", self.n, 1, limits.max_n)
        _number("temperature", self.temperature, 0.0, 1e4)
        _number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise InvalidRequest("top_p", self.top_p, "must be above 0")
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        if not isinstance(self.stop_token_ids, tuple | list):
            raise InvalidRequest("stop_token_ids", self.stop_token_ids, "must be a tuple of integers")
        _integer("len(stop_token_ids)", len(self.stop_token_ids), 0, limits.max_stop_token_ids)
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, 2**31 - 1)
        if not isinstance(self.ignore_eos, bool):
            raise InvalidRequest("ignore_eos", self.ignore_eos, "must be true or false")
        if self.seed is not None:
            _integer("seed", self.seed, 0, 2**64 - 1)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, limits.max_logprobs)


def _integer(field: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(field, value, f"must be an integer from {low} to {high}")
    if not low <= value <= high:
        raise InvalidRequest(field, value, f"must be from {low} to {high}")


def _number(field: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(field, value, f"must be a number from {low:g} to {high:g}")
    if not math.isfinite(value) or not low <= value <= high:
        raise InvalidRequest(field, value, f"must be finite, from {low:g} to {high:g}")
