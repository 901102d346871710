"""Cache hints: what a caller says about the future use of a prefix, and the engine's answers."""

from dataclasses import dataclass
from typing import Literal

HintAction = Literal["retain", "pin", "prefetch", "demote", "share"]
HintStatus = Literal["accepted", "clipped", "refused"]


@dataclass(frozen=True, slots=True)
class CacheHint:
    """A hint about a prompt's KV, given with a request or to `Engine.apply_hints`.

    `action`:

    - `retain`: pin the prefix for `ttl` seconds, by default 300. Pins give way when memory is short, lowest `priority`
      first;
    - `pin`: as `retain`, by default for as long as `Limits.max_hint_seconds`;
    - `prefetch`: bring the prefix from host memory to the pool, and retain it, by default for 60 seconds;
    - `demote`: let what follows the prefix be evicted before everything else, unless another path shares it. A hint of
      a request applies when the request has ended, also to its output;
    - `share`: with 0 tokens, the request shares nothing with others.

    `num_tokens`: length of the prefix. Default: the whole prompt, and 0 for `demote`.
    """

    action: HintAction
    num_tokens: int | None = None
    ttl: float | None = None
    priority: int = 0


@dataclass(frozen=True, slots=True)
class HintResult:
    """The answer to a hint: `accepted`, `clipped` to a bound, or `refused`. `reason` says why it is not `accepted`.

    `num_tokens`: length of the prefix that is pinned or being fetched, or number of the prompt's tokens that are
    demoted; 0 if refused. `ttl`: lifetime in seconds.
    """

    action: HintAction
    status: HintStatus
    num_tokens: int = 0
    ttl: float | None = None
    reason: str = ""
