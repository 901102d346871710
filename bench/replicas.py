"""Replicas on a simulated clock: each a tree and a queue, under sessions that `bench.cluster` describes."""

import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import numpy as np
from numpy.typing import NDArray

from bench.policies import ROUTING_BLOCK, Policy, Rule
from bench.sessions import Player, Request, Session, Units, Workload, own_ids
from radixgen.cache import BlockProjection, ExtentPool, HostTier, RadixTree, hash_blocks

POOL = 1 << 24
"""Tokens that a replica caches"""
ROW = 20e-6
"""Seconds to compute a token"""
STEP = 20e-3
"""Seconds between a request's tokens"""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is simulated, but for the policy. The first half of the `requests` warms up and is not measured."""

    workload: Workload
    replicas: int
    sessions: int
    requests: int
    stretch: float = 1.0
    row: float = ROW
    faults: int = 0
    pool: int = POOL
    host: int = 0
    """Tokens of a replica's host tier"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of the measured requests of one run."""

    hit_rate: float
    """Share of the prompt tokens"""
    load: float
    """Work of the busiest replica over the mean"""
    busy: float
    """Share of the replicas' time"""
    work_tokens: float
    """Computed for a request, on average"""
    waits: NDArray[np.float64]
    sent_again: int

    @property
    def wait_p50(self) -> float:
        return float(np.percentile(self.waits, 50))

    @property
    def wait_p99(self) -> float:
        return float(np.percentile(self.waits, 99))


class NoCopies:
    """Copies of a host tier of this many slots, which take no time."""

    seconds = 0.0

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots

    def save(self, slots: NDArray[np.int64], host_slots: NDArray[np.int64]) -> "NoCopies":
        return self

    def load(self, host_slots: NDArray[np.int64], slots: NDArray[np.int64]) -> "NoCopies":
        return self

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        """Nothing is in flight."""

    def release(self) -> None:
        """Nothing is held."""


@dataclass(slots=True)
class Replica:
    """A tree, a queue and `servers` that compute prompts from it."""

    tree: RadixTree
    servers: int
    host: HostTier | None = None
    queue: deque[Request] = field(default_factory=deque)
    computing: int = 0
    live: set[Request] = field(default_factory=set)

    def admit(self) -> tuple[Request, int] | None:
        """Begin the oldest request, if a server is free and its blocks fit. Returns it and how many units it lacks."""
        if not self.queue or self.computing == self.servers:
            return None
        request, tree = self.queue[0], self.tree
        if self.host is not None:
            self.host.poll(0.0, 0)  # what was saved may be evicted
        match = tree.match_prefix(request.prompt)
        length, evictable = (match.length, match.evictable) if match else (0, 0)
        lacks = request.prompt.size - length
        if tree.pool.free + tree.evictable_tokens - evictable < lacks:
            assert self.live.difference(self.queue), "a prompt that the pool cannot hold"
            return None
        self.queue.popleft()
        self.computing += 1
        lacks -= self._fetch(request.prompt, match.computed if match else 0)
        request.lock = tree.insert(request.prompt)
        if lacks:
            leaf = request.lock.held
            tree.evict(max(tree.slots_wanted(leaf, lacks) - tree.pool.free, 0))
            tree.schedule(leaf, lacks)
            if self.servers > 1:
                tree.commit(leaf)
        return request, lacks

    def _fetch(self, prompt: Units, computed: int) -> int:
        """Fetch what the host has of a prompt. Returns the number of units."""
        host = self.host
        if host is None:
            return 0
        fetch = host.fetches.begin(prompt, "", computed, computed)
        if fetch is None:
            return 0
        host.poll(0.0, 0)
        host.fetches.leave(fetch)
        return fetch.num_tokens

    def finish(self, request: Request) -> None:
        """Its prompt is computed."""
        self.computing -= 1
        assert request.lock is not None
        if request.lock.held.computed < request.lock.held.scheduled:
            self.tree.commit(request.lock.held)


