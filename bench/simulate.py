"""Requests through the whole engine, with a model that costs nothing and a clock that is simulated.

    python -m bench.simulate [TRACE] [--check] [--save] [--pools 1e6 3e6 1e7]

TRACE is a file in Mooncake's format, as for `bench.tree`, with `timestamp` (ms) and `output_length` besides;
without it a small trace of the same form is made up. A step lasts what the cost model says: 20 ms for the weights of a
large mixture of experts, 20 µs a row, 1 ns a key read; only the host's own time is real.

First come four mixes (`bench.mixes`: agents, groups of samples, questions on documents, the trace's first requests),
each with a pool of a quarter of its working set: the most distinct tokens of what is open at the same time. They are
admitted in three orders (`bench.orders`). Printed: requests a second, how long they waited until they were admitted,
and how many prompt tokens had to be computed. Two limits stand beside them: *unlimited*, a pool in which everything
stays; and *prompts free*, first come in the same pool if no row cost anything, which is what reuse can save if no more
sequences run at the same time.

Then each request of the trace is submitted at its own time, with several pools. Printed: the token hit rate, as a share
of the ideal (every earlier prompt kept for ever, and computed at once), and latency from the time of arrival.

Bounds, with --check: groups answer at least 1.5 times as many requests a second as first come, of every mix, though the
trace has little in common; their p99 wait is at most twice that of first come. The host is 20 times as fast as real
time, in every run of the trace.

Bias. The trace says nothing of what was generated: ours is random and never hit again, where a real conversation goes
on from it. Agents answer at once; with a pause, what they need next may be evicted before it is known to be needed. The
cost model is stated, not measured.
"""

import heapq
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from bench.mixes import MADE, Mix, Stream, Turn, mix_of_trace
from bench.null import NullModel
from bench.orders import ORDERS, Order
from bench.report import Report, benchmark_options
from bench.tree import VOCABULARY_BITS, make_trace, read_trace
from radixgen import Limits, SamplingParams
from radixgen.cache import ExtentPool, RadixTree, TokenArray
from radixgen.core import Plan

SPEED, SPEEDUP, WAIT = 20.0, 1.5, 2.0
SHARE = 4
"""A mix has a pool of its working set divided by this."""
TRACE_REQUESTS = 256
"""Requests of the trace that are a mix."""


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds that a step takes on the simulated clock."""

    step: float = 20e-3
    row: float = 20e-6
    key: float = 1e-9

    def seconds(self, plan: Plan) -> float:
        return self.step + self.row * plan.num_rows + self.key * plan.kv_tokens_read


class SimulatedModel(NullModel):
    """A model whose every step moves a clock on."""

    def __init__(self, cost: CostModel, max_model_len: int) -> None:
        super().__init__(vocab_size=64, max_model_len=max_model_len)
        self.vocab_size = 1 << VOCABULARY_BITS
        self.cost = cost
        self.now = 0.0

    def run(
        self, plan: Plan, token_ids: NDArray[np.int64], slots: NDArray[np.int64], logit_rows: NDArray[np.int64]
    ) -> Tensor:
        self.now += self.cost.seconds(plan)
        return super().run(plan, token_ids, slots, logit_rows)


@dataclass(frozen=True, slots=True)
class Served:
    """What one run showed; seconds are simulated but for `host_seconds`."""

    hit_rate: float
    computed: float
    """Share of the prompt tokens that went through the model."""
    preemptions: int
    steps: int
    waits: NDArray[np.float64]
    """Of each request, until it was admitted"""
    latency: NDArray[np.float64]
    seconds: float
    host_seconds: float

    @property
    def requests_per_second(self) -> float:
        return self.waits.size / self.seconds

    @property
    def times_real_time(self) -> float:
        return self.seconds / self.host_seconds


def read_arrivals(path: Path) -> list[Stream]:
    """Return the requests of a trace, a stream each."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        Stream([Turn(prompt, max(record["output_length"], 1))], record["timestamp"] / 1e3)
        for record, prompt in zip(records, read_trace(path), strict=True)
    ]


def make_arrivals(requests: int = 600, rate: float = 3.4) -> list[Stream]:
    """The made-up trace of `bench.tree`, at `rate` requests a second, with 300 tokens of output on average."""
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.exponential(1 / rate, requests)).tolist()
    lengths = rng.geometric(1 / 300, requests).tolist()
    return [
        Stream([Turn(prompt, length)], start)
        for prompt, length, start in zip(make_trace(requests), lengths, times, strict=True)
    ]


