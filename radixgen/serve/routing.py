"""Which replica a request goes to: where its longest prefix is, unless that replica is too busy.

    cost(replica) = load + prefix_weight * missing tokens + margin * missing tokens / prompt tokens

The least cost is chosen. *Load* is what a replica's live requests still have to compute, in tokens: blocks of their
prompts that are not cached there (blocks that several share count once), and the output expected of each. *Missing* is
what the replica would compute anew of this prompt: all behind the longest prefix that is cached there or belongs to a
live request. At equal cost the longest prefix wins, then the replica that holds the fewest blocks.

So a replica keeps the requests whose prefix it has until it is busier than another by `prefix_weight` tokens for each
token that the prefix saves, and `margin` tokens more where the prefix is the whole prompt. The weight is above 1
because computing a prefix anew delays all that wait behind it, and takes the room of other prefixes; `bench.cluster`
measures what weights do. The margin is for short prompts, which are worth keeping together only a little.

A request's own blocks are live from `sent` on. Sixteen samples of one prompt, sent as sixteen requests before any is
computed, go to one replica while the output expected of them stays within margin and weight.

Other routers weigh the same quantities. NVIDIA Dynamo's KV router takes the least weighted sum of blocks to compute and
blocks in use (docs.nvidia.com/dynamo, Router Design: Cost Function). The cache-aware policy of SGLang and SMG takes the
longest prefix while the numbers of requests are balanced, else the fewest requests (`--balance-abs-threshold`).
vLLM's data-parallel balancer counts requests alone.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from radixgen.core import DuplicateRequest, EngineDead, InvalidRequest, check_integer

PREFIX_WEIGHT = 8
"""Tokens of load that outweigh one token of prefix"""
MARGIN = 8_192
"""Tokens: one full step of a large GPU"""
OUTPUT_TOKENS = 256
"""Expected of a request whose caller does not say"""


@dataclass(frozen=True, slots=True)
class _Request:
    replica: int
    hashes: tuple[int, ...]
    output_tokens: int


@dataclass(slots=True)
class _Replica:
    cached: set[int] = field(default_factory=set)
    live: Counter[int] = field(default_factory=Counter)
    """How many live requests have each block in their prompts."""
    to_compute: int = 0
    """Blocks that are live and not cached."""
    output_tokens: int = 0
    requests: set[Hashable] = field(default_factory=set)

    def match(self, hashes: Sequence[int], least: int = 0) -> int:
        """How many leading blocks are cached or live; 0 if fewer than `least`, which takes one look to see.

        The parent of such a block is one too, so bisection finds where they end.
        """
        cached, live, total = self.cached, self.live, len(hashes)

        def lacks(block: int) -> bool:
            return block not in cached and block not in live

        if least > total or (least and lacks(hashes[least - 1])):
            return 0
        if least == total or lacks(hashes[least]):
            return least
        return bisect_left(hashes, True, lo=least + 1, key=lacks)


class Router:
    """Chooses among replicas by what they cache and how busy they are. Does no I/O, has no clock, is not thread-safe.

    Feed it each replica's cache events (`stored`, `removed`, `cleared`), each request (`sent`, `ended`), and replicas
    that come and go (`joined`, `died`). Blocks are named as in cache events: chained hashes of full blocks of
    `block_size` tokens, `radixgen.cache.hash_blocks(tokens, block_size, namespace)`.

    ```python
    router = Router(range(2))
    hashes = hash_blocks(prompt, router.block_size)
    replica = router.choose(hashes)
    router.sent("request-1", replica, hashes, output_tokens=100)
    router.ended("request-1")
    ```

    Memory: an entry for each cached block, `max_blocks` a replica at the most, and for each block of a live prompt. How
    many requests are live is the caller's to bound.
    """

    def __init__(
        self,
        replicas: Iterable[int] = (),
        *,
        block_size: int = 16,
        prefix_weight: int = PREFIX_WEIGHT,
        margin: int = MARGIN,
        max_blocks: int = 1 << 22,
    ) -> None:
        """`replicas`: numbers of those that are there already. `prefix_weight` and `margin` (tokens) say how much
        busier than another the replica with the longest prefix may be. `max_blocks`: of a replica that tells of more,
        the rest is not counted as cached.

        Raises `InvalidRequest`.
        """
        check_integer("block_size", block_size, 1, 1 << 16)
        check_integer("prefix_weight", prefix_weight, 1, 1 << 20)
        check_integer("margin", margin, 0, 1 << 40)
        check_integer("max_blocks", max_blocks, 1, 1 << 40)
        self.block_size = block_size
        self.prefix_weight = prefix_weight
        self.margin = margin
        self.max_blocks = max_blocks
        self._replicas: dict[int, _Replica] = {}
        self._requests: dict[Hashable, _Request] = {}
        for replica in replicas:
            self.joined(replica)

    @property
    def replicas(self) -> tuple[int, ...]:
        """Those that are there."""
        return tuple(self._replicas)

    # -- replicas -----------------------------------------------------------------------------------------

    def joined(self, replica: int) -> None:
        """A replica is there, with nothing cached and no request. Raises `InvalidRequest` if it was there already."""
        check_integer("replica", replica, 0, 1 << 31)
        if replica in self._replicas:
            raise InvalidRequest("replica", replica, "has joined already")
        self._replicas[replica] = _Replica()

    def died(self, replica: int) -> list[Hashable]:
        """A replica is gone. Returns its live requests, which are forgotten; nothing if it was not there."""
        gone = self._replicas.pop(replica, None)
        if gone is None:
            return []
        for request in gone.requests:
            del self._requests[request]
        return list(gone.requests)

    # -- cache events; of replicas that are not there they are ignored ----------------------------------------

    def stored(self, replica: int, hashes: Iterable[int]) -> None:
        """Blocks are cached, each after its parent. Those that are cached already are ignored."""
        state = self._replicas.get(replica)
        if state is None:
            return
        for block in hashes:
            if block not in state.cached and len(state.cached) < self.max_blocks:
                state.cached.add(block)
                state.to_compute -= block in state.live

    def removed(self, replica: int, hashes: Iterable[int]) -> None:
        """Blocks are cached no more, each before its parent. Those that are not cached are ignored."""
        state = self._replicas.get(replica)
        if state is None:
            return
        for block in hashes:
            if block in state.cached:
                state.cached.remove(block)
                state.to_compute += block in state.live

    def cleared(self, replica: int) -> None:
        """No block is cached."""
        state = self._replicas.get(replica)
        if state is not None:
            state.cached.clear()
            state.to_compute = len(state.live)

    # -- requests -----------------------------------------------------------------------------------------

    def choose(self, hashes: Sequence[int]) -> int:
        """The replica for a prompt of these blocks. Changes nothing.

        Raises `EngineDead` if no replica is there.
        """
        if not self._replicas:
            raise EngineDead("no replica is there")
        total = len(hashes)
        scale = max(total, 1)  # costs times this are integers, so that equal ones are
        weight = self.prefix_weight * self.block_size * scale + self.margin
        best, lowest = -1, (0, 0, 0)
        for replica, state in self._replicas.items():
            load = self._load(state) * scale
            least = total - (lowest[0] - load) // weight if best >= 0 else 0  # what it takes to cost no more
            match = state.match(hashes, max(least, 0))
            key = load + weight * (total - match), -match, len(state.cached) + state.to_compute
            if best < 0 or key < lowest:
                best, lowest = replica, key
        return best

    def sent(
        self, request: Hashable, replica: int, hashes: Sequence[int], *, output_tokens: int = OUTPUT_TOKENS
    ) -> None:
        """A request with a prompt of these blocks was sent, and is expected to generate `output_tokens`, of all its
        samples together.

        Raises `DuplicateRequest` for an id that is live; `InvalidRequest` for a replica that is not there.
        """
        check_integer("output_tokens", output_tokens, 0, 1 << 40)
        if request in self._requests:
            raise DuplicateRequest("request", request, "is live already")
        if replica not in self._replicas:
            raise InvalidRequest("replica", replica, "is not there")
        state = self._replicas[replica]
        self._requests[request] = _Request(replica, tuple(hashes), output_tokens)
        state.requests.add(request)
        state.to_compute += len({block for block in hashes if block not in state.cached and block not in state.live})
        state.live.update(hashes)
        state.output_tokens += output_tokens

    def ended(self, request: Hashable) -> None:
        """A request has ended, however it did. Ids that are not live are ignored: their replica may have died."""
        one = self._requests.pop(request, None)
        if one is None:
            return
        state = self._replicas[one.replica]
        state.requests.remove(request)
        state.output_tokens -= one.output_tokens
        for block in one.hashes:
            requests = state.live[block]
            if requests > 1:
                state.live[block] = requests - 1
            else:
                state.live.pop(block)
                state.to_compute -= block not in state.cached

    # -- what is known, for metrics ---------------------------------------------------------------------------

    def load(self, replica: int) -> int:
        """Tokens that a replica's live requests have to compute. Raises `InvalidRequest` if it is not there."""
        return self._load(self._state(replica))

    def match(self, replica: int, hashes: Sequence[int]) -> int:
        """How many leading blocks a replica has, cached or live. Raises `InvalidRequest` if it is not there."""
        return self._state(replica).match(hashes)

    def _state(self, replica: int) -> _Replica:
        if replica not in self._replicas:
            raise InvalidRequest("replica", replica, "is not there")
        return self._replicas[replica]

    def _load(self, state: _Replica) -> int:
        return state.to_compute * self.block_size + state.output_tokens
