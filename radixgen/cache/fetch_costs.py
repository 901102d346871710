"""Which part of a prefix is fetched, and which is computed, by the rates measured so far."""

import math

_MANY_ROWS = 256
"""Only steps of at least so many rows measure how long computing a token takes."""
_FORGET_SECONDS = 60.0
"""After this time, rates that spoke against a fetch are measured anew, so that one slow copy does not end fetching."""
_SMOOTHING = 0.25
"""Weight of the latest measurement in a rate."""


class FetchCosts:
    """Seconds per token of fetching from the host, of reading from disk and of computing; 0 until measured."""

    def __init__(self) -> None:
        self.seconds_per_read = self.seconds_per_fetched = self.seconds_per_computed = 0.0
        self._now = 0.0
        self._forget_at = math.inf

    def fetched(self, tokens: int, seconds: float) -> None:
        """Measure a fetch from the host."""
        self.seconds_per_fetched = _smoothed(self.seconds_per_fetched, seconds / tokens)

    def read(self, tokens: int, seconds: float) -> None:
        """Measure a read from disk."""
        self.seconds_per_read = _smoothed(self.seconds_per_read, seconds / tokens)

    def stepped(self, now: float, rows: int) -> None:
        """Measure the step of `rows` rows that ended at `now`, in seconds on the engine's clock."""
        if rows >= _MANY_ROWS:
            self.seconds_per_computed = _smoothed(self.seconds_per_computed, (now - self._now) / rows)
        self._now = now

    def best_end(self, first: int, in_host: int, stop: int, *, queued: int, queued_reads: int) -> int:
        """Return the position up to which a prefix is to be fetched from `first` on, so that this and computing the
        rest up to `stop` take the least time. What lies behind `in_host` is read from disk before.

        `queued`, `queued_reads`: tokens of the fetches and reads in flight, which come first. As times are linear, the
        best is one of `stop`, `in_host` and `first`. Returns `stop` until all was measured, and again when rates are
        forgotten.
        """
        if not self.seconds_per_computed:
            return stop

        def seconds(end: int) -> float:
            total = (stop - end) * self.seconds_per_computed
            if end > first:
                total += (queued + end - first) * self.seconds_per_fetched
            if end > max(first, in_host):
                total += (queued_reads + end - in_host) * self.seconds_per_read
            return total

        best = min(stop, max(first, in_host), first, key=seconds)
        if best == stop:
            return stop
        self._forget_at = min(self._forget_at, self._now + _FORGET_SECONDS)
        if self._now < self._forget_at:
            return best
        self.seconds_per_read = self.seconds_per_fetched = 0.0
        self._forget_at = math.inf
        return stop


def _smoothed(average: float, value: float) -> float:
    return average + _SMOOTHING * (value - average) if average else value
