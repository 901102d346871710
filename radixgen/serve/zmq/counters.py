"""Counters of a worker."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class PeerCounters:
    """Counters of one front end since the worker started. Fields count messages unless noted otherwise."""

    received: int = 0
    adds: int = 0
    aborts: int = 0
    calls: int = 0
    ignored: int = 0
    """Messages of a known type that has no effect here."""
    malformed: int = 0
    """Dropped messages: undecodable, truncated, or in too many frames."""
    unknown: int = 0
    """Dropped messages of an unknown type."""
    duplicates: int = 0
    """Dropped requests whose id is that of a live request."""
    refused: int = 0
    """Requests rejected with `error` before they started."""
    unread: int = 0
    """Requests rejected with `error` because only their id could be decoded."""
    turned_away: int = 0
    """Requests aborted because they came while the worker drained."""
    accepted: int = 0
    """Requests that the engine accepted, including forks."""
    forks: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    """Finished requests by finish reason."""
    overflows: int = 0
    """Outbox overflows."""
    overflow_aborted: int = 0
    """Requests aborted by an outbox overflow."""
    lost: int = 0
    """Lost connections."""
    sent: int = 0

    @property
    def dropped(self) -> int:
        return self.malformed + self.unknown

    def check(self, live: int, *, settled: bool = False) -> None:
        """Assert that the counters add up.

        live: number of requests that have not finished.
        settled: whether no message is in flight.
        """
        read = self.adds + self.aborts + self.calls + self.ignored + self.dropped
        done = self.accepted - self.forks + self.refused + self.turned_away + self.duplicates
        assert read <= self.received and done <= self.adds, self
        assert not settled or (read == self.received and done == self.adds), self
        assert self.accepted == sum(self.finished.values()) + live, (self, live)


@dataclass(slots=True)
class Counters:
    """Counters of one worker."""

    peers: dict[str, PeerCounters] = field(default_factory=dict)
    """Counters of each front end, by its address"""
    stalls: int = 0
    """Times that the engine made no progress for longer than the stall timeout, although it had work."""
    handshakes: int = 0
    bad_handshakes: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
