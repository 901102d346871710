"""Cache hints: what a caller expects of a prefix's KV, and how the engine answered."""

from dataclasses import dataclass
from typing import Literal

HintAction = Literal["retain", "pin", "prefetch", "demote", "share"]
HintStatus = Literal["accepted", "clipped", "refused"]


@dataclass(frozen=True, slots=True)
class CacheHint:
    """A hint about a prompt's KV, given with a request or to `Engine.apply_hints`.

    `action`:

    - `retain`: keep the prefix cached for `ttl` seconds, by default 300. It is a pin: it gives way if memory is short,
      lowest `priority` first;
    - `pin`: as `retain`, by default for as long as `Limits.max_hint_seconds`;
    - `prefetch`: bring the prefix from host memory to the pool, and retain it, by default for 60 seconds;
    - `demote`: let what follows the prefix be evicted before everything else, as far as no other path shares it. With
      a request, when the request has ended, its output included;
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

    `num_tokens`: length of the prefix that is retained, pinned or on its way; of the prompt's tokens, how many are
    demoted; 0 if refused. `ttl`: seconds that it lasts.
    """

    action: HintAction
    status: HintStatus
    num_tokens: int = 0
    ttl: float | None = None
    reason: str = ""
