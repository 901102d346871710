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

Bias. The first 16,384 tokens of coding agents are taken to be common; the trace does not say. Pauses are at most an
hour. Service times are stated, not measured, and ignore the context's length and the batch's size. Trees count in
units of the trace's blocks, routing in blocks of 512 tokens; what is generated is not cached until it comes back in a
prompt. Events reach the router at once.
"""

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.policies import SMG, Affinity, Dynamo, Policy, RoundRobin, Rule
from bench.replicas import POOL, ROW, Outcome, Setting, Simulation
from bench.report import Report, benchmark_options, time_each, track
from bench.sessions import agents_and_conversations
from radixgen.cache import hash_blocks
from radixgen.serve.routing import Router

BUSY = 0.5
FAULTS = 16
WEIGHTS = (1, 2, 4, 16, 64)
MARGINS = (0, 65_536)
SCALES = (1, 4, 16, 64)
ABSOLUTES = (64, 16, 4)
GAP_POINTS = 2.0
WAIT_RATIO = 1.1
DECISION_US = 200.0

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
    workloads = agents_and_conversations(options.agents, options.conversations)
    report = Report("cluster")
    report_settings(
        report,
        [
            Setting(workload, replicas, sessions, max(options.requests, 3 * sessions), pool=options.pool)
            for workload in workloads
            for sessions in options.sessions
            for replicas in options.replicas
        ],
    )
    for replicas in options.replicas:
        report_decisions(report, replicas, options.blocks, times=2_000)
    return report.finish(check=options.check, save=options.save)


if __name__ == "__main__":
    sys.exit(main())
