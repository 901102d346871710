"""How much is taken at the same time. What is beyond is refused at once, before its body is read."""

import math
from collections import deque

from radixgen.core import InvalidRequest, QueueFull, check_integer

_RECENT = 32
_LONGEST_WAIT = 60


class Admission:
    """Counts sequences, running and waiting ones alike, from a request's acceptance to its end."""

    def __init__(self, most: int) -> None:
        check_integer("max_open", most, 1, 1 << 20)
        self.most = most
        self.open = 0
        self.refused = 0
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def check(self, sequences: int = 1) -> None:
        """Raises `QueueFull` where so many more are too many now, `InvalidRequest` where they always are."""
        if sequences > self.most:
            raise InvalidRequest("n × len(prompt)", sequences, f"at most {self.most} sequences are served at a time")
        if self.open + sequences > self.most:
            self.refused += 1
            raise QueueFull("open", self.open + sequences, f"at most {self.most} sequences run and wait")

    def enter(self, sequences: int) -> None:
        """As `check`; then they are counted until `leave`."""
        self.check(sequences)
        self.open += sequences

    def leave(self, sequences: int, seconds: float) -> None:
        """A request of so many is over, after so many seconds."""
        self.open -= sequences
        assert self.open >= 0
        self._recent.append(seconds)

    def retry_after(self) -> int:
        """Seconds after which a place may be free: what a request has taken lately, from 1 to 60."""
        mean = sum(self._recent) / len(self._recent) if self._recent else 0.0
        return min(max(math.ceil(mean), 1), _LONGEST_WAIT)
