"""Attention that reads the best blocks of keys, beside exact attention.

    python -m bench.top_blocks [--budget 0.125] [--check] [--save]

On a GPU: one layer of an 8B model (32 query heads, 8 KV heads, head_dim 128, bfloat16) in a CUDA graph, at fixed
addresses as in a captured step, 192 MiB written before each call. The limit is the bytes that must be read, at the rate
measured in the same run, or the matrix products, whichever is longer: for exact attention all keys, for TopBlocks the
budget's share of them, all other keys, and the bounds. Then the time of each kernel by PyTorch's profiler, without the
overlap of one kernel with the next.

On a CPU: decode steps of SmolLM2-135M in float32 at 8,192 tokens, exact and TopBlocks by turns. The limit is the bytes
of weights, keys and bounds.

Bias. Keys and queries are random, so that attention is spread as evenly as it can be. The bounds are known already:
they are computed once for each block.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bench.device import Ceilings, Timer
from bench.report import Report, benchmark_options
from radixgen.calibration import cost_models
from radixgen.core import Plan
from radixgen.core.plan import BLOCK
from radixgen.kernels.backend import StaticAttention, backend
from radixgen.kernels.block_bounds import BlockBounds
from radixgen.kernels.geometry import Geometry
from radixgen.kernels.torch_backend import TorchAttention
from radixgen.kernels.torch_blocks import unread_share
from radixgen.kernels.workspace import Workspace
from radixgen.model.loader import load
from radixgen.model.runner import ModelRunner
from radixgen.model.tree_model import TreeModel
from radixgen.reading import TopBlocks
from radixgen.scheduler.cost import CostModel
from radixgen.scheduler.forest import Forest
from radixgen.scheduler.planner import plan, plan_reading
from radixgen.scheduler.revise import StepRows

Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
TAIL = 16
SHARED, LONG = 16_256, 131_072
CONTEXT = 8_192
STEPS = 12


@dataclass(frozen=True, slots=True)
class Case:
    """Rows whose own tokens follow a prefix of so many tokens, shared by all."""

    name: str
    rows: int
    prefix: int
    at_most: float
    """Bound of the time, as a fraction of exact attention's."""


GPU_CASES = (
    Case("64 rows share 16,256", 64, SHARED, 0.25),
    Case("256 rows share 16,256", 256, SHARED, 0.25),
    Case("1 row at 131,072", 1, LONG, 1 / 6),
    Case("1 row at 16,256", 1, SHARED, 1.0),
)
CPU_CASES = ((1, 1.3), (4, 2.0))
"""Streams with nothing in common, and the bound of the speedup."""


def plans(forest: Forest, nodes: np.ndarray, policy: TopBlocks, costs: Sequence[CostModel] | None) -> tuple[Plan, Plan]:
    """The exact plan of rows at the ends of `nodes`, and that of the policy."""
    nodes = nodes.astype(np.int32)
    positions = forest.starts[nodes] + forest.lengths[nodes] - 1
    rows = StepRows(nodes, positions, np.full(nodes.size, -1), np.zeros_like(nodes))
    sparse = plan_reading(forest, rows, [policy], cost=costs)
    assert sparse.selects
    return plan(forest, nodes, positions, cost=costs), sparse


def shared_forest(rows: int, prefix: int) -> tuple[Forest, np.ndarray]:
    """A prefix and a tail for each row, each in one extent."""
    lengths = np.array([prefix] + [TAIL] * rows, np.int32)
    starts = np.array([0] + [prefix] * rows, np.int32)
    parents = np.array([-1] + [0] * rows, np.int32)
    slots = np.cumsum(lengths, dtype=np.int64) - lengths
    return Forest(parents, starts, lengths, np.arange(rows + 2), slots, lengths), np.arange(1, rows + 1)


def limit_us(made: Plan, keys: int, ceilings: Ceilings) -> float:
    """Of a plan that reads `keys` distinct keys."""
    rows = np.diff(made.unit_rows, axis=1)[:, 0]
    counts = np.add.reduceat(made.segment_lengths, made.unit_segments[:, 0])
    products = int((rows * np.where(made.unit_blocks > 0, made.unit_blocks * BLOCK, counts)).sum())
    candidates = int(counts[made.unit_blocks > 0].sum()) // BLOCK
    read = 2 * HEAD_DIM * KV_HEADS * 2 * (keys + candidates) + 4 * HEAD_DIM * Q_HEADS * made.num_rows
    return 1e6 * max(read / ceilings.read, 4 * HEAD_DIM * Q_HEADS * products / ceilings.matrix)


def attention_of(made: Plan, device: torch.device) -> StaticAttention:
    static = backend("triton", device).static
    assert static is not None
    return static(made, None, torch.from_numpy(made.row_positions.astype(np.int64)).to(device), Workspace())


