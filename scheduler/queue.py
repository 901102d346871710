"""Queue of waiting requests: by priority, then longest computed prefix, with a bound on being overtaken."""

from collections.abc import Callable, Iterator
from operator import attrgetter

from sortedcontainers import SortedKeyList

from radixgen.cache import FollowedMatch
from radixgen.core import Limits, QueueFull
from radixgen.scheduler.sequence import Request, Sequence


class WaitingQueue:
    """Waiting requests, including those with only some sequences preempted.

    The highest priority comes first; within it, of the first `max_overtaken + 1` requests by arrival, the one with the
    longest computed prefix. Requests that share a prefix thus follow one another. At most `max_overtaken` later ones
    of the same priority overtake a request, so one with `k` earlier ones is admitted after at most `k + max_overtaken`.
    """

    def __init__(self, max_overtaken: int) -> None:
        self.max_overtaken = max_overtaken
        self.num_sequences = 0
        self.num_tokens = 0
        """Prompt tokens of the waiting requests."""
        self._requests: SortedKeyList[Request] = SortedKeyList(key=attrgetter("rank"))

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for request in self._requests for sequence in request.waiting)

    def require_room(self, requests: int, tokens: int, limits: Limits) -> None:
        """Raise `QueueFull` if there is no room for this many more requests or prompt tokens."""
        if len(self) + requests > limits.max_waiting:
            raise QueueFull("waiting", len(self) + requests, f"at most {limits.max_waiting} requests wait")
        if self.num_tokens + tokens > limits.max_waiting_tokens and len(self):
            limit = f"at most {limits.max_waiting_tokens} prompt tokens wait"
            raise QueueFull("waiting_tokens", self.num_tokens + tokens, limit)

    def add(self, sequence: Sequence) -> None:
        request = sequence.request
        if not request.waiting:
            self._requests.add(request)
            self.num_tokens += request.prompt.size
        request.waiting.append(sequence)
        self.num_sequences += 1

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence that ended or was cancelled."""
        request = sequence.request
        request.waiting.remove(sequence)
        self.num_sequences -= 1
        if not request.waiting:
            self._leave(request)

    def choose(self, follow: Callable[[Sequence], FollowedMatch]) -> Request | None:
        """Return the request to admit next, or None if every candidate waits for KV from the host.

        `follow` makes the tree keep a candidate's match up to date. Each admission looks at all of them: this is hot.
        """
        candidates = self._candidates()
        if not candidates:
            return None
        computed = [(request.waiting[0].followed or follow(request.waiting[0])).computed for request in candidates]
        return candidates[computed.index(max(computed))]

    def _candidates(self) -> list[Request]:
        """Return the requests of the highest priority, by arrival, up to the first that must not be overtaken again,
        without those that wait for KV from the host.
        """
        candidates: list[Request] = []
        for request in self._requests.islice(0, self.max_overtaken + 1):
            if candidates and request.priority != candidates[0].priority:
                break
            if not request.fetching:
                candidates.append(request)
            if request.overtaken >= self.max_overtaken:
                break
        return candidates

    def admit(self, sequence: Sequence) -> None:
        """Remove a sequence that was admitted. Earlier requests that still wait count as overtaken."""
        request = sequence.request
        self.remove(sequence)
        if request.waiting:
            return
        first = -request.priority, 0
        for earlier in self._requests.irange_key(first, request.rank):  # those of higher priorities may be fetching
            earlier.overtaken += 1

    def check(self) -> None:
        """Assert that the counts are right and that no request was overtaken too often."""
        assert self.num_sequences == sum(len(request.waiting) for request in self._requests)
        assert self.num_tokens == sum(request.prompt.size for request in self._requests)
        for request in self._requests:
            assert request.waiting and request.overtaken <= self.max_overtaken

    def _leave(self, request: Request) -> None:
        self._requests.remove(request)
        self.num_tokens -= request.prompt.size