class Simulation:
    """One policy in one setting; no policy is one pool of the sum."""

    def __init__(self, setting: Setting, policy: Policy | None) -> None:
        self.setting = setting
        self.policy = policy or Policy()
        self.pooled = policy is None
        self.now = 0.0
        self.begun = 0.0
        self.work_tokens = np.zeros(setting.replicas)
        self.requests: list[Request] = []
        self.sent_again = 0
        self._measured_from = setting.requests // 2
        self._awaited = setting.requests - self._measured_from
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serials = count()
        self._copies = 0
        self._random = random.Random(1)
        self._dead = -1
        self._replicas: dict[int, Replica] = {}
        for replica in range(1 if self.pooled else setting.replicas):
            self._join(replica)

    def run(self) -> Outcome:
        self._begin_sessions()
        while self._awaited:
            self.now, _, act = heapq.heappop(self._events)
            act()
        measured = self.requests[self._measured_from : self.setting.requests]
        total = sum(request.turn.prompt_tokens for request in measured)
        cached = sum(request.cached_tokens for request in measured)
        mean = self.work_tokens.sum() / self.setting.replicas
        return Outcome(
            hit_rate=cached / total,
            load=1.0 if self.pooled else float(self.work_tokens.max() / max(mean, 1e-12)),
            busy=float(self.setting.row * mean / (self.now - self.begun)),
            work_tokens=float(self.work_tokens.sum() / len(measured)),
            waits=np.array([request.first_token - request.arrived for request in measured]),  # type: ignore[operator]
            sent_again=self.sent_again,
        )

    def _at(self, time: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._serials), act))

    def _begin_sessions(self) -> None:
        """Each at a place in a session as a random time would show it: in a pause with a chance that is its length.

        What follows in each slot is drawn here too, so that it is the same whatever the policy.
        """
        rng = np.random.default_rng(2)
        sessions, alive = self.setting.workload.sessions, self.setting.sessions
        places = [(session, place) for session in sessions for place in range(len(session))]
        pauses = np.array([session[place].pause for session, place in places])
        self._following = rng.integers(len(sessions), size=(alive, 64)).tolist()
        for slot, pick in enumerate(rng.choice(len(places), alive, p=pauses / pauses.sum()).tolist()):
            session, place = places[pick]
            self._play(slot, session, place, float(pauses[pick]) * self.setting.stretch * rng.random())

    def _play(self, slot: int, session: Session, turn: int, time: float) -> None:
        """A session's requests from `turn` on."""
        player = Player(slot, session, turn, self._copies)
        self._copies += own_ids(session)
        self._at(time, lambda: self._arrive(player))

    def _arrive(self, player: Player) -> None:
        turn = player.session[player.turn]
        prompt = turn.prompt(player.copy)
        units = ROUTING_BLOCK // self.setting.workload.unit
        hashes = hash_blocks(prompt, units) if self.policy.reads_events else []
        request = Request(len(self.requests), player, turn, prompt, hashes, self.now)
        self.requests.append(request)
        if request.number == self._measured_from:
            self.begun = self.now
        self._fault(request.number)
        self._send(request)

    # -- requests

    def _send(self, request: Request) -> None:
        request.attempts += 1
        request.replica = self.policy.choose(request)
        self.policy.sent(request)
        replica = self._replicas[request.replica]
        replica.live.add(request)
        replica.queue.append(request)
        self._compute(replica)

    def _compute(self, replica: Replica) -> None:
        """Begin what can be begun."""
        while (begun := replica.admit()) is not None:
            request, lacking = begun
            unit = self.setting.workload.unit
            missing = max(request.turn.prompt_tokens - (request.prompt.size - lacking) * unit, 1)
            tokens = missing + request.turn.output_tokens
            seconds = self.setting.row * tokens
            if request.number >= self._measured_from:
                self.work_tokens[request.replica] += tokens
            if request.first_token is None:
                request.cached_tokens = request.turn.prompt_tokens - missing
            self._at(self.now + seconds, partial(self._computed, replica, request, request.attempts))

    def _computed(self, replica: Replica, request: Request, attempts: int) -> None:
        if request.attempts != attempts:
            return  # its replica has died
        replica.finish(request)
        if request.first_token is None:
            request.first_token = self.now
            self._awaited -= self._measured_from <= request.number < self.setting.requests
        self._at(self.now + STEP * request.turn.output_tokens, partial(self._ended, replica, request, attempts))
        self._compute(replica)

    def _ended(self, replica: Replica, request: Request, attempts: int) -> None:
        if request.attempts != attempts:
            return
        assert request.lock is not None
        replica.tree.unlock(request.lock)
        replica.live.remove(request)
        self.policy.ended(request)
        request.prompt, request.hashes, request.lock = request.prompt[:0], [], None
        self._go_on(request)
        self._compute(replica)

    def _go_on(self, request: Request) -> None:
        """The session's next request, or the next session."""
        player = request.player
        player.turn += 1
        if player.turn < len(player.session):
            pause = player.session[player.turn].pause * self.setting.stretch
            self._at(max(request.arrived + pause, self.now), lambda: self._arrive(player))
        else:
            following = self._following[player.slot]
            following.append(following.pop(0))
            self._play(player.slot, self.setting.workload.sessions[following[-1]], 0, self.now)

    # -- replicas

    def _join(self, number: int) -> None:
        setting = self.setting
        servers = setting.replicas if self.pooled else 1
        self.policy.joined(number)
        unit = setting.workload.unit
        tree = RadixTree(ExtentPool(servers * setting.pool // unit))
        host = HostTier(tree, NoCopies(setting.host // unit), min_fetch=1) if setting.host else None
        if isinstance(self.policy, Rule):
            emit = partial(self.policy.event, number)
            BlockProjection(tree, emit, ROUTING_BLOCK // unit)
        self._replicas[number] = Replica(tree, servers, host)

    def _fault(self, number: int) -> None:
        """A replica dies with every so many requests, and is back after half as many."""
        if self.pooled or not self.setting.faults:
            return
        period = self.setting.requests // self.setting.faults
        if number % period == period // 2:
            self._join(self._dead)
        elif number % period == 0:
            self._dead = self._random.choice(sorted(self._replicas))
            gone = self._replicas.pop(self._dead)
            self.policy.died(self._dead)
            for request in sorted(gone.live, key=lambda one: one.number):
                self.policy.ended(request)
                self.sent_again += 1
                self._send(request)
