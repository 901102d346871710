"""Total statistics of several workers, also across their restarts."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from radixgen.core import Stats

Figures = Mapping[str, Any]
"""Fields of a worker's `Stats`, by name"""


class Totals:
    """Sums of workers' statistics. Gauges are those of the current workers; counters never decrease."""

    def __init__(self) -> None:
        self._last: dict[int, Figures] = {}
        self._ended: list[Figures] = []
        """Sum of the counters of workers that were replaced by another one with the same index"""

    def add(self, current: Mapping[int, Figures]) -> Stats:
        """Update with the statistics of the current workers, by index. Returns the totals."""
        for index, now in current.items():
            before = self._last.get(index)
            if before is not None and any(now[name] < before[name] for name in _COUNTERS):
                self._ended = [_sum([*self._ended, before])]
        self._last |= current
        counters = _sum([*self._last.values(), *self._ended])
        gauges = _sum(list(current.values()))
        return Stats(**{name: gauges[name] if _is_gauge(name) else value for name, value in counters.items()})


def _is_gauge(name: str) -> bool:
    return name.startswith(("kv_tokens_", "num_")) or name == "shared_tokens"


_COUNTERS = [stat.name for stat in fields(Stats) if not _is_gauge(stat.name) and stat.name != "sharing_ended"]
"""Numbers that decrease only if another process has taken the worker's place"""


def _sum(parts: list[Figures]) -> Figures:
    total: dict[str, Any] = {}
    for stat in fields(Stats):
        values = [part[stat.name] for part in parts]
        if stat.name == "sharing_ended":
            reasons = {reason for value in values for reason in value}
            total[stat.name] = {reason: sum(value.get(reason, 0) for value in values) for reason in sorted(reasons)}
        else:
            total[stat.name] = sum(values)
    return total
