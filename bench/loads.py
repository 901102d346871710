"""How much a plan has attention load: bytes of keys, values and partial results over the bytes of distinct keys.

    python -m bench.loads [--check] [--save]

Each row is a step over one tree at heads 32/8, head_dim 128, 16 bit, planned with the costs shipped for the H100. Keys
count once for each unit that reads them; a partial result is written once and read once, in float32. Beside it stands
what PAT's and FastTree's own planners load, in KV tokens over distinct tokens. On four trees that was counted once with
their code, the same for both; on FastTree's 15 it is the rule that gives those four figures, each node read once a tile
of 64 query rows, and not their plans: they may join nodes. Bounds, with --check: less than the two where they were
counted, and no more than 64 units for each of the 132 multiprocessors, everywhere.

The limit is 1: every distinct key is read once, and nothing is merged.

Bias. Loads are not time: repeats may hit the L2 cache, and the planner lowers time. Our partial results count, those of
the two do not.
"""

import sys
from collections.abc import Sequence

import torch

from bench.report import Report, benchmark_options
from bench.trees import FASTTREE, Tree, lay_out, levels, path_tokens, rows_below, shared_prefix
from radixgen.calibration import cost_models
from radixgen.core import Plan
from radixgen.kernels.geometry import Geometry
from radixgen.scheduler.planner import plan

GEOMETRY = Geometry(kv_heads=8, group=4, head_dim=128, v_head_dim=128, dtype=torch.bfloat16)
PROCESSORS = 132
UNITS = 64
"""For each processor, at most."""
TILE = 64
"""Query rows in the two planners' widest tile."""

COUNTED: dict[str, tuple[Tree, float]] = {
    "1024 rows, 1024 + 128": (shared_prefix(1024, 1024, 128), 1.49),
    "1024 rows, 4096 + 128": (shared_prefix(1024, 4096, 128), 2.91),
    "1024 rows, 16384 + 128": (shared_prefix(1024, 16384, 128), 8.00),
    "1,16,256 / 4096,1024,128": (levels("1,16,256 / 4096,1024,128"), 2.15),
}
"""Trees, and KV tokens over distinct tokens of the plans that PAT's and FastTree's code made for them on a CPU, to two
digits. The suffix of 128 is what those figures imply.
"""


def by_tiles(tree: Tree) -> float:
    """KV tokens over distinct tokens where each node is read once for every 64 query rows at or below it."""
    parents, lengths, rows = tree
    sequences = TILE // GEOMETRY.group
    below = rows_below(parents, rows)
    read = sum(length * -(-count // sequences) for length, count in zip(lengths, below, strict=True))
    return read / path_tokens(tree)[0]


def loads(found: Plan, distinct: int) -> tuple[float, float]:
    """Bytes of keys and values that units read, and bytes of partial results written and read back, both over the bytes
    of `distinct` keys and values.
    """
    token = GEOMETRY.kv_heads * (GEOMETRY.head_dim + GEOMETRY.v_head_dim) * GEOMETRY.dtype.itemsize
    partial = GEOMETRY.kv_heads * GEOMETRY.group * (GEOMETRY.v_head_dim + 1) * torch.float32.itemsize
    partials = int((found.row_extra + 1)[found.row_extra > 0].sum())
    return found.kv_tokens_read / distinct, 2 * partials * partial / (distinct * token)


def report_tree(report: Report, name: str, tree: Tree, counted: float | None) -> None:
    found = plan(*lay_out(tree), cost=cost_models(torch.device("cpu"), GEOMETRY))
    keys, partials = loads(found, path_tokens(tree)[0])
    theirs = counted or by_tiles(tree)
    report.figure(
        f"{name}: loads",
        keys + partials,
        f"{name:<26} loads {keys + partials:5.2f} (keys {keys:5.2f}, partials {partials:5.2f}); "
        f"PAT and FastTree {theirs:5.2f} {'counted' if counted else 'by the rule'}",
        at_most=None if counted is None else round(counted - 0.01, 2),
    )
    report.figure(f"{name}: units", found.num_units, f"{name:<26} {found.num_units} units", at_most=UNITS * PROCESSORS)
    report.keep(**{f"{name}: keys": keys, f"{name}: theirs": theirs, f"{name}: tile_rows": found.tile_rows})


def main(arguments: Sequence[str] | None = None) -> int:
    options = benchmark_options(__doc__).parse_args(arguments)
    report = Report("loads")
    report.say("limit: 1.00, each distinct key read once")
    for name, (tree, counted) in COUNTED.items():
        report_tree(report, name, tree, counted)
    for name, notation in FASTTREE.items():
        report_tree(report, name, levels(notation), None)
    return report.finish(check=options.check, save=options.save)


if __name__ == "__main__":
    sys.exit(main())
