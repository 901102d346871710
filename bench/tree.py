"""How fast the tree is without a model: a trace replayed, and one operation in a small and in a large tree.

    python -m bench.tree [TRACE] [--check]

TRACE is a file in Mooncake's format: a JSON object a line, with `input_length` and `hash_ids`, one id for each
block of 512 tokens. Without it a small trace of the same form is made up. Each request is matched (that counts
its hits), inserted, given slots, after an eviction where the pool lacks them, committed and unlocked.

The limit is what no tree can beat: comparing each hit token with the stored one once, and copying each new
token once, at the memory bandwidth of one core.

Bounds, with --check: 200 million prompt tokens a second, in a pool without a limit and in one of 3,000,000
tokens; an operation at a million nodes at most 3 times that at ten thousand. On Mooncake's conversation trace,
and only there, a token hit rate of 37.4 % without a limit and of 14.0 % at 3,000,000, to one decimal.

Bias. Requests come one after another, so that nothing is shared in flight, no lock outlives its request and
eviction never meets a locked leaf but the request's own. Outputs are not inserted: a real server would hit
more, and evict more. Tokens are int32 arrays in memory before the clock starts; no tokenizer, scheduler, plan
or KV is behind them. The memory of earlier runs is reused, so that few pages are touched for the first time.
In the second part every node holds 16 tokens and no path is deeper than 8 nodes.
"""

import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.report import Memory, Report, benchmark_options, measure_memory, time_each, track
from radixgen.cache import ExtentPool, RadixTree, TokenArray

BLOCK = 512
VOCABULARY_BITS = 17
TOKENS_PER_SECOND = 200e6
CONVERSATION_TRACE = (12_031, 144_793_823)
"""Requests and prompt tokens of Mooncake's conversation trace: how it is recognized."""

RUN = 16
DEEPEST = 8


# -- the trace --------------------------------------------------------------------------------------------


def expand(block_ids: Sequence[int], length: int) -> TokenArray:
    """The first `length` tokens of these blocks: token `i` of a block is a hash of its id and `i`."""
    ids = np.array(block_ids, np.uint32)[:, None]
    mixed = ids * np.uint32(0x9E3779B1) + np.arange(BLOCK, dtype=np.uint32) * np.uint32(0x85EBCA77)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        mixed ^= mixed >> np.uint32(shift)
        mixed *= np.uint32(factor)
    mixed >>= np.uint32(32 - VOCABULARY_BITS)
    return mixed.astype(np.int32).reshape(-1)[:length].copy()


def read_trace(path: Path) -> list[TokenArray]:
    lines = path.read_text().splitlines()
    records = (json.loads(line) for line in track(lines, "tokens of the trace", every=200))
    return [expand(record["hash_ids"], record["input_length"]) for record in records]


def make_trace(requests: int, seed: int = 0) -> list[TokenArray]:
    """Conversations under one system block: a third of the requests go on where an earlier one ended."""
    rng = np.random.default_rng(seed)
    sessions: list[list[int]] = []
    trace = []
    fresh = 1
    for _ in range(requests):
        goes_on = bool(sessions) and rng.random() < 1 / 3
        blocks = sessions[int(rng.integers(len(sessions)))] if goes_on else [0]
        count = int(rng.integers(1, 24))
        blocks = [*blocks, *range(fresh, fresh + count)]
        fresh += count
        sessions.append(blocks)
        trace.append(expand(blocks, len(blocks) * BLOCK - int(rng.integers(BLOCK))))
    return trace


def replay(trace: Sequence[TokenArray], slots: int) -> int:
    """Every request through a new tree over a pool of `slots`. Returns the prompt tokens that were hits."""
    tree = RadixTree(ExtentPool(slots))
    hits = 0
    for tokens in trace:
        match = tree.match_prefix(tokens)
        hits += match.computed if match else 0
        cursor = tree.insert(tokens)
        leaf = cursor.held
        new = leaf.known - leaf.scheduled
        if new:
            short = tree.slots_wanted(leaf, new) - tree.pool.free
            if short > 0:
                tree.evict(short)
            tree.schedule(leaf, new)
            tree.commit(leaf)
        tree.unlock(cursor)
    return hits


def report_replay(report: Report, trace: Sequence[TokenArray], pool: int, runs: int, memory: Memory) -> None:
    total = sum(tokens.size for tokens in trace)
    real = (len(trace), total) == CONVERSATION_TRACE
    report.keep(requests=len(trace), prompt_tokens=total, conversation_trace=real)
    pools = [("unlimited", total, 37.4), ("limited", pool, 14.0)]
    hits = {name: replay(trace, slots) for name, slots, _ in track(pools, "counting hits")}
    limits = {name: 4 * hits[name] / memory.compare + 4 * (total - hits[name]) / memory.copy for name, _, _ in pools}
    report.say(f"{len(trace):,} requests, {total:,} prompt tokens")
    for name, slots, _ in pools:
        report.say(
            f"limit, {name} ({slots:,} slots): {limits[name]:.3f} s to compare {hits[name]:,} hit tokens and "
            f"copy {total - hits[name]:,} new ones: {total / limits[name] / 1e6:,.0f} million prompt tokens/s"
        )
    for name, slots, hit_bound in pools:
        run = partial(replay, trace, slots)
        seconds = [time_each(run, times=1, warm_up=0)[0] for _ in track(range(runs), f"replay, {name}")]
        median = float(np.median(seconds))
        report.keep(**{f"{name}_seconds": seconds, f"{name}_slots": slots})
        report.figure(
            f"{name}_hit_percent",
            round(100 * hits[name] / total, 1),
            f"{name}: token hit rate {100 * hits[name] / total:.1f} %",
            at_least=hit_bound if real else None,
        )
        report.figure(
            f"{name}_tokens_per_second",
            total / median,
            f"{name}: {total / median / 1e6:,.0f} million prompt tokens/s, median of {runs} (best "
            f"{total / min(seconds) / 1e6:,.0f}), {1e6 * median / len(trace):.1f} µs a request",
            at_least=TOKENS_PER_SECOND,
        )
        report.figure(
            f"{name}_ratio_to_limit",
            median / limits[name],
            f"{name}: {median / limits[name]:.1f} times the limit's time",
        )


