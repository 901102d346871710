"""Attention over padded groups of units equals `TreeAttention`, and its operator needs one export for all plans."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from sizes import pairs, size
from test_attention import random_case, random_tree
from torch import Tensor, library, nn
from torch.export import Dim

from radixgen import TreeAttention
from radixgen.core import Chunk, Plan, Window
from radixgen.kernels.tree_attention_op import any_size, register, to_standard_operators, tree_attention
from radixgen.kernels.unit_groups import HIDDEN, MOST_PADDING, UnitTables, lay_out_groups

GROUPS, Q_HEADS, KV_HEADS, DIM, V_DIM = 4, 6, 2, 12, 20


@dataclass
class Step:
    """A random tree with its plan, inputs and expected results, rows in the plan's order."""

    plan: Plan
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor

    @property
    def tables(self) -> UnitTables:
        return lay_out_groups(self.plan, GROUPS)

    def arguments(self) -> tuple:
        """Those of the operator, up to `partials`."""
        tables = self.tables
        groups = [[torch.from_numpy(getattr(g, name)) for g in tables.groups] for name in ("rows", "slots", "bias")]
        k, v = (pool.transpose(0, 1).contiguous() for pool in (self.k, self.v))
        return self.q, k, v, *groups, torch.from_numpy(tables.partials)


def step(
    seed: int, mode: str = "auto", window: Window | None = None, softcap: float | None = None,
    sinks: Tensor | None = None, dtype: torch.dtype = torch.float64,
) -> Step:  # fmt: skip
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    parents, lengths = random_tree(rng, int(rng.integers(1, 30)), int(rng.integers(4, 400)))
    rows = int(rng.integers(2, 50))
    case = random_case(rng, lengths, parents, rows)
    q, k, v = (
        torch.randn(shape, generator=generator, dtype=dtype)
        for shape in ((rows, Q_HEADS, DIM), (case.num_slots, KV_HEADS, DIM), (case.num_slots, KV_HEADS, V_DIM))
    )
    attention = TreeAttention(
        case.parents, case.extents, case.row_nodes, case.row_positions, window=window, softcap=softcap, mode=mode
    )
    out, lse = attention(q, k, v, sinks=sinks)
    order = torch.from_numpy(attention.plan.row_order)
    plan = attention.plan.within(window)
    read = {s for a, n in zip(plan.segment_starts, plan.segment_lengths, strict=True) for s in range(a, a + n)}
    unread = sorted({*range(case.num_slots)} - read)
    k[unread], v[unread] = torch.nan, torch.nan
    return Step(plan, q[order], k, v, out[order], lse[order])


@pytest.mark.parametrize(
    ("mode", "window", "softcap", "sinks", "seed"),
    pairs(
        ("auto", "naive", "unshared"), (None, 7, Chunk(9)), (None, 2.0), (False, True), range(size(4, 40)),
        everything=False,
    ),
)  # fmt: skip
def test_groups_equal_the_reference(
    mode: str, window: Window | None, softcap: float | None, sinks: bool, seed: int
) -> None:
    logits = torch.randn(Q_HEADS, dtype=torch.float64) if sinks else None
    made = step(seed, mode, window, softcap, logits)
    out, lse = tree_attention(*made.arguments(), DIM**-0.5, softcap, logits)
    torch.testing.assert_close(out, made.out)
    torch.testing.assert_close(lse, made.lse)
    assert made.plan.kv_tokens_read <= made.tables.kv_tokens_read <= MOST_PADDING * made.plan.kv_tokens_read


def test_units_of_all_sizes_are_cut_rather_than_padded() -> None:
    """Without cutting, 90 units of 1 to 2^16 keys in four groups would gather far more than the plan's keys."""
    rng = np.random.default_rng(0)
    lengths = np.unique(np.exp(rng.uniform(0, 11, 90)).astype(int)).tolist()
    begins = np.cumsum([0, *lengths]).tolist()
    extents = [[(begin, length)] for begin, length in zip(begins, lengths, strict=False)]
    plan = TreeAttention([-1] * len(lengths), extents, [*range(len(lengths))]).plan
    tables = lay_out_groups(plan, GROUPS)
    assert tables.kv_tokens_read <= MOST_PADDING * plan.kv_tokens_read
    seen = np.zeros(begins[-1], int)
    for group in tables.groups:
        np.add.at(seen, group.slots[(group.bias > HIDDEN / 2).any(1)], 1)
    assert (seen == 1).all()


