"""Rules of routing that `bench.cluster` compares: which replica a request goes to."""

import random
from collections import Counter
from typing import Any

from bench.sessions import Player, Request
from radixgen.cache import BlockEvent, BlocksAdded, BlocksDropped
from radixgen.serve.routing import Router

ROUTING_BLOCK = 512
"""Tokens"""


class Policy:
    """Random. Told which replicas live and what became of each request."""

    reads_events = False

    def __init__(self) -> None:
        self.alive: list[int] = []
        self.random = random.Random(0)

    def joined(self, replica: int) -> None:
        self.alive.append(replica)

    def died(self, replica: int) -> None:
        self.alive.remove(replica)

    def choose(self, request: Request) -> int:
        return self.random.choice(self.alive)

    def sent(self, request: Request) -> None:
        """It is on its way to `request.replica`."""

    def ended(self, request: Request) -> None:
        """It has ended."""


class RoundRobin(Policy):
    def __init__(self) -> None:
        super().__init__()
        self.next = 0

    def choose(self, request: Request) -> int:
        self.next += 1
        return self.alive[self.next % len(self.alive)]


class Affinity(RoundRobin):
    def __init__(self) -> None:
        super().__init__()
        self.home: dict[Player, int] = {}

    def choose(self, request: Request) -> int:
        if self.home.get(request.player) not in self.alive:
            self.home[request.player] = super().choose(request)
        return self.home[request.player]


class Rule(Policy):
    """The rule of `radixgen.serve.routing`."""

    reads_events = True

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.router = Router(block_size=ROUTING_BLOCK, **options)

    def joined(self, replica: int) -> None:
        super().joined(replica)
        self.router.joined(replica)

    def died(self, replica: int) -> None:
        super().died(replica)
        self.router.died(replica)

    def choose(self, request: Request) -> int:
        return self.router.choose(request.hashes)

    def sent(self, request: Request) -> None:
        self.router.sent(request, request.replica, request.hashes)

    def ended(self, request: Request) -> None:
        self.router.ended(request)

    def event(self, replica: int, event: BlockEvent) -> bool:
        """A replica's cache has changed."""
        if isinstance(event, BlocksAdded):
            self.router.stored(replica, event.hashes)
        elif isinstance(event, BlocksDropped):
            self.router.removed(replica, event.hashes)
        else:
            self.router.cleared(replica)
        return True


class Dynamo(Rule):
    """The least of `scale` * (blocks to compute, there and of this prompt) + blocks of live requests, this one's
    included (docs.nvidia.com/dynamo, Routing Concepts; `scale` is `--router-prefill-load-scale`).
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.live: dict[int, Counter[int]] = {}

    def joined(self, replica: int) -> None:
        super().joined(replica)
        self.live[replica] = Counter()

    def choose(self, request: Request) -> int:
        total = len(request.hashes)

        def cost(replica: int) -> float:
            prefill = self.router.load(replica) / ROUTING_BLOCK + total - self.router.match(replica, request.hashes)
            live = self.live[replica]
            return self.scale * prefill + len(live) + sum(block not in live for block in request.hashes)

        return min(self.alive, key=cost)

    def sent(self, request: Request) -> None:
        self.router.sent(request, request.replica, request.hashes, output_tokens=0)
        self.live[request.replica].update(request.hashes)

    def ended(self, request: Request) -> None:
        super().ended(request)
        live = self.live[request.replica]
        for block in request.hashes:
            live[block] -= 1
            if not live[block]:
                del live[block]


class SMG(Rule):
    """The fewest live requests where these are out of balance: by more than `absolute` and by the factor 1.5. Else the
    longest prefix, if it is more than `threshold` of the prompt; else the fewest live requests (SMG's documentation,
    Cache-Aware Routing; the options are `--balance-abs-threshold`, `--balance-rel-threshold`, `--cache-threshold`).
    """

    def __init__(self, absolute: int = 64, threshold: float = 0.3) -> None:
        super().__init__()
        self.absolute, self.threshold = absolute, threshold
        self.live: Counter[int] = Counter()

    def joined(self, replica: int) -> None:
        super().joined(replica)
        self.live[replica] = 0

    def choose(self, request: Request) -> int:
        loads = [self.live[replica] for replica in self.alive]
        low, high = min(loads), max(loads)
        idlest = min(self.alive, key=lambda replica: self.live[replica])
        if high - low > self.absolute and high > 1.5 * low:
            return idlest
        match, _, best = max((self.router.match(one, request.hashes), -self.live[one], one) for one in self.alive)
        return best if match > self.threshold * len(request.hashes) else idlest

    def sent(self, request: Request) -> None:
        super().sent(request)
        self.live[request.replica] += 1

    def ended(self, request: Request) -> None:
        super().ended(request)
        self.live[request.replica] -= 1
