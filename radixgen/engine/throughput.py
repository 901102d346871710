"""`ThroughputLog`: logs an engine's throughput every few seconds while there is work."""

import logging
import time
from collections.abc import Callable

from radixgen.core import Stats

logger = logging.getLogger(__name__)


class ThroughputLog:
    """Logs rates computed from an engine's counters."""

    def __init__(
        self, stats: Callable[[], Stats], seconds: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`stats` returns the engine's counters. A line is logged at most once in `seconds`."""
        self._stats, self._seconds, self._clock = stats, seconds, clock
        self._last: tuple[float, Stats] | None = None

    def pause(self) -> None:
        """Exclude the time until the next step, since there is no work."""
        self._last = None

    def step(self) -> None:
        """Log a line if it is time. Call this after each step."""
        now = self._clock()
        if self._last is None:
            self._last = now, self._stats()
            return
        begin, before = self._last
        if now - begin >= self._seconds:
            after = self._stats()
            logger.info(describe(before, after, now - begin))
            self._last = now, after


def describe(before: Stats, after: Stats, seconds: float) -> str:
    """Describe in one line the throughput over `seconds`, and the current load."""
    prompt = after.prompt_tokens - before.prompt_tokens
    cached = after.cached_prompt_tokens - before.cached_prompt_tokens
    generated = after.generated_tokens - before.generated_tokens
    return (
        f"prompts: {prompt / seconds:,.1f} tokens/s ({cached / max(prompt, 1):.1%} cached), "
        f"generation: {generated / seconds:,.1f} tokens/s, running: {after.num_running}, "
        f"waiting: {after.num_waiting}, KV cache: {after.kv_tokens_used / after.kv_tokens_total:.1%} used"
    )
