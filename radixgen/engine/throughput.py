"""A log line about an engine's throughput, every few seconds while there is work."""

import logging
import time
from collections.abc import Callable

from radixgen.core import Stats

logger = logging.getLogger(__name__)


class ThroughputLog:
    """Logs rates between two looks at an engine's counters."""

    def __init__(
        self, stats: Callable[[], Stats], seconds: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Read the engine's counters by `stats`, at most once in `seconds`."""
        self._stats, self._seconds, self._clock = stats, seconds, clock
        self._last: tuple[float, Stats] | None = None

    def pause(self) -> None:
        """There is no work: the time until the next step is not counted."""
        self._last = None

    def step(self) -> None:
        """A step has ended."""
        now = self._clock()
        if self._last is None:
            self._last = now, self._stats()
            return
        begin, before = self._last
        if now - begin >= self._seconds:
            after = self._stats()
            logger.info("%s", describe(before, after, now - begin))
            self._last = now, after


def describe(before: Stats, after: Stats, seconds: float) -> str:
    """One line on what was done in `seconds` between two looks, and on what is left to do."""
    prompt = after.prompt_tokens - before.prompt_tokens
    cached = after.cached_prompt_tokens - before.cached_prompt_tokens
    generated = after.generated_tokens - before.generated_tokens
    return (
        f"prompts: {prompt / seconds:,.1f} tokens/s ({cached / max(prompt, 1):.1%} cached), "
        f"generation: {generated / seconds:,.1f} tokens/s, running: {after.num_running}, "
        f"waiting: {after.num_waiting}, KV cache: {after.kv_tokens_used / after.kv_tokens_total:.1%} used"
    )