def ideal_hit_rate(arrivals: Sequence[Stream]) -> float:
    """Every prompt of before is kept, and was computed at once."""
    prompts = [arrival.turns[0].tokens for arrival in arrivals]
    total = sum(prompt.size for prompt in prompts)
    tree = RadixTree(ExtentPool(total))
    hits = 0
    for prompt in prompts:
        match = tree.match_prefix(prompt)
        hits += match.length if match else 0
        tree.insert(prompt)
    return hits / total


class Caller:
    """Sends the requests of a mix when they are due: each turn after the last one's answer."""

    def __init__(self, mix: Mix) -> None:
        self._streams = mix.streams
        self._begun = 0
        self._due: list[tuple[float, int, int, TokenArray]] = []
        """Time, stream, turn, and the tokens before it"""
        for _ in range(min(mix.open_streams, len(mix.streams))):
            self._begin(0.0)

    def next_time(self) -> float | None:
        """When the next request is due; None if nothing is."""
        return self._due[0][0] if self._due else None

    def pop(self) -> tuple[int, int, TokenArray, int]:
        """Return the stream, the turn, the prompt and the output length of the request that is due next."""
        _, number, place, before = heapq.heappop(self._due)
        turn = self._streams[number].turns[place]
        return number, place, np.concatenate([before, turn.tokens]), turn.output_length

    def answer(self, number: int, place: int, path: TokenArray, now: float) -> None:
        """A turn was answered: the next one is due after its pause, or the next stream begins."""
        turns = self._streams[number].turns
        if place + 1 < len(turns):
            heapq.heappush(self._due, (now + turns[place + 1].pause, number, place + 1, path))
        else:
            self._begin(now)

    def _begin(self, now: float) -> None:
        if self._begun < len(self._streams):
            start = max(now, self._streams[self._begun].start)
            heapq.heappush(self._due, (start, self._begun, 0, np.empty(0, np.int32)))
            self._begun += 1


def serve(mix: Mix, slots: int, order: Order, cost: CostModel, label: str) -> Served:
    """Submit each request when it is due, and step until all have ended."""
    model = SimulatedModel(cost, mix.num_tokens + 1)
    limits = Limits(max_waiting=mix.num_requests, max_waiting_tokens=1 << 40)
    slots = max(slots, mix.num_tokens + 1)
    engine = order.engine(model, kv_tokens=slots, max_step_tokens=8_192, limits=limits, clock=lambda: model.now)
    caller = Caller(mix)
    sent: dict[str, tuple[int, int, TokenArray, float]] = {}
    latency, waits = list[float](), list[float]()
    begin = time.perf_counter()
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(label, total=mix.num_requests)
        while (due := caller.next_time()) is not None or sent:
            if due is not None and not sent:
                model.now = max(model.now, due)
            while due is not None and due <= model.now:
                number, place, prompt, length = caller.pop()
                seed = (number << 16) + place
                params = SamplingParams(temperature=1.0, seed=seed, max_tokens=length, ignore_eos=True)
                sent[engine.submit(prompt, params, output_kind="final")] = number, place, prompt, due
                due = caller.next_time()
            for output in engine.step():
                number, place, prompt, due = sent.pop(output.request_id)
                latency.append(model.now - due)
                waits.append(output.queue_seconds)
                tokens = np.array(output.outputs[0].token_ids, np.int32)
                caller.answer(number, place, np.concatenate([prompt, tokens]), model.now)
                bar.update(task, completed=len(latency))
    seconds = time.perf_counter() - begin
    stats = engine.stats()
    assert len(latency) == mix.num_requests
    return Served(
        hit_rate=stats.cached_prompt_tokens / stats.prompt_tokens,
        computed=stats.computed_prompt_tokens / stats.prompt_tokens,
        preemptions=stats.preemptions,
        steps=stats.steps,
        waits=np.array(waits),
        latency=np.array(latency),
        seconds=model.now,
        host_seconds=seconds,
    )


def report_mix(report: Report, mix: Mix, cost: CostModel) -> dict[str, Any]:
    """Serve a mix in every order, and without what limits them. Returns the figures."""
    working_set = mix.working_set()
    slots = working_set // SHARE
    first_come, groups = ORDERS["first come"], ORDERS["groups"]
    runs = {name: serve(mix, slots, order, cost, f"{mix.name}, {name}") for name, order in ORDERS.items()}
    limits = {
        "unlimited": serve(mix, sum(stream.num_tokens for stream in mix.streams), groups, cost, "unlimited"),
        "prompts free": serve(mix, slots, first_come, replace(cost, row=0.0), "prompts free"),
    }
    base = runs["first come"]
    report.say(f"{mix.name}: {mix.num_requests:,} requests, a working set of {working_set:,} tokens, a quarter fits")
    rows = []
    for name, run in (runs | limits).items():
        median, late = np.percentile(run.waits, [50, 99])
        ratio = run.requests_per_second / base.requests_per_second
        report.say(
            f"  {name:<15} {run.requests_per_second:7.3f} requests/s {ratio:6.2f}×  wait p50, p99 {median:6.1f}, "
            f"{late:6.1f} s  computed {run.computed:6.1%}  preempted {run.preemptions:4}  steps {run.steps:6}"
        )
        rows.append(
            {
                "order": name,
                "requests_per_second": run.requests_per_second,
                "over_first_come": ratio,
                "wait_p50_seconds": float(median),
                "wait_p99_seconds": float(late),
                "computed": run.computed,
                "preemptions": run.preemptions,
            }
        )
    return {"mix": mix.name, "requests": mix.num_requests, "working_set": working_set, "slots": slots, "runs": rows}