def kernel_us(call: Callable[[], object], times: int = 20) -> dict[str, float]:
    """Mean microseconds of each kernel of a call."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(times):
            call()
        torch.cuda.synchronize()
    return {event.key: event.device_time_total / times for event in profile.key_averages() if event.device_time_total}


def run_gpu(case: Case, policy: TopBlocks, timer: Timer, ceilings: Ceilings, report: Report) -> dict[str, object]:
    device = timer.device
    forest, nodes = shared_forest(case.rows, case.prefix)
    geometry = Geometry(KV_HEADS, Q_HEADS // KV_HEADS, HEAD_DIM, HEAD_DIM, torch.bfloat16)
    exact, sparse = plans(forest, nodes, policy, cost_models(device, geometry))
    slots = -(-int(forest.lengths.sum()) // BLOCK) * BLOCK
    generator = torch.Generator(device).manual_seed(0)
    q = torch.randn(case.rows, Q_HEADS, HEAD_DIM, device=device, dtype=torch.bfloat16, generator=generator)
    k, v = torch.randn(2, slots, KV_HEADS, HEAD_DIM, device=device, dtype=torch.bfloat16, generator=generator)
    bounds = BlockBounds([k])
    bounds.prepare(sparse)
    calls = {
        name: _call(attention_of(made, device), q, k, v, bounds.layers[0])
        for name, made in (("exact", exact), ("top_blocks", sparse))
    }
    times = {name: timer.cold(call) for name, call in calls.items()}
    limits = {
        "exact": limit_us(exact, slots, ceilings),
        "top_blocks": limit_us(sparse, sparse.kv_tokens_read, ceilings),
    }
    kernels = {name: kernel_us(call) for name, call in calls.items()}
    ratio = times["top_blocks"].median / times["exact"].median
    twin = TorchAttention(sparse, None, device)
    every = calls["exact"]()[1]
    shares = [
        float(unread_share(lse, every).mean())
        for lse in (calls["top_blocks"]()[1], twin(q, k, v, HEAD_DIM**-0.5, bounds=bounds.layers[0])[1])
    ]
    report.say(f"{case.name}: unread {100 * shares[0]:.2f} % of attention, by the plain twin {100 * shares[1]:.2f} %")
    for name, time_us in times.items():
        parts = ", ".join(f"{kernel} {us:.1f}" for kernel, us in kernels[name].items())
        report.say(
            f"{case.name}, {name}: limit {limits[name]:.1f} us, taken {time_us.median:.1f} "
            f"({time_us.p10:.1f} to {time_us.p90:.1f}); {parts}"
        )
    text = f"{case.name}: {ratio:.2f} of the time of exact reading (limit {limits['top_blocks'] / limits['exact']:.2f})"
    report.figure(case.name, ratio, text, at_most=case.at_most)
    taken = {name: time_us.median for name, time_us in times.items()}
    return {"case": case.name, "unread": shares, "limits_us": limits, "us": taken, "kernels": kernels}


def _call(
    attention: StaticAttention, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor
) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: attention(q, k, v, HEAD_DIM**-0.5, bounds=bounds)


def run_cpu(streams: int, least: float, policy: TopBlocks, runner: ModelRunner, report: Report) -> dict[str, object]:
    lengths = np.full(streams, CONTEXT, np.int32)
    forest = Forest(
        np.full(streams, -1, np.int32), np.zeros(streams, np.int32), lengths, np.arange(streams + 1),
        np.arange(streams, dtype=np.int64) * CONTEXT, lengths,
    )  # fmt: skip
    made = dict(zip(("exact", "top_blocks"), plans(forest, np.arange(streams), policy, None), strict=True))
    shapes = runner.kv_shapes
    weights = sum(p.numel() * p.element_size() for p in runner.model.model.parameters())
    bound_bytes = sum(2 * s.kv_heads * s.head_dim * s.dtype.itemsize for s in shapes) * streams * CONTEXT // BLOCK
    read = {name: weights + one.kv_tokens_read * runner.kv_bytes_per_token for name, one in made.items()}
    limit = read["exact"] / (read["top_blocks"] + bound_bytes)
    tokens, rows = np.full(streams, 5), np.arange(streams)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for step in range(STEPS + 2):
        for name, one in made.items():
            begin = time.process_time()
            runner.run(one, tokens, np.full(streams, -1), rows)
            if step >= 2:
                seconds[name].append(time.process_time() - begin)
    medians = {name: float(np.median(taken)) for name, taken in seconds.items()}
    ratio = medians["exact"] / medians["top_blocks"]
    label = f"{streams} streams of {CONTEXT:,} tokens" if streams > 1 else f"1 stream of {CONTEXT:,} tokens"
    text = (
        f"{label}: limit {limit:.2f} x; exact {1e3 * medians['exact']:.1f} ms a step, TopBlocks "
        f"{1e3 * medians['top_blocks']:.1f}: {ratio:.2f} x"
    )
    report.figure(label, ratio, text, at_least=least)
    return {"case": label, "limit": limit, "seconds": seconds}


def cpu_runner() -> ModelRunner:
    """SmolLM2 whose pool is full of random keys and values."""
    loaded = load("smollm2", "float32", "cpu")
    model = TreeModel(loaded.model, loaded.name, CONTEXT, 64)
    runner = ModelRunner(model, "auto", loaded.eos_token_ids, graphs=False)
    runner.allocate(CONTEXT * max(streams for streams, _ in CPU_CASES))
    for pool in (*runner.storage.keys, *runner.storage.values):
        assert isinstance(pool, Tensor)
        pool.normal_()
    return runner


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_options(__doc__)
    parser.add_argument("--budget", type=float, default=0.125, help="fraction of the blocks that is read")
    options = parser.parse_args(arguments)
    policy = TopBlocks(budget=options.budget)
    report = Report("top_blocks")
    if torch.cuda.is_available():
        timer = Timer(torch.device("cuda"))
        ceilings = timer.ceilings()
        report.say(f"limit: {torch.cuda.get_device_name()} {ceilings.describe()}")
        report.keep(cases=[run_gpu(case, policy, timer, ceilings, report) for case in GPU_CASES])
    else:
        runner = cpu_runner()
        report.keep(cases=[run_cpu(*case, policy, runner, report) for case in CPU_CASES])
    return report.finish(check=options.check, save=options.save)


if __name__ == "__main__":
    sys.exit(main())
