"""How much a search may use."""

from dataclasses import dataclass
from typing import Literal

from radixgen.core import InvalidRequest, Limits, check_integer

Ended = Literal["complete", "solved", "thoughts", "tokens", "seconds", "stopped", "cancelled"]
"""Why a search ended: its strategy was done, enough solutions were found, a part of the budget was spent, `stop` said
so, or it was cancelled (or goes on).
"""
ENDED: tuple[Ended, ...] = ("complete", "solved", "thoughts", "tokens", "seconds", "stopped", "cancelled")


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Bounds on a whole search, resumed parts included. None of them is exceeded.

    thoughts: nodes of the tree, the root among them; the children of a thought come all or not at all.
    tokens: generated tokens. A request that could go beyond is not sent.
    seconds: requests still running then are cancelled.
    solutions: thoughts that pass `goal`, after which the search ends.
    """

    thoughts: int = 10_000
    tokens: int | None = None
    seconds: float | None = None
    solutions: int = 1

    def __post_init__(self) -> None:
        """Raises `InvalidRequest`."""
        check_integer("thoughts", self.thoughts, 1, Limits().max_thoughts)
        check_integer("solutions", self.solutions, 1, Limits().max_thoughts)
        if self.tokens is not None:
            check_integer("tokens", self.tokens, 0, 2**63 - 1)
        seconds = self.seconds
        if seconds is not None and (
            isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < 2**31
        ):
            raise InvalidRequest("seconds", seconds, "must be a number of seconds from 0 to 2^31")
