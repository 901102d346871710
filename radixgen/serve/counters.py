"""What a worker counts."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class PeerCounters:
    """Of one front end, since the worker began. Messages unless the name says otherwise."""

    received: int = 0
    adds: int = 0
    aborts: int = 0
    calls: int = 0
    ignored: int = 0
    """Of a known type that has no meaning here."""
    malformed: int = 0
    """Undecodable, truncated, or in too many frames; dropped."""
    unknown: int = 0
    """Of no known type; dropped."""
    duplicates: int = 0
    """Requests under the id of a live one; dropped."""
    refused: int = 0
    """Requests that ended with `error` before they began."""
    unread: int = 0
    """Requests of which no more than the id could be read, and that ended with `error` likewise."""
    turned_away: int = 0
    """Requests that came while the worker drained, and ended with `abort`."""
    accepted: int = 0
    """Requests that the engine took, forks among them."""
    forks: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    """Accepted requests by how they ended."""
    overflows: int = 0
    """Outbox overflows."""
    overflow_aborted: int = 0
    """Requests that were aborted by an overflow."""
    lost: int = 0
    """How often it went away with its connection."""
    sent: int = 0

    @property
    def dropped(self) -> int:
        return self.malformed + self.unknown

    def check(self, live: int, *, settled: bool = False) -> None:
        """Assert that they add up, where `live` of its requests have not ended. `settled`: no message is under way."""
        read = self.adds + self.aborts + self.calls + self.ignored + self.dropped
        done = self.accepted - self.forks + self.refused + self.turned_away + self.duplicates
        assert read <= self.received and done <= self.adds, self
        assert not settled or (read == self.received and done == self.adds), self
        assert self.accepted == sum(self.finished.values()) + live, (self, live)


@dataclass(slots=True)
class Counters:
    """Of one worker."""

    peers: dict[str, PeerCounters] = field(default_factory=dict)
    """By the front end's address"""
    stalls: int = 0
    """How often there was work, and nothing was done for too long."""
    handshakes: int = 0
    bad_handshakes: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
