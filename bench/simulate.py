"""A trace replayed through the whole engine, with a model that costs nothing and a clock that is simulated.

    python -m bench.simulate [TRACE] [--check] [--save] [--pools 1e6 3e6 1e7]

TRACE is a file in Mooncake's format, as for `bench.tree`, with `timestamp` (ms) and `output_length` besides;
without it a small trace of the same form is made up. Each request is submitted at its own time. A step lasts what
the cost model says: 20 ms for the weights of a large mixture of experts, 20 µs a row, 1 ns a key read; only the
host's own time is real.

Printed: the token hit rate of each pool, as a share of the ideal (every earlier prompt kept for ever, and computed
at once), with requests admitted in order of arrival and with the longest computed prefix first; how many prompt
tokens had to be computed, where what two requests have in common in flight is computed once; latency from the
time of arrival; and how much faster than real time the host was. Bound, with --check: 20 times, in every run.

The limit is the trace itself: the host may take as long as the trace lasts.

Bias. The trace says nothing of what was generated: ours is random and never hit again, where a real conversation
goes on from it. The cost model is stated, not measured.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from bench.null import NullModel
from bench.report import Report, benchmark_options
from bench.tree import VOCABULARY_BITS, make_trace, read_trace
from radixgen import Engine, Limits, SamplingParams
from radixgen.cache import ExtentPool, RadixTree, TokenArray
from radixgen.core import Plan

SPEED = 20.0
ORDERS = {"arrival": 0, "longest prefix": Limits().max_overtaken}


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
class Arrival:
    """One request of the trace; `time` in seconds."""

    time: float
    prompt: TokenArray
    output_length: int


@dataclass(frozen=True, slots=True)
class Replay:
    """What one run showed; seconds are simulated but for `host_seconds`."""

    hit_rate: float
    computed: float
    """Share of the prompt tokens that went through the model."""
    preemptions: int
    steps: int
    latency: NDArray[np.float64]
    seconds: float
    host_seconds: float


def read_arrivals(path: Path) -> list[Arrival]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    prompts = read_trace(path)
    return [
        Arrival(record["timestamp"] / 1e3, prompt, max(record["output_length"], 1))
        for record, prompt in zip(records, prompts, strict=True)
    ]


def make_arrivals(requests: int = 600, rate: float = 3.4) -> list[Arrival]:
    """The made-up trace of `bench.tree`, at `rate` requests a second, with 300 tokens of output on average."""
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.exponential(1 / rate, requests)).tolist()
    lengths = rng.geometric(1 / 300, requests).tolist()
    return [Arrival(*one) for one in zip(times, make_trace(requests), lengths, strict=True)]


def ideal_hit_rate(arrivals: Sequence[Arrival]) -> float:
    """Every prompt of before is kept, and was computed at once."""
    total = sum(arrival.prompt.size for arrival in arrivals)
    tree = RadixTree(ExtentPool(total))
    hits = 0
    for arrival in arrivals:
        match = tree.match_prefix(arrival.prompt)
        hits += match.length if match else 0
        tree.insert(arrival.prompt)
    return hits / total


def replay(arrivals: Sequence[Arrival], slots: int, max_overtaken: int, cost: CostModel, label: str) -> Replay:
    """Submit each request at its time, and step until all have ended."""
    longest = max(arrival.prompt.size + arrival.output_length for arrival in arrivals)
    model = SimulatedModel(cost, longest + 1)
    limits = Limits(max_overtaken=max_overtaken, max_waiting=len(arrivals), max_waiting_tokens=1 << 40)
    engine = Engine(model, kv_tokens=slots, max_step_tokens=8_192, limits=limits, clock=lambda: model.now)
    begun: dict[str, float] = {}
    latency = []
    place = 0
    begin = time.perf_counter()
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(label, total=len(arrivals))
        while place < len(arrivals) or engine.has_unfinished:
            if not engine.has_unfinished:
                model.now = max(model.now, arrivals[place].time)
            while place < len(arrivals) and arrivals[place].time <= model.now:
                one = arrivals[place]
                params = SamplingParams(temperature=0.0, max_tokens=one.output_length, ignore_eos=True)
                begun[engine.submit(one.prompt, params, output_kind="final")] = one.time
                place += 1
            for output in engine.step():
                latency.append(model.now - begun.pop(output.request_id))
                bar.update(task, completed=len(latency))
    seconds = time.perf_counter() - begin
    stats = engine.stats()
    assert not begun and len(latency) == len(arrivals)
    return Replay(
        hit_rate=stats.cached_prompt_tokens / stats.prompt_tokens,
        computed=stats.computed_prompt_tokens / stats.prompt_tokens,
        preemptions=stats.preemptions,
        steps=stats.steps,
        latency=np.array(latency),
        seconds=model.now,
        host_seconds=seconds,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_options(__doc__)
    parser.add_argument("trace", type=Path, nargs="?", help="a trace in Mooncake's format")
    parser.add_argument("--pools", type=float, nargs="+", default=[1e6, 3e6, 1e7], help="slots of the KV pool")
    parser.add_argument("--requests", type=int, help="only the first so many")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    arrivals = read_arrivals(options.trace) if options.trace else make_arrivals()
    arrivals = arrivals[: options.requests]
    lasts = arrivals[-1].time
    report = Report("simulate")
    report.limit("the trace lasts", lasts)
    ideal = ideal_hit_rate(arrivals)
    cost = CostModel()
    report.keep(
        requests=len(arrivals), ideal_hit_rate=ideal, cost={"step": cost.step, "row": cost.row, "key": cost.key}
    )
    report.say(f"ideal hit rate {ideal:.1%}; a step lasts {cost}")
    report.say(
        "pool        order            hits  of ideal  computed  preempted  latency p50, p99   steps  × real time"
    )
    runs = []
    for slots in map(int, options.pools):
        for order, max_overtaken in ORDERS.items():
            run = replay(arrivals, slots, max_overtaken, cost, f"{slots:,} slots, {order}")
            middle, late = np.percentile(run.latency, [50, 99])
            speed = run.seconds / run.host_seconds
            report.say(
                f"{slots:<11,} {order:<15} {run.hit_rate:6.1%}  {run.hit_rate / ideal:7.1%}  {run.computed:7.1%}"
                f"  {run.preemptions:9}  {middle:7.1f}, {late:6.1f} s  {run.steps:6}  {speed:6.1f}"
            )
            runs.append(
                {
                    "slots": slots,
                    "order": order,
                    "hit_rate": run.hit_rate,
                    "of_ideal": run.hit_rate / ideal,
                    "computed": run.computed,
                    "preemptions": run.preemptions,
                    "latency_p50_seconds": float(middle),
                    "latency_p99_seconds": float(late),
                    "steps": run.steps,
                    "times_real_time": speed,
                }
            )
    report.keep(runs=runs)
    slowest = min(run["times_real_time"] for run in runs)
    report.figure("slowest_times_real_time", slowest, f"slowest {slowest:.1f} × real time", at_least=SPEED)
    return report.finish(check=options.check, save=options.save)


if __name__ == "__main__":
    sys.exit(main())
