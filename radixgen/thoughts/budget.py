"""Budget of a search, and the reasons why a search ends."""

from dataclasses import dataclass
from typing import Literal

from radixgen.core import InvalidRequest, Limits, check_integer

EndReason = Literal["complete", "solved", "thoughts", "tokens", "seconds", "stopped", "cancelled"]
"""Reason why a search ended: the strategy was complete, enough solutions were found, a part of the budget was used up,
`stop` returned True, or the search was cancelled (or is still running).
"""
END_REASONS: tuple[EndReason, ...] = ("complete", "solved", "thoughts", "tokens", "seconds", "stopped", "cancelled")


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Limits of a search, including its resumed parts. They are never exceeded.

    thoughts: maximum number of thoughts, including the root. A thought gets all of its children or none.
    tokens: maximum number of generated tokens. Requests that could exceed it are not sent.
    seconds: maximum duration. Requests that are still running are cancelled.
    solutions: number of thoughts that pass `goal` after which the search ends.
    """

    thoughts: int = 10_000
    tokens: int | None = None
    seconds: float | None = None
    solutions: int = 1

    def __post_init__(self) -> None:
        """Check the limits. Raises `InvalidRequest`."""
        check_integer("thoughts", self.thoughts, 1, Limits().max_thoughts)
        check_integer("solutions", self.solutions, 1, Limits().max_thoughts)
        if self.tokens is not None:
            check_integer("tokens", self.tokens, 0, 2**63 - 1)
        seconds = self.seconds
        if seconds is not None and (
            isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < 2**31
        ):
            raise InvalidRequest("seconds", seconds, "must be a number of seconds from 0 to 2^31")