# -- one operation ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Grown:
    """A tree of `RUN`-token nodes, and its paths beside it, so that the clock finds the nodes cold."""

    tree: RadixTree
    runs: NDArray[np.int32]
    """`[nodes, RUN]`"""
    parents: list[int]
    """The run that each run follows, -1 for none."""

    def path(self, index: int) -> TokenArray:
        """The tokens from the root to the end of run `index`."""
        rows = [index]
        while (above := self.parents[rows[-1]]) >= 0:
            rows.append(above)
        return self.runs[rows[::-1]].reshape(-1)


def grow(nodes: int, rng: np.random.Generator) -> Grown:
    """Each run follows a random earlier one that is not too deep."""
    grown = Grown(
        RadixTree(ExtentPool(RUN * nodes + RUN)),
        rng.integers(0, 2**31 - 1, (nodes, RUN), dtype=np.int32),
        [],
    )
    tree, open_runs = grown.tree, [-1]
    depths = {-1: 0}
    picks = rng.random(nodes).tolist()
    gc.disable()
    for index in track(range(nodes), f"growing {nodes:,} nodes", every=5000):
        above = open_runs[int(picks[index] * len(open_runs))]
        grown.parents.append(above)
        cursor = tree.insert(grown.path(index))
        tree.schedule(cursor.held, RUN)
        tree.commit(cursor.held)
        tree.unlock(cursor)
        depths[index] = depths[above] + 1
        if depths[index] < DEEPEST:
            open_runs.append(index)
    gc.enable()
    return grown


def time_extensions(grown: Grown, count: int, rng: np.random.Generator) -> list[float]:
    """Match, insert and unlock a request that extends a random existing prefix; the tree stays as it is."""
    tree = grown.tree
    seconds = []
    for index in rng.integers(len(grown.parents), size=count).tolist():
        tokens = np.concatenate([grown.path(index), rng.integers(0, 2**31 - 1, RUN, dtype=np.int32)])
        begin = time.perf_counter()
        tree.match_prefix(tokens)
        tree.unlock(tree.insert(tokens))
        seconds.append(time.perf_counter() - begin)
    return seconds


def time_evictions(grown: Grown, count: int) -> list[float]:
    """Evict one leaf, `count` times."""
    seconds = []
    for _ in range(count):
        begin = time.perf_counter()
        grown.tree.evict(RUN)
        seconds.append(time.perf_counter() - begin)
    return seconds


def report_operations(report: Report, sizes: tuple[int, int], count: int) -> None:
    rng = np.random.default_rng(0)
    trees = [grow(size, rng) for size in sizes]
    count = min(count, min(sizes) // 4)  # so that evictions leave even the small tree most of its nodes
    chunk = max(count // 10, 1)
    operations: dict[str, Callable[[Grown], list[float]]] = {
        "extend": lambda grown: time_extensions(grown, chunk, rng),
        "evict": lambda grown: time_evictions(grown, chunk),
    }
    for name, measure in operations.items():
        taken: list[list[float]] = [[], []]
        for _ in range(0, count, chunk):
            for seconds, grown in zip(taken, trees, strict=True):
                seconds.extend(measure(grown))
        small, large = (1e6 * float(np.median(seconds)) for seconds in taken)
        report.keep(
            **{
                f"{name}_us_small": small,
                f"{name}_us_large": large,
                f"{name}_us_p99": [1e6 * float(np.percentile(seconds, 99)) for seconds in taken],
            }
        )
        report.figure(
            f"{name}_ratio",
            large / small,
            f"{name}: median {small:.1f} µs at {sizes[0]:,} nodes, {large:.1f} µs at {sizes[1]:,}: "
            f"{large / small:.2f} times, of {len(taken[0]):,} operations each",
            at_most=3.0,
        )
    report.keep(nodes=list(sizes))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_options(__doc__)
    parser.add_argument("trace", nargs="?", type=Path, help="a trace in Mooncake's format")
    parser.add_argument("--requests", type=int, default=2_000, help="of the trace made up without TRACE")
    parser.add_argument("--pool", type=int, default=3_000_000, help="slots of the limited pool")
    parser.add_argument("--runs", type=int, default=5, help="replays timed for each pool")
    parser.add_argument("--nodes", type=int, nargs=2, default=(10_000, 1_000_000), metavar="N")
    parser.add_argument("--operations", type=int, default=2_000, help="timed in each tree")
    options = parser.parse_args(arguments)

    report = Report("tree")
    memory = measure_memory()
    report.say(f"limit: one core compares 2 × {memory.compare / 1e9:.1f} GB/s and copies {memory.copy / 1e9:.1f} GB/s")
    report.keep(compare_bytes_per_second=memory.compare, copy_bytes_per_second=memory.copy)
    trace = read_trace(options.trace) if options.trace else make_trace(options.requests)
    report_replay(report, trace, options.pool, options.runs, memory)
    del trace
    report_operations(report, tuple(options.nodes), options.operations)
    return report.finish(check=options.check, save=options.save)


if __name__ == "__main__":
    sys.exit(main())
