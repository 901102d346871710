"""Choose the replica for a request: the one with its longest prefix, unless that is too busy.

    cost(replica) = load + prefix_weight * missing tokens + margin * missing tokens / prompt tokens

The replica with the lowest cost is chosen. *Load* is what a replica's live requests still have to compute, in tokens:
blocks of their prompts that are not cached there (shared blocks count once), plus `output_weight` times their expected
output, whose tokens take longer than those of a prompt. *Missing tokens* are those of this prompt that the replica
would have to compute: all after the longest prefix that is cached there or belongs to a live request. At equal cost the
longest prefix wins, then the replica with the fewest blocks.

So a replica keeps the requests whose prefix it has until it is busier than another by `prefix_weight` tokens per saved
token, plus `margin` tokens if the prefix is the whole prompt. The weight is above 1 because recomputing a prefix delays
all requests behind it and takes room from other prefixes; `bench.cluster` measures the effect of weights. The margin
keeps short prompts together.

The blocks of a request are live from `sent` on: sixteen samples of one prompt, sent as sixteen requests before any is
computed, go to one replica as long as their expected output stays within margin and weight.

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
OUTPUT_WEIGHT = 4
"""Tokens of a prompt that are computed in the time of one output token, with tens of sequences in a batch"""
MARGIN = 16_384
"""Tokens: sixteen samples of a prompt, each with the default output"""
OUTPUT_TOKENS = 256
"""Expected output tokens of a request without `max_tokens`"""


@dataclass(frozen=True, slots=True)
class _Request:
    replica: int
    hashes: tuple[int, ...]
    output_tokens: int


@dataclass(slots=True)
class _Replica:
    cached: set[int] = field(default_factory=set)
    live: Counter[int] = field(default_factory=Counter)
    """Number of live requests with each block in their prompts"""
    to_compute: int = 0
    """Number of blocks that are live but not cached"""
    output_tokens: int = 0
    requests: set[Hashable] = field(default_factory=set)

    def match(self, hashes: Sequence[int], least: int = 0) -> int:
        """Number of leading blocks that are cached or live, by bisection; 0 if fewer than `least`."""
        cached, live, total = self.cached, self.live, len(hashes)

        def lacks(block: int) -> bool:
            return block not in cached and block not in live

        if least > total or (least and lacks(hashes[least - 1])):
            return 0
        if least == total or lacks(hashes[least]):
            return least
        return bisect_left(hashes, True, lo=least + 1, key=lacks)


class Router:
    """Chooses replicas by their cached blocks and their load. Does no I/O, has no clock, is not thread-safe.

    Report to it the KV cache events of each replica (`stored`, `removed`, `cleared`), each request (`sent`, `ended`),
    and replicas that come and go (`joined`, `died`). Blocks are identified as in KV cache events: by chained hashes of
    full blocks of `block_size` tokens, `radixgen.cache.hash_blocks(tokens, block_size, namespace)`.

    ```python
    router = Router(range(2))
    hashes = hash_blocks(prompt, router.block_size)
    replica = router.choose(hashes)
    router.sent("request-1", replica, hashes, output_tokens=100)
    router.ended("request-1")
    ```

    Memory: an entry for each cached block, at most `max_blocks` per replica, and for each block of a live request. The
    caller bounds the number of live requests.
    """

    def __init__(
        self,
        replicas: Iterable[int] = (),
        *,
        block_size: int = 16,
        prefix_weight: int = PREFIX_WEIGHT,
        output_weight: int = OUTPUT_WEIGHT,
        margin: int = MARGIN,
        max_blocks: int = 1 << 22,
    ) -> None:
        """
        replicas: numbers of the initial replicas.
        block_size: tokens per block.
        prefix_weight: tokens of load that outweigh one token of prefix.
        output_weight: load, in tokens, of each expected output token.
        margin: additional load, in tokens, that outweighs a prefix as long as the prompt.
        max_blocks: maximum number of cached blocks per replica; further ones are ignored.

        Raises `InvalidRequest`.
        """
        check_integer("block_size", block_size, 1, 1 << 16)
        check_integer("prefix_weight", prefix_weight, 1, 1 << 20)
        check_integer("output_weight", output_weight, 1, 1 << 20)
        check_integer("margin", margin, 0, 1 << 40)
        check_integer("max_blocks", max_blocks, 1, 1 << 40)
        self.block_size = block_size
        self.prefix_weight = prefix_weight
        self.output_weight = output_weight
        self.margin = margin
        self.max_blocks = max_blocks
        self._replicas: dict[int, _Replica] = {}
        self._requests: dict[Hashable, _Request] = {}
        for replica in replicas:
            self.joined(replica)

    @property
    def replicas(self) -> tuple[int, ...]:
        """Numbers of the current replicas."""
        return tuple(self._replicas)

    # -- replicas -----------------------------------------------------------------------------------------

    def joined(self, replica: int) -> None:
        """Add a replica with an empty cache and no request. Raises `InvalidRequest` if it is there already."""
        check_integer("replica", replica, 0, 1 << 31)
        if replica in self._replicas:
            raise InvalidRequest("replica", replica, "has joined already")
        self._replicas[replica] = _Replica()

    def died(self, replica: int) -> list[Hashable]:
        """Remove a replica. Returns its live requests, which are forgotten; empty for an unknown replica."""
        gone = self._replicas.pop(replica, None)
        if gone is None:
            return []
        for request in gone.requests:
            del self._requests[request]
        return list(gone.requests)

    # -- cache events; of replicas that are not there they are ignored ----------------------------------------

    def stored(self, replica: int, hashes: Iterable[int]) -> None:
        """Add cached blocks, parents first. Blocks that are there already are ignored."""
        state = self._replicas.get(replica)
        if state is None:
            return
        for block in hashes:
            if block not in state.cached and len(state.cached) < self.max_blocks:
                state.cached.add(block)
                state.to_compute -= block in state.live

    def removed(self, replica: int, hashes: Iterable[int]) -> None:
        """Remove cached blocks, children first. Unknown blocks are ignored."""
        state = self._replicas.get(replica)
        if state is None:
            return
        for block in hashes:
            if block in state.cached:
                state.cached.remove(block)
                state.to_compute += block in state.live

    def cleared(self, replica: int) -> None:
        """Remove all cached blocks of a replica."""
        state = self._replicas.get(replica)
        if state is not None:
            state.cached.clear()
            state.to_compute = len(state.live)

    # -- requests -----------------------------------------------------------------------------------------

    def choose(self, hashes: Sequence[int]) -> int:
        """Replica for a prompt with these blocks. Changes no state.

        Raises `EngineDead` if there is no replica.
        """
        if not self._replicas:
            raise EngineDead("there is no replica")
        total = len(hashes)
        scale = max(total, 1)  # makes costs integers, so that ties are exact
        weight = self.prefix_weight * self.block_size * scale + self.margin
        best, lowest = -1, (0, 0, 0)
        for replica, state in self._replicas.items():
            load = self._load(state) * scale
            least = total - (lowest[0] - load) // weight if best >= 0 else 0  # match needed for the lowest cost
            match = state.match(hashes, max(least, 0))
            key = load + weight * (total - match), -match, len(state.cached) + state.to_compute
            if best < 0 or key < lowest:
                best, lowest = replica, key
        return best

    def sent(
        self, request: Hashable, replica: int, hashes: Sequence[int], *, output_tokens: int = OUTPUT_TOKENS
    ) -> None:
        """Count a request with these blocks as live on a replica.

        output_tokens: expected output tokens, of all its sequences together.

        Raises `DuplicateRequest` for a live id, `InvalidRequest` for an unknown replica.
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
        """Stop counting a request, however it ended. Unknown ids are ignored: their replica may have died."""
        live = self._requests.pop(request, None)
        if live is None:
            return
        state = self._replicas[live.replica]
        state.requests.remove(request)
        state.output_tokens -= live.output_tokens
        for block in live.hashes:
            requests = state.live[block]
            if requests > 1:
                state.live[block] = requests - 1
            else:
                state.live.pop(block)
                state.to_compute -= block not in state.cached

    # -- metrics ----------------------------------------------------------------------------------------------

    def load(self, replica: int) -> int:
        """Load of a replica, in tokens. Raises `InvalidRequest` for an unknown replica."""
        return self._load(self._state(replica))

    def match(self, replica: int, hashes: Sequence[int]) -> int:
        """Number of leading blocks that are cached or live on a replica. Raises `InvalidRequest` if it is unknown."""
        return self._state(replica).match(hashes)

    def _state(self, replica: int) -> _Replica:
        if replica not in self._replicas:
            raise InvalidRequest("replica", replica, "is not there")
        return self._replicas[replica]

    def _load(self, state: _Replica) -> int:
        return state.to_compute * self.block_size + self.output_weight * state.output_tokens
