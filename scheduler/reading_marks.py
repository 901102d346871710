"""Marks of reading policies: which policy a path of the tree is read under."""

from collections.abc import Mapping, Sequence

from radixgen.cache import MAX_MARK, MAX_MARKED_TOKEN, RadixTree, marks
from radixgen.core import InvalidRequest, QueueFull, StateGuard
from radixgen.core.reading import Exact, ReadingPolicy
from radixgen.scheduler.planner import Planner
from radixgen.scheduler.sequence import Request


class PolicyMarks:
    """Gives each policy a mark: an index into `Planner.policies`, by which tokens read under it are marked."""

    def __init__(
        self,
        planner: Planner,
        trees: Sequence[RadixTree],
        requests: Mapping[str, Request],
        guard: StateGuard,
        vocab_size: int,
    ) -> None:
        """`trees` and `requests`: those that may hold marks, live."""
        self.max_mark = MAX_MARK
        self._by_mark: list[ReadingPolicy] = [Exact()]
        self._marks: dict[ReadingPolicy, int] = {}
        self._free: list[int] = []
        """Marks that nothing holds any more."""
        self._planner = planner
        self._trees = trees
        self._requests = requests
        self._guard = guard
        self._vocab_size = vocab_size
        planner.policies = self._by_mark

    def mark(self, policy: ReadingPolicy) -> int:
        """Return the mark of a policy, 0 if it is exact.

        If all marks are taken, but only evictable tokens hold some of them, everything that is not locked is evicted
        from the trees. Raises `QueueFull` if requests and locked tokens hold all, and `InvalidRequest` if the model has
        too many tokens to mark them.
        """
        if policy.exact:
            return 0
        if policy not in self._marks:
            if self._vocab_size > MAX_MARKED_TOKEN + 1:
                limit = f"must be exact, with a vocabulary of {self._vocab_size} tokens"
                raise InvalidRequest("reading", policy, limit)
            if len(self._by_mark) <= self.max_mark:
                self._by_mark.append(policy)
                self._marks[policy] = len(self._by_mark) - 1
            else:
                self._replace(policy)
        return self._marks[policy]

    def _replace(self, policy: ReadingPolicy) -> None:
        """Give a policy the mark of another that is not in use."""
        if not self._free:
            self._collect()
        mark = self._free.pop()
        self._by_mark[mark] = policy
        self._marks[policy] = mark

    def _collect(self) -> None:
        """Evict all that is not locked, and free all marks that nothing holds then, so evictions are few.

        If requests and locked nodes hold all marks, nothing is evicted.
        """
        with self._guard:
            if free := self._marks_without(self._held(locked=True)):
                self._planner.forget()
                for tree in self._trees:
                    tree.reset()
                free = self._marks_without(self._held(locked=False))
        if not free:
            raise QueueFull("reading", len(self._by_mark), f"at most {self.max_mark} different policies are in use")
        for mark in free:
            del self._marks[self._by_mark[mark]]
        self._free = free[::-1]

    def _held(self, *, locked: bool) -> set[int]:
        """Return the marks of requests and of nodes, or only of nodes that are locked."""
        held = {request.mark for request in self._requests.values()}
        for tree in self._trees:
            held.update(*(marks(node.tokens).tolist() for node in tree.nodes() if node.locked or not locked))
        return held

    def _marks_without(self, held: set[int]) -> list[int]:
        """Return all marks but those that are held."""
        return [mark for mark in range(1, len(self._by_mark)) if mark not in held]
