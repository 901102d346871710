"""Where requests go among replicas, simulated: no model, a simulated clock, everything from fixed seeds.

    python -m bench.cluster [--agents TRACE] [--conversations TRACE] [--check] [--save]

TRACEs are files as `bench.sessions` reads them: coding-agent sessions of callanjfox/kv-cache-tester, conversations of
Mooncake. Without one, sessions of the same kind are made up. So many sessions are alive at a time: when one has ended,
another begins, with tokens of its own but for what all sessions begin with. A session's next request comes when the
trace's pause is over and its last one has ended. Pauses are stretched by one factor a setting, so that one pool of the
sum is about half busy.

A replica is radixgen's own `RadixTree` over a pool of 16 million tokens, 1 million blocks of 16, evicted least recently
used first. It computes prompts one after another in order of arrival, each when its blocks fit: 20 µs for each prompt
token that is not cached and for each token generated. Then the request decodes beside all others, 20 ms a token, and
holds its blocks. *Wait* is the time from arrival to the first token.

The limit is one pool of the sum: one tree and one queue for as many servers as there are replicas. Contenders, each by
hit rate (share of prompt tokens), load (the busiest replica's work over the mean) and wait: the rule of
`radixgen.serve.routing`, fed by the trees' block events; random; round robin; session affinity (a session's first
request by round robin, all others to the same replica while it lives). For the first workload and number of sessions
also: other weights and margins, and the rules of Dynamo and SMG as their documentation states them, at several
settings; and all contenders while replicas die: sixteen times in a run one of them loses its cache and its requests,
which are sent again, and is back after half the time to the next death.

Last, what a decision costs on the host with a million cached blocks a replica.

Bounds, with --check, in the worst setting: the rule's hit rate 2 points below that of one pool, its p99 wait 1.1 times
that of the best other contender; 200 µs a decision, in the middle of the worst kind of prompt.

Bias. Service times are stated, not measured, and ignore the context's length and the batch's size. Trees count in
units of the trace's blocks, routing in blocks of 512 tokens; what is generated is not cached until it comes back in a
prompt. Events reach the router at once.
"""

import heapq
import random
import sys
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.report import Report, benchmark_options, time_each, track
from bench.sessions import Session, Turn, Units, Workload, make_sessions, own_ids, read_agents, read_conversations
from radixgen.cache import BlockEvent, BlockProjection, ExtentPool, Lock, RadixTree, Removed, Stored, hash_blocks
from radixgen.serve.routing import Router

POOL = 1 << 24
ROUTING_BLOCK = 512
ROW = 20e-6
STEP = 20e-3
BUSY = 0.5
FAULTS = 16
WEIGHTS = (1, 2, 4, 16, 64)
MARGINS = (0, 65_536)
SCALES = (1, 4, 16, 64)
ABSOLUTES = (64, 16, 4)
GAP_POINTS = 2.0
WAIT_RATIO = 1.1
DECISION_US = 200.0


@dataclass(slots=True, eq=False)
class Player:
    """One of the sessions that are alive, at its request `turn`. `copy` tells apart its tokens from all others'."""

    slot: int
    session: Session
    turn: int
    copy: int


@dataclass(slots=True, eq=False)
class Request:
    """One that was sent. `number` counts them in order of arrival."""

    number: int
    player: Player
    turn: Turn
    prompt: Units
    hashes: list[int]
    arrived: float
    replica: int = -1
    attempts: int = 0
    cached_tokens: int = 0
    first_token: float | None = None
    lock: Lock | None = None


# -- policies ---------------------------------------------------------------------------------------------


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
        if isinstance(event, Stored):
            self.router.stored(replica, event.hashes)
        elif isinstance(event, Removed):
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


CONTENDERS: dict[str, Callable[[], Policy]] = {
    "radixgen's rule": Rule,
    "session affinity": Affinity,
    "round robin": RoundRobin,
    "random": Policy,
}


def _variants() -> dict[str, Callable[[], Policy]]:
    """The rule at other weights and margins, Dynamo's and SMG's at several settings."""
    return {
        **{f"prefix weight {weight}": partial(Rule, prefix_weight=weight) for weight in WEIGHTS},
        **{f"margin {margin:,}": partial(Rule, margin=margin) for margin in MARGINS},
        **{f"Dynamo, scale {scale}": partial(Dynamo, scale) for scale in SCALES},
        **{f"SMG, balance-abs {most}": partial(SMG, most) for most in ABSOLUTES},
    }


# -- the simulation -----------------------------------------------------------------------------------------


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


