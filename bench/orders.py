"""Orders of admission that `bench.simulate` compares. Only radixgen's own, `groups`, evicts last what waiting requests
match.
"""

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest.mock import patch

from radixgen import Engine
from radixgen.cache import FollowedMatch, Node
from radixgen.cache.eviction import EvictionQueue
from radixgen.model.base import Model
from radixgen.scheduler import scheduler
from radixgen.scheduler.queue import WaitingQueue
from radixgen.scheduler.sequence import Request, Sequence

_WINDOW = 64
"""Waiting requests that `LongestPrefix` compares"""


class FirstCome(WaitingQueue):
    """By priority, then arrival."""

    def choose(self, follow: Callable[[Sequence], FollowedMatch]) -> Request:
        first: Request = self._requests[0]
        return first


class LongestPrefix(WaitingQueue):
    """By priority, then the longest computed prefix of the first 64, with radixgen's bound on being overtaken."""

    def choose(self, follow: Callable[[Sequence], FollowedMatch]) -> Request:
        candidates: list[Request] = []
        for request in self._requests.islice(0, _WINDOW):
            if candidates and request.priority != candidates[0].priority:
                break
            candidates.append(request)
            if request.overtaken >= self.max_overtaken:
                break
        return max(candidates, key=lambda r: (r.waiting[0].followed or follow(r.waiting[0])).computed)


class Order(NamedTuple):
    """A rule of admission. `keeps_matched`: nodes that waiting requests match are evicted last."""

    queue: type[WaitingQueue]
    keeps_matched: bool

    def engine(self, model: Model, **options: Any) -> Engine:
        """Return an engine that admits in this order. `options` are those of `Engine`."""
        with patch.object(scheduler, "WaitingQueue", self.queue):
            engine = Engine(model, **options)
        if not self.keeps_matched:
            engine._core.tree.evictable = EvictionQueue(_least_recently_used)
        return engine


def _least_recently_used(node: Node) -> tuple[float, ...]:
    return node.priority, node.last_used


ORDERS = {
    "first come": Order(FirstCome, keeps_matched=False),
    "longest prefix": Order(LongestPrefix, keeps_matched=False),
    "groups": Order(WaitingQueue, keeps_matched=True),
}
