"""Queue of waiting requests: by priority, then longest computed prefix, with a bound on being overtaken."""

from collections.abc import Callable, Iterator
from operator import attrgetter

from sortedcontainers import SortedKeyList

from radixgen.cache import FollowedMatch
from radixgen.scheduler.sequence import Request, Sequence

_WINDOW = 64


class WaitingQueue:
    """Waiting requests, including those with only some sequences preempted.

    The highest priority comes first. Within it, of the first 64 requests by arrival, the one with the longest computed
    prefix; but a request is overtaken by at most `max_overtaken` later ones of its priority. So a request with `k`
    earlier ones of its priority is admitted after at most `k + max_overtaken` others of that priority.
    """

    def __init__(self, max_overtaken: int) -> None:
        self.max_overtaken = max_overtaken
        self.num_sequences = 0
        self.num_tokens = 0
        """Prompt tokens of the waiting requests."""
        self._requests: SortedKeyList[Request] = SortedKeyList(key=attrgetter("rank"))
        self._chosen: Request | None = None

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for request in self._requests for sequence in request.waiting)

    def add(self, sequence: Sequence) -> None:
        request = sequence.request
        if not request.waiting:
            self._requests.add(request)
            self.num_tokens += request.prompt.size
            if self._chosen is not None and request.rank < self._chosen.rank:
                self._chosen = None
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
        """Return the request to admit next, or None while all that may be next fetch KV from the host. The choice
        stands until it is admitted or removed, begins to fetch, or an earlier request arrives.

        `follow` makes the tree keep a candidate's match up to date.
        """
        if self._chosen is None or self._chosen.fetching:
            self._chosen = self._longest(follow)
        return self._chosen

    def admit(self, sequence: Sequence) -> None:
        """Remove a sequence that was admitted. Earlier requests that still wait count as overtaken."""
        request = sequence.request
        self.remove(sequence)
        if request.waiting:
            return
        for earlier in self._requests:
            if earlier.serial > request.serial or earlier.priority != request.priority:
                break
            earlier.overtaken += 1

    def check(self) -> None:
        """Assert that the counts are right and that no request was overtaken too often."""
        assert self.num_sequences == sum(len(request.waiting) for request in self._requests)
        assert self.num_tokens == sum(request.prompt.size for request in self._requests)
        assert self._chosen is None or self._chosen in self._requests
        for request in self._requests:
            assert request.waiting and request.overtaken <= self.max_overtaken

    def _longest(self, follow: Callable[[Sequence], FollowedMatch]) -> Request | None:
        """Return the request with the longest computed prefix, the first of several; of those that fetch nothing.

        Candidates are those of the highest priority, by arrival, up to the first that must not be overtaken again. Each
        admission looks at up to 64 requests: this loop is hot.
        """
        best: Request | None = None
        most, bound = -1, self.max_overtaken
        for request in self._requests.islice(0, _WINDOW):
            if best is not None and request.priority != best.priority:
                break
            if not request.fetching:
                followed = request.waiting[0].followed or follow(request.waiting[0])
                if followed.length > most and (computed := followed.computed) > most:
                    best, most = request, computed
            if request.overtaken >= bound:
                break
        return best

    def _leave(self, request: Request) -> None:
        self._requests.remove(request)
        self.num_tokens -= request.prompt.size
        if self._chosen is request:
            self._chosen = None
