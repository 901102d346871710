"""Figures of several workers as one, through their restarts."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from radixgen.core import Stats

Figures = Mapping[str, Any]
"""A worker's `Stats`, by name"""


class Totals:
    """Sums of what workers tell. Gauges are of those that are there; counters never fall, whoever goes or begins
    anew.
    """

    def __init__(self) -> None:
        self._last: dict[int, Figures] = {}
        self._ended: list[Figures] = []
        """Counters of processes whose index another process has taken, added up"""

    def add(self, told: Mapping[int, Figures]) -> Stats:
        """told: the workers that are there, by index."""
        for index, now in told.items():
            before = self._last.get(index)
            if before is not None and any(now[name] < before[name] for name in _COUNTERS):
                self._ended = [_sum([*self._ended, before])]
        self._last |= told
        counted = _sum([*self._last.values(), *self._ended])
        there = _sum(list(told.values()))
        return Stats(**{name: there[name] if _is_gauge(name) else value for name, value in counted.items()})


def _is_gauge(name: str) -> bool:
    return name.startswith(("kv_tokens_", "num_")) or name == "shared_tokens"


_COUNTERS = [one.name for one in fields(Stats) if not _is_gauge(one.name) and one.name != "sharing_ended"]
"""Numbers that fall where another process has begun anew"""


def _sum(parts: list[Figures]) -> Figures:
    total: dict[str, Any] = {}
    for one in fields(Stats):
        values = [part[one.name] for part in parts]
        if one.name == "sharing_ended":
            reasons = {reason for value in values for reason in value}
            total[one.name] = {reason: sum(value.get(reason, 0) for value in values) for reason in sorted(reasons)}
        else:
            total[one.name] = sum(values)
    return total
