"""A decoding step of a true-sized model against the chip's limit: around attention alone, and whole.

    python -m bench.model [--shape 8B] [--quick] [--check] [--save]

Around attention: transformers' modelling on 1 to 1,024 rows in a CUDA graph, attention answered by a stub that returns
its queries: as it comes; with the layers that share an input fused, as the engine has them; and with `torch.compile`
of the blocks besides (`--quick`: only that). The limit is reading the weights once or multiplying the rows by them,
whichever is longer.
Whole: `ModelRunner.run` over a shared prefix with a suffix of 64 tokens a row, as the engine decodes; its limit adds
each layer's attention: every distinct key read once, queries and results once.

Bias. Weights are random and the sampling of tokens is left out. Inputs are the same in every replay.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.attention import roofline_us
from bench.device import Timer
from bench.limits import StepLimit
from bench.report import Report, benchmark_options, track
from bench.shapes import SHAPES, build, weight_bytes
from bench.trees import Tree, lay_out, shared_prefix
from radixgen.model.layer_call import LayerCall
from radixgen.model.runner import ModelRunner
from radixgen.model.tree_model import TreeModel
from radixgen.scheduler.planner import plan

ROWS = (1, 8, 32, 64, 128, 256, 512, 1024)
PREFIX, SUFFIX = 4096, 64


def stub(call: LayerCall) -> tuple[Tensor, Tensor]:
    """Attention that costs nothing."""
    return call.q, call.q[..., 0]


def forward(model: TreeModel, rows: int) -> Callable[[], Tensor]:
    """A pass over `rows` rows with logits for each, attention stubbed."""
    index = torch.arange(rows, device=model.device)
    return lambda: model.forward(index, index, index, stub)


def step(runner: ModelRunner, tree: Tree) -> Callable[[], Tensor]:
    """A decoding step of all rows of `tree`, as the engine runs it."""
    forest, nodes, positions = lay_out(tree)
    made = plan(forest, nodes, positions, cost=runner.costs or None)
    rows = np.arange(nodes.size)
    slots = (forest.extent_starts + forest.extent_lengths - 1)[nodes][made.row_order]
    return lambda: runner.run(made, rows % runner.vocab_size, slots, rows)


def report_around(report: Report, timer: Timer, limits: StepLimit, model: TreeModel, label: str) -> None:
    for rows in ROWS:
        taken = timer.graph_us(forward(model, rows))
        limit = 1e6 * limits.weights(rows, rows)
        bound = 1.15 if label == "compiled" else None
        report.figure(
            f"{label}_{rows}", taken / limit,
            f"around attention, {label}, {rows:5d} rows: {taken:8.0f} us, limit {limit:8.0f}, {taken / limit:.2f} x",
            at_most=bound,
        )  # fmt: skip
        report.keep(**{f"{label}_{rows}_us": taken})


def report_steps(report: Report, timer: Timer, limits: StepLimit, runner: ModelRunner) -> None:
    shape = limits.shape
    for rows in ROWS:
        tree = shared_prefix(rows, PREFIX, SUFFIX)
        taken = timer.host_us(step(runner, tree))
        attention = roofline_us(tree, (shape.q_heads, shape.kv_heads), limits.ceilings) * shape.layers
        limit = 1e6 * limits.weights(rows, rows) + attention
        report.figure(
            f"step_{rows}", taken / limit,
            f"whole step, {rows:5d} rows on {PREFIX} + {SUFFIX}: {taken:8.0f} us, limit {limit:8.0f}, "
            f"{taken / limit:.2f} x",
            at_most=1.35 if rows == 1024 else None,
        )  # fmt: skip
        report.keep(**{f"step_{rows}_us": taken})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_options(__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="8B")
    parser.add_argument("--quick", action="store_true", help="only as the engine has it")
    options = parser.parse_args(arguments)
    report = Report("model")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    shape = SHAPES[options.shape if cuda else "toy"]
    network = build(shape, device)
    with torch.inference_mode():
        if not cuda:
            return toy(report, network)
        timer = Timer(device)
        limits = StepLimit(shape, timer.ceilings())
        report.say(f"limit: {torch.cuda.get_device_name()} {limits.ceilings.describe()}")
        report.keep(shape=options.shape, weight_bytes=weight_bytes(network), ceilings=asdict(limits.ceilings))
        model = TreeModel(network, options.shape, None)
        runner = ModelRunner(model, "auto", frozenset())
        runner.allocate(PREFIX + 1024 * SUFFIX)
        for label in track(("eager", "fused", "compiled"), "running"):
            if label == "fused":
                model.fuse_linears()
            if label == "compiled":
                model.compile_blocks()
            if label == "compiled" or not options.quick:
                report_around(report, timer, limits, model, label)
        report_steps(report, timer, limits, runner)
    return report.finish(check=options.check, save=options.save)


def toy(report: Report, network: PreTrainedModel) -> int:
    """A small model and a small tree, untimed."""
    model = TreeModel(network, "toy", None)
    runner = ModelRunner(model, "auto", frozenset())
    runner.allocate(40)
    logits = step(runner, shared_prefix(3, 16, 8))()
    report.say(f"toy: logits {tuple(logits.shape)}, {forward(model, 5)().shape[0]} rows around attention")
    report.keep(rows=logits.shape[0], weight_bytes=weight_bytes(network))
    return report.finish(check=False, save=False)


if __name__ == "__main__":
    sys.exit(main())