def report_mixes(report: Report, mixes: Sequence[Mix], cost: CostModel) -> None:
    """Report all mixes and their bounds. A wait shorter than a step counts as a step."""
    found = [report_mix(report, mix, cost) for mix in mixes]
    report.keep(mixes=found)
    for figures in found:
        name, runs = figures["mix"], {run["order"]: run for run in figures["runs"]}
        groups, base = runs["groups"], runs["first come"]
        speedup = groups["over_first_come"]
        wait = groups["wait_p99_seconds"] / max(base["wait_p99_seconds"], cost.step)
        text = f"{name}: {speedup:.2f}× the requests a second of first come"
        report.figure(f"{name}_speedup", speedup, text, at_least=SPEEDUP)
        report.figure(f"{name}_wait", wait, f"{name}: p99 wait {wait:.2f}× that of first come", at_most=WAIT)


def report_trace(report: Report, arrivals: Sequence[Stream], pools: Sequence[int], cost: CostModel) -> list[float]:
    """Replay the trace at its own times. Returns how many times as fast as real time the host was, of each run."""
    mix = Mix("trace", arrivals, open_streams=len(arrivals))
    ideal = ideal_hit_rate(arrivals)
    report.limit("the trace lasts", arrivals[-1].start)
    report.keep(requests=len(arrivals), ideal_hit_rate=ideal)
    report.say(f"ideal hit rate {ideal:.1%}; a step lasts {cost}")
    report.say(
        "pool        order            hits  of ideal  computed  preempted  latency p50, p99   steps  × real time"
    )
    runs = []
    for slots in pools:
        for name, order in ORDERS.items():
            run = serve(mix, slots, order, cost, f"{slots:,} slots, {name}")
            middle, late = np.percentile(run.latency, [50, 99])
            report.say(
                f"{slots:<11,} {name:<15} {run.hit_rate:6.1%}  {run.hit_rate / ideal:7.1%}  {run.computed:7.1%}"
                f"  {run.preemptions:9}  {middle:7.1f}, {late:6.1f} s  {run.steps:6}  {run.times_real_time:6.1f}"
            )
            runs.append(
                {
                    "slots": slots,
                    "order": name,
                    "hit_rate": run.hit_rate,
                    "of_ideal": run.hit_rate / ideal,
                    "computed": run.computed,
                    "preemptions": run.preemptions,
                    "latency_p50_seconds": float(middle),
                    "latency_p99_seconds": float(late),
                    "steps": run.steps,
                    "times_real_time": run.times_real_time,
                }
            )
    report.keep(runs=runs)
    return [run["times_real_time"] for run in runs]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_options(__doc__)
    parser.add_argument("trace", type=Path, nargs="?", help="a trace in Mooncake's format")
    parser.add_argument("--pools", type=float, nargs="+", default=[1e6, 3e6, 1e7], help="slots of the KV pool")
    parser.add_argument("--requests", type=int, help="only the first so many of the trace")
    parser.add_argument("--mixes", nargs="*", choices=[*MADE, "trace"], default=[*MADE, "trace"], help="only these")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    arrivals = read_arrivals(options.trace) if options.trace else make_arrivals()
    arrivals = arrivals[: options.requests]
    cost, report = CostModel(), Report("simulate")
    report.keep(cost={"step": cost.step, "row": cost.row, "key": cost.key})
    mixes = [MADE[name]() if name in MADE else mix_of_trace(arrivals[:TRACE_REQUESTS]) for name in options.mixes]
    report_mixes(report, mixes, cost)
    speeds = report_trace(report, arrivals, [int(slots) for slots in options.pools], cost)
    slowest = min(speeds)
    report.figure("slowest_times_real_time", slowest, f"slowest {slowest:.1f} × real time", at_least=SPEED)
    return report.finish(check=options.check, save=options.save)


if __name__ == "__main__":
    sys.exit(main())