def test_a_row_without_keys_takes_nothing() -> None:
    made = step(3, window=1)
    q, k, v, rows, slots, bias, partials = made.arguments()
    bias = [torch.full_like(one, HIDDEN) for one in bias]
    _, lse = tree_attention(q, k.nan_to_num(), v.nan_to_num(), rows, slots, bias, partials, 1.0)
    assert (lse < HIDDEN / 2).all()


def test_the_operator_is_sound() -> None:
    register()
    operator = torch.ops.radixgen.tree_attention.default
    for sinks in (None, torch.randn(Q_HEADS)):
        arguments = step(1, dtype=torch.float32).arguments()
        library.opcheck(operator, (*arguments, 0.3, 30.0, sinks))


def test_the_operator_has_no_gradient() -> None:
    arguments = step(1).arguments()
    arguments[0].requires_grad_()
    out, _ = tree_attention(*arguments, 1.0)
    with pytest.raises(RuntimeError, match=r"radixgen.*tree_attention"):
        out.sum().backward()


class Attend(nn.Module):
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, rows: list[Tensor], slots: list[Tensor], bias: list[Tensor],
        partials: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return tree_attention(q, k, v, rows, slots, bias, partials, DIM**-0.5)


def exported(most_rows: int) -> torch.export.ExportedProgram:
    """The operator, exported with tables that are no plan's, for up to `most_rows` rows."""
    pieces, heights, widths = ([Dim(f"{name}{g}") for g in range(GROUPS)] for name in ("pieces", "rows", "keys"))
    rows, slots = Dim("rows", max=most_rows), Dim("slots")
    sizes = (
        {0: rows}, {1: slots}, {1: slots},
        [{0: pieces[g], 1: heights[g]} for g in range(GROUPS)],
        [{0: pieces[g], 1: widths[g]} for g in range(GROUPS)],
        [{0: pieces[g], 1: heights[g], 2: widths[g]} for g in range(GROUPS)],
        {0: rows, 1: Dim("most")},
    )  # fmt: skip
    zeros = [torch.zeros(2 + g, 3 + g, dtype=torch.int64) for g in range(GROUPS)]
    arguments = (
        torch.zeros(5, Q_HEADS, DIM), torch.zeros(KV_HEADS, 11, DIM), torch.zeros(KV_HEADS, 11, V_DIM),
        zeros, [torch.zeros(2 + g, 7 + g, dtype=torch.int64) for g in range(GROUPS)],
        [torch.zeros(2 + g, 3 + g, 7 + g) for g in range(GROUPS)], torch.zeros(5, 2, dtype=torch.int64),
    )  # fmt: skip
    with torch.no_grad(), any_size():
        return torch.export.export(Attend(), arguments, dynamic_shapes=sizes, strict=False)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # PyTorch's own
def test_another_plan_needs_no_other_export() -> None:
    program = exported(most_rows=60)
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("radixgen.tree_attention" in call for call in calls) == 1
    standard = to_standard_operators(program)
    assert not any("radixgen" in str(node.target) for node in standard.graph.nodes)
    for seed in (5, 6, 7):
        made = step(seed, dtype=torch.float32)
        for module in (program.module(), standard.module()):
            torch.testing.assert_close(module(*made.arguments())[0], made.out)


def test_more_rows_than_exported_are_refused() -> None:
    made = next(made for made in map(step, range(9)) if made.plan.num_rows > 10)
    with pytest.raises((RuntimeError, AssertionError), match="10"):
        exported(most_rows=10).module()(*made.arguments())