@dataclass(slots=True)
class Replica:
    """A tree, a queue and `servers` that compute prompts from it."""

    tree: RadixTree
    servers: int
    queue: deque[Request] = field(default_factory=deque)
    computing: int = 0
    live: set[Request] = field(default_factory=set)

    def admit(self) -> tuple[Request, int] | None:
        """Begin the oldest request, if a server is free and its blocks fit. Returns it and how many units it lacks."""
        if not self.queue or self.computing == self.servers:
            return None
        request, tree = self.queue[0], self.tree
        match = tree.match_prefix(request.prompt)
        length, evictable = (match.length, match.evictable) if match else (0, 0)
        lacks = request.prompt.size - length
        if tree.pool.free + tree.evictable_tokens - evictable < lacks:
            assert self.live.difference(self.queue), "a prompt that the pool cannot hold"
            return None
        self.queue.popleft()
        self.computing += 1
        request.lock = tree.insert(request.prompt)
        if lacks:
            leaf = request.lock.held
            tree.evict(max(tree.slots_wanted(leaf, lacks) - tree.pool.free, 0))
            tree.schedule(leaf, lacks)
            if self.servers > 1:
                tree.commit(leaf)
        return request, lacks

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
        tree = RadixTree(ExtentPool(servers * setting.pool // setting.workload.unit))
        if isinstance(self.policy, Rule):
            emit = partial(self.policy.event, number)
            BlockProjection(tree, emit, ROUTING_BLOCK // setting.workload.unit)
        self._replicas[number] = Replica(tree, servers)

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


# -- what is printed ----------------------------------------------------------------------------------------


def calibrated(setting: Setting) -> Setting:
    """With pauses stretched so that one pool of the sum is `BUSY`, as far as its work without any waiting tells."""
    outcome = Simulation(replace(setting, row=0.0), None).run()
    turns = [turn for session in setting.workload.sessions for turn in session]
    pause = float(np.mean([turn.pause for turn in turns]))
    wanted = setting.sessions * ROW * outcome.work_tokens / (setting.replicas * BUSY)
    return replace(setting, stretch=wanted / pause)


def compare(report: Report, setting: Setting, limit: Outcome, contenders: dict[str, Callable[[], Policy]]) -> Any:
    """Run and print each contender beside the limit. Returns their figures."""
    rows = []
    for name, policy in contenders.items():
        outcome = Simulation(setting, policy()).run()
        report.say(f"{name:<26} {_line(outcome)}  {outcome.wait_p99 / limit.wait_p99:8.2f} × limit")
        rows.append({"contender": name, **_figures(outcome), "p99_over_limit": outcome.wait_p99 / limit.wait_p99})
    return rows


def _line(outcome: Outcome) -> str:
    return f"{outcome.hit_rate:8.1%} {outcome.load:7.2f} {outcome.wait_p50:9.2f} s {outcome.wait_p99:9.2f} s"


def _figures(outcome: Outcome) -> dict[str, float]:
    return {
        "hit_rate": outcome.hit_rate,
        "load": outcome.load,
        "busy": outcome.busy,
        "wait_p50_seconds": outcome.wait_p50,
        "wait_p99_seconds": outcome.wait_p99,
        "sent_again": outcome.sent_again,
    }


def report_settings(report: Report, settings: Sequence[Setting]) -> None:
    """Limit and contenders of each setting; of the first workload's fewest sessions also faults and other rules."""
    kept = []
    for setting in track(settings, "settings"):
        setting = calibrated(setting)
        limit = Simulation(setting, None).run()
        title = f"{setting.workload.name}, {setting.replicas} replicas, {setting.sessions:,} sessions"
        report.say(
            f"\n{title}; {setting.requests:,} requests, pauses × {setting.stretch:.3g}, limit {limit.busy:.0%} busy\n"
            f"{'':<26} {'hit rate':>8} {'load':>7} {'wait p50':>11} {'p99':>11}\n"
            f"{'limit: one pool of the sum':<26} {_line(limit)}"
        )
        figures = {
            "workload": setting.workload.name,
            "replicas": setting.replicas,
            "sessions": setting.sessions,
            "requests": setting.requests,
            "stretch": setting.stretch,
            "limit": _figures(limit),
            "contenders": compare(report, setting, limit, CONTENDERS),
        }
        if setting.workload is settings[0].workload and setting.sessions == settings[0].sessions:
            report.say("other weights and margins, other rules")
            figures["variants"] = compare(report, setting, limit, _variants())
            report.say(f"with {FAULTS} faults")
            figures["faults"] = compare(report, replace(setting, faults=FAULTS), limit, CONTENDERS)
        kept.append(figures)
    report.keep(settings=kept)
    _bounds(report, kept)


def _bounds(report: Report, kept: Sequence[dict[str, Any]]) -> None:
    """The rule against the limit and against the best of the others, in the worst setting."""
    points = 100 * max(one["limit"]["hit_rate"] - one["contenders"][0]["hit_rate"] for one in kept)
    text = f"hit rate of the rule below that of one pool: {points:.1f} points"
    report.figure("hit_rate_gap_points", points, text, at_most=GAP_POINTS)
    ratio = max(
        one["contenders"][0]["wait_p99_seconds"] / min(other["wait_p99_seconds"] for other in one["contenders"][1:])
        for one in kept
    )
    text = f"p99 wait of the rule over the best other's: {ratio:.2f}×"
    report.figure("wait_p99_over_best_other", ratio, text, at_most=WAIT_RATIO)


# -- what a decision costs ------------------------------------------------------------------------------------

PROMPT_BLOCKS = 4_096
COMMON_BLOCKS = 256


def filled_router(replicas: int, blocks: int) -> tuple[Router, dict[str, list[list[int]]]]:
    """A router with `blocks` cached blocks a replica, and prompts of each kind: held by one replica but for their last
    64 blocks; new behind what all hold; held by each replica to another length.
    """
    rng = np.random.default_rng(3)

    def fresh(number: int) -> list[int]:
        hashes: list[int] = rng.integers(0, 1 << 63, number).tolist()
        return hashes

    router = Router(range(replicas))
    common = fresh(COMMON_BLOCKS)
    spread = [fresh(PROMPT_BLOCKS) for _ in range(max(1, min(32, blocks // (2 * PROMPT_BLOCKS))))]
    prompts: dict[str, list[list[int]]] = {"held by one": [], "new": [], "held in parts": spread}
    for replica in range(replicas):
        router.stored(replica, common)
        left = blocks - COMMON_BLOCKS
        for chain in spread:
            part = min(int(rng.integers(PROMPT_BLOCKS)), left)
            router.stored(replica, chain[:part])
            left -= part
        chains = fresh(left)
        router.stored(replica, chains)
        for start in range(0, min(left - PROMPT_BLOCKS, 32 * PROMPT_BLOCKS), PROMPT_BLOCKS):
            own = chains[start : start + PROMPT_BLOCKS - COMMON_BLOCKS - 64]
            prompts["held by one"].append([*common, *own, *fresh(64)])
    prompts["new"] = [[*common, *fresh(PROMPT_BLOCKS - COMMON_BLOCKS)] for _ in range(256)]
    for request in range(16 * replicas):
        router.sent(request, request % replicas, fresh(64))
    return router, prompts


def report_decisions(report: Report, replicas: int, blocks: int, times: int) -> None:
    """Microseconds of `choose`, and of `sent` and `ended` together, for prompts of `PROMPT_BLOCKS` blocks."""
    router, prompts = filled_router(replicas, blocks)
    rng = random.Random(4)
    worst = 0.0
    for kind, some in prompts.items():
        picks = iter([rng.choice(some) for _ in range(times + 1)])
        micros = 1e6 * np.array(time_each(lambda picks=picks: router.choose(next(picks)), times=times))
        middle, late = np.percentile(micros, [50, 99])
        report.say(f"a decision among {replicas}, prompt {kind}: {middle:.0f} µs in the middle, p99 {late:.0f} µs")
        report.keep(**{f"choose_{replicas}_{kind.replace(' ', '_')}_us": [float(middle), float(late)]})
        worst = max(worst, float(middle))
    text = f"a decision among {replicas} replicas with {blocks:,} blocks each: {worst:.0f} µs"
    report.figure(f"choose_{replicas}_us", worst, text, at_most=DECISION_US)
    prompt = prompts["new"][0]

    def record() -> None:
        router.sent("timed", 0, prompt)
        router.ended("timed")

    recorded = 1e6 * float(np.median(time_each(record, times=20)))
    tokens = np.arange(16 * PROMPT_BLOCKS, dtype=np.int32)
    hashed = 1e6 * float(np.median(time_each(lambda: hash_blocks(tokens, 16), times=20)))
    report.keep(**{f"record_{replicas}_us": recorded, f"hash_{replicas}_us": hashed})
    report.say(f"beside it, for {PROMPT_BLOCKS:,} new blocks: sent and ended {recorded:.0f} µs, hashes {hashed:.0f} µs")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_options(__doc__)
    parser.add_argument("--agents", type=Path, help="coding-agent sessions of callanjfox/kv-cache-tester")
    parser.add_argument("--conversations", type=Path, help="a trace in Mooncake's format")
    parser.add_argument("--replicas", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--sessions", type=int, nargs="+", default=[1_000, 10_000], help="alive at a time")
    parser.add_argument("--requests", type=int, default=6_000, help="of a run; at least 3 a session")
    parser.add_argument("--pool", type=int, default=POOL, help="tokens that a replica caches")
    parser.add_argument(
        "--blocks", type=int, default=1_000_000, help="cached blocks a replica when decisions are timed"
    )
    options = parser.parse_args(arguments)
    agents = (
        read_agents(options.agents)
        if options.agents
        else make_sessions("coding agents", unit=64, turns=40, first=24_000, later=2_000)
    )
    conversations = (
        read_conversations(options.conversations)
        if options.conversations
        else make_sessions("conversations", unit=512, turns=1.6, first=8_000, later=4_000)
    )
    report = Report("cluster")
    report_settings(
        report,
        [
            Setting(workload, replicas, sessions, max(options.requests, 3 * sessions), pool=options.pool)
            for workload in (agents, conversations)
            for sessions in options.sessions
            for replicas in options.replicas
        ],
    )
    for replicas in options.replicas:
        report_decisions(report, replicas, options.blocks, times=2_000)
    return report.finish(check=options.check, save=options.save)


if __name__ == "__main__":
    sys.exit(main())
