"""Hit rates with a host tier, simulated: no model, a simulated clock, everything from fixed seeds.

    python -m bench.tiers [--agents TRACE] [--conversations TRACE] [--check] [--save]

One replica as in `bench.cluster` serves the sessions of the same traces, 64 and 256 alive at a time. Its pool holds a
million tokens. Printed for each workload: the share of prompt tokens that need not be computed, with that pool alone,
with host tiers of 10 and 100 million tokens behind it, and with a single pool of each of these sizes, which is the
limit. Bound, with --check: at most 0.3 points below the limit.

Bias. Copies take no time. All else as in `bench.cluster`.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.cluster import calibrated
from bench.replicas import Setting, Simulation
from bench.report import Report, benchmark_options
from bench.sessions import agents_and_conversations

GAP_POINTS = 0.3
POOL = 1_000_000
"""Tokens of the device"""


def report_setting(report: Report, setting: Setting, tiers: Sequence[int]) -> None:
    """Hit rates of one workload, in percent."""
    name = f"{setting.workload.name}, {setting.sessions} alive"
    setting = calibrated(replace(setting, pool=max(tiers)))
    alone = 100 * Simulation(replace(setting, pool=POOL), None).run().hit_rate
    report.say(f"{name}: {alone:.2f} % with {POOL:,} tokens alone")
    report.keep(**{name: {"alone": alone}})
    for tier in tiers:
        limit = 100 * Simulation(replace(setting, pool=tier), None).run().hit_rate
        hosted = 100 * Simulation(replace(setting, pool=POOL, host=tier), None).run().hit_rate
        points = hosted - limit
        text = f"{name}, {tier:,} tokens: {limit:.2f} % in one pool, {hosted:.2f} % in a host tier: {points:+.2f}"
        report.figure(f"{name}, {tier}", points, text, at_least=-GAP_POINTS)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_options(__doc__)
    parser.add_argument("--agents", type=Path, help="coding-agent sessions of callanjfox/kv-cache-tester")
    parser.add_argument("--conversations", type=Path, help="a trace in Mooncake's format")
    parser.add_argument("--alive", type=int, nargs="+", default=[64, 256], help="sessions at a time")
    parser.add_argument("--tiers", type=float, nargs="+", default=[1e7, 1e8], help="tokens of the host")
    parser.add_argument("--requests", type=int, default=12_000, help="of a run")
    options = parser.parse_args(arguments)
    workloads = agents_and_conversations(options.agents, options.conversations)
    report = Report("tiers")
    for workload in workloads:
        for alive in options.alive:
            setting = Setting(workload, replicas=1, sessions=alive, requests=options.requests)
            report_setting(report, setting, [int(tier) for tier in options.tiers])
    return report.finish(check=options.check, save=options.save)


if __name__ == "__main__":
    sys.exit(main())
