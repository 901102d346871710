"""`TreeAttention` against float64 attention over each row's full path, on ugly trees and sizes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from sizes import pairs
from torch import Tensor

from radixgen import TreeAttention
from radixgen.core import Chunk, InvalidRequest, Window
from radixgen.core.compiled import HAS_NUMBA
from radixgen.kernels import compiled_attention, torch_backend
from radixgen.kernels.compiled_attention import CompiledUnits
from radixgen.scheduler.cost import CostModel, TileCost


@dataclass
class Case:
    parents: list[int]
    extents: list[list[tuple[int, int]]]
    row_nodes: list[int]
    row_positions: list[int] | None
    num_slots: int

    def path_slots(self, node: int) -> list[int]:
        slots: list[int] = []
        while node >= 0:
            slots = [s for start, n in self.extents[node] for s in range(start, start + n)] + slots
            node = self.parents[node]
        return slots

    def positions(self) -> list[int]:
        if self.row_positions is not None:
            return self.row_positions
        return [len(self.path_slots(node)) - 1 for node in self.row_nodes]


def random_case(rng: np.random.Generator, lengths: list[int], parents: list[int], rows: int) -> Case:
    """Node `i` holds `lengths[i]` keys in one to three extents at random places."""
    pieces = []
    for node, length in enumerate(lengths):
        cuts = sorted(rng.integers(0, length + 1, rng.integers(0, 3)).tolist())
        pieces += [(node, b - a) for a, b in zip([0, *cuts], [*cuts, length], strict=True)]
    place, extents = int(rng.integers(0, 9)), [[] for _ in lengths]
    by_piece: dict[int, tuple[int, int]] = {}
    for index in rng.permutation(len(pieces)).tolist():
        by_piece[index] = (place, pieces[index][1])
        place += pieces[index][1] + int(rng.integers(0, 4))
    for index, (node, _) in enumerate(pieces):
        extents[node].append(by_piece[index])
    starts = [0] * len(lengths)
    for node, parent in enumerate(parents):
        if parent >= 0:
            starts[node] = starts[parent] + lengths[parent]
    full = [node for node, length in enumerate(lengths) if length]
    nodes = rng.choice(full, rows).tolist()
    positions = [int(rng.integers(starts[n], starts[n] + lengths[n])) for n in nodes]
    return Case(parents, extents, nodes, positions, place + 5)


def random_tree(rng: np.random.Generator, nodes: int, longest: int) -> tuple[list[int], list[int]]:
    parents = [-1] + [int(rng.integers(-1 if i % 7 == 0 else 0, i)) for i in range(1, nodes)]
    lengths = [int(rng.choice([0, 1, 2, rng.integers(3, longest)])) for _ in range(nodes)]
    lengths[0] = longest
    return parents, lengths


def first_key(window: Window | None, position: int) -> int:
    if isinstance(window, Chunk):
        return position - position % window.size
    return 0 if window is None else max(0, position - window + 1)


def reference(
    case: Case, q: Tensor, k: Tensor, v: Tensor, *, scale: float, dtype: torch.dtype, window: Window | None,
    softcap: float | None, sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One softmax a row over its whole path."""
    group = q.shape[1] // k.shape[1]
    outs, lses = [], []
    for row, (node, position) in enumerate(zip(case.row_nodes, case.positions(), strict=True)):
        first = first_key(window, position)
        slots = case.path_slots(node)[first : position + 1]
        keys = k[slots].to(dtype).repeat_interleave(group, 1)
        values = v[slots].to(dtype).repeat_interleave(group, 1)
        scores = torch.einsum("hd,khd->hk", q[row].to(dtype), keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        lse = torch.logsumexp(scores, -1) if slots else scores.new_full(scores.shape[:1], float("-inf"))
        denominator = lse if sinks is None else torch.logaddexp(lse, sinks.to(dtype))
        outs.append(torch.einsum("hk,khd->hd", torch.exp(scores - denominator[:, None]), values))
        lses.append(lse)
    return torch.stack(outs), torch.stack(lses)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def tensors(
    case: Case, heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(len(case.row_nodes), heads[0], dims[0], generator=generator).to(dtype)
    k = torch.randn(case.num_slots, heads[1], dims[0], generator=generator).to(dtype)
    v = torch.randn(case.num_slots, heads[1], dims[1], generator=generator).to(dtype)
    return q, k, v


def poison(case: Case, window: Window | None, *pools: Tensor) -> None:
    """NaN in every slot that no row may see."""
    seen = set()
    for node, position in zip(case.row_nodes, case.positions(), strict=True):
        first = first_key(window, position)
        seen.update(case.path_slots(node)[first : position + 1])
    for pool in pools:
        pool[[slot for slot in range(case.num_slots) if slot not in seen]] = float("nan")


CHEAP_UNITS = CostModel(tiles=(TileCost(16, 1.0, 1.0),), partial=0.1)
MIXED = CostModel(tiles=(TileCost(4, 8.0, 1.0), TileCost(32, 9.0, 1.2)), partial=0.5, programs=5, mix=True)
MODES = [("auto", None), ("auto", CHEAP_UNITS), ("auto", MIXED), ("naive", None), ("prefix", None), ("unshared", None)]
MASKS = [
    (None, None, False), (1, None, False), (13, None, True), (200, 5.0, False), (None, 20.0, True),
    (Chunk(1), None, False), (Chunk(13), None, True), (Chunk(200), 5.0, False),
]  # fmt: skip


@pytest.mark.parametrize(
    ("way", "masks", "shape"),
    pairs(MODES, MASKS, [((9, 3), (64, 64)), ((4, 4), (63, 63)), ((8, 1), (129, 33)), ((6, 2), (8, 16))]),
)
def test_equals_float64(way, masks, shape) -> None:
    (mode, cost), (window, softcap, sinks), (heads, dims) = way, masks, shape
    rng = np.random.default_rng(7)
    parents, lengths = random_tree(rng, nodes=23, longest=300)
    case = random_case(rng, lengths, parents, rows=37)
    q, k, v = tensors(case, heads, dims, torch.float32)
    sink_logits = torch.randn(heads[0]) if sinks else None
    scale = dims[0] ** -0.5
    expected, expected_lse = reference(
        case, q, k, v, scale=scale, dtype=torch.float64, window=window, softcap=softcap,
        sinks=sink_logits,
    )  # fmt: skip
    poison(case, window, k, v)
    attn = TreeAttention(
        case.parents, case.extents, case.row_nodes, case.row_positions, window=window,
        softcap=softcap, mode=mode, cost=cost,
    )  # fmt: skip
    out, lse = attn(q, k, v, sinks=sink_logits)
    assert error(out, expected) < 1e-6
    assert error(lse, expected_lse) < 1e-6


@pytest.mark.parametrize("depth", [1, 2, 17, 64])
@pytest.mark.parametrize(("mode", "cost"), MODES)
def test_depths(depth: int, mode, cost) -> None:
    """A spine of `depth` nodes with a leaf at each: the longest merges there are."""
    rng = np.random.default_rng(depth)
    parents = [-1, *range(depth - 1)] + list(range(depth))
    lengths = [int(rng.integers(1, 40)) for _ in range(2 * depth)]
    case = random_case(rng, lengths, parents, rows=max(depth, 3))
    q, k, v = tensors(case, (4, 2), (32, 32), torch.float32)
    expected, expected_lse = reference(
        case, q, k, v, scale=32**-0.5, dtype=torch.float64, window=None, softcap=None, sinks=None
    )
    attn = TreeAttention(case.parents, case.extents, case.row_nodes, case.row_positions, mode=mode, cost=cost)
    out, lse = attn(q, k, v)
    assert error(out, expected) < 1e-6
    assert error(lse, expected_lse) < 1e-6


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize(("mode", "cost"), MODES)
def test_hard_inputs_cost_at_most_twice_one_softmax(scale: float, mode, cost) -> None:
    """Scores of a few hundred, and equal keys: no worse than float32 over the whole path at once."""
    rng = np.random.default_rng(3)
    parents, lengths = random_tree(rng, nodes=40, longest=200)
    case = random_case(rng, lengths, parents, rows=50)
    q, k, v = tensors(case, (4, 2), (64, 64), torch.float32)
    k[:, 0] = k[0, 0]
    v += 10
    arguments = {"scale": scale, "window": None, "softcap": None, "sinks": None}
    exact, exact_lse = reference(case, q, k, v, dtype=torch.float64, **arguments)
    plain, plain_lse = reference(case, q, k, v, dtype=torch.float32, **arguments)
    out, lse = TreeAttention(case.parents, case.extents, case.row_nodes, case.row_positions, mode=mode, cost=cost)(
        q, k, v, scale=scale
    )
    assert error(out, exact) <= 2 * error(plain, exact) + 2e-7
    assert error(lse, exact_lse) <= 2 * error(plain_lse, exact_lse) + 2e-7


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
def test_half_precision(dtype: torch.dtype, bound: float) -> None:
    rng = np.random.default_rng(5)
    parents, lengths = random_tree(rng, nodes=20, longest=500)
    case = random_case(rng, lengths, parents, rows=30)
    q, k, v = tensors(case, (8, 2), (64, 64), dtype)
    expected, _ = reference(case, q, k, v, scale=0.125, dtype=torch.float64, window=None, softcap=None, sinks=None)
    out, lse = TreeAttention(case.parents, case.extents, case.row_nodes, case.row_positions)(q, k, v)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert error(out, expected) < bound


@pytest.mark.parametrize("window", [None, 1, 6, 50])
@pytest.mark.parametrize(("mode", "cost"), MODES)
def test_unseen_slots_change_no_bit(window: int | None, mode, cost) -> None:
    rng = np.random.default_rng(11)
    parents, lengths = random_tree(rng, nodes=30, longest=400)
    case = random_case(rng, lengths, parents, rows=40)
    q, k, v = tensors(case, (4, 2), (16, 16), torch.float32)
    attn = TreeAttention(
        case.parents, case.extents, case.row_nodes, case.row_positions, window=window, mode=mode,
        cost=cost,
    )  # fmt: skip
    clean, clean_lse = attn(q, k, v)
    poison(case, window, k, v)
    out, lse = attn(q, k, v)
    assert torch.equal(out, clean) and torch.equal(lse, clean_lse)
    assert out.isfinite().all()


def spy(method: Any, calls: list[Any]) -> Any:
    """The method, with its calls recorded."""

    def record(*arguments: Any) -> Any:
        calls.append(arguments)
        return method(*arguments)

    return record


@pytest.mark.parametrize("window", [None, 7])
def test_fused_equals_plain(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    rng = np.random.default_rng(13)
    parents, lengths = random_tree(rng, nodes=30, longest=700)
    case = random_case(rng, lengths, parents, rows=60)
    q, k, v = tensors(case, (6, 2), (32, 32), torch.float32)
    attn = TreeAttention(case.parents, case.extents, case.row_nodes, case.row_positions, window=window)
    fused, fused_lse = attn(q, k, v)
    monkeypatch.setattr(torch_backend, "FUSED", False)
    plain, plain_lse = attn(q, k, v)
    assert not torch.equal(fused, plain)
    assert error(fused, plain) < 1e-6 and error(fused_lse, plain_lse) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (7, None), (None, 2.0), (Chunk(9), None)])
@pytest.mark.parametrize(("heads", "dims"), [((6, 2), (33, 33)), ((1, 1), (129, 63)), ((9, 3), (64, 64))])
def test_compiled_units_equal_padded_ones(monkeypatch, dtype, window, softcap, heads, dims) -> None:
    """Rows that have few keys of their own, below and without a longer trunk, some of them with no keys at all."""
    rng = np.random.default_rng(17)
    parents, lengths = [-1, *[0] * 17, -1, -1, *[18] * 3], [37, *rng.integers(1, 90, 17), 300, 5, 1, 2, 3]
    case = random_case(rng, [int(length) for length in lengths], parents, rows=41)
    q, k, v = (tensor.to(dtype) for tensor in tensors(case, heads, dims, torch.float32))
    attn = TreeAttention(
        case.parents, case.extents, case.row_nodes, case.row_positions, window=window, softcap=softcap, mode="naive",
    )  # fmt: skip
    monkeypatch.setattr(compiled_attention, "MOST_ROWS", 10**6)
    calls = []
    monkeypatch.setattr(CompiledUnits, "attend", spy(CompiledUnits.attend, calls))
    found, lse = attn(q, k, v)
    monkeypatch.setattr(torch_backend, "FUSED", False)
    expected, expected_lse = attn(q, k, v)
    assert len(calls) == HAS_NUMBA
    bound = 2e-6 if dtype == torch.float32 else 1e-2
    assert error(found.float(), expected.float()) < bound and error(lse, expected_lse) < 2e-6


def test_a_thousand_rows() -> None:
    rng = np.random.default_rng(1)
    parents, lengths = random_tree(rng, nodes=200, longest=60)
    case = random_case(rng, lengths, parents, rows=1000)
    q, k, v = tensors(case, (2, 1), (16, 16), torch.float32)
    expected, _ = reference(case, q, k, v, scale=0.25, dtype=torch.float64, window=None, softcap=None, sinks=None)
    attn = TreeAttention(case.parents, case.extents, case.row_nodes, case.row_positions)
    assert error(attn(q, k, v)[0], expected) < 1e-6
    assert attn.plan.kv_tokens_read < attn.plan.kv_tokens_unshared


def test_rows_without_keys_give_zero() -> None:
    q, k, v = torch.randn(3, 2, 8), torch.randn(10, 1, 8), torch.randn(10, 1, 8)
    out, lse = TreeAttention([-1, -1, 1], [[(2, 3)], [], []], [2, 0, 1])(q, k, v)
    assert (out[[0, 2]] == 0).all() and lse[[0, 2]].isneginf().all()
    assert lse[1].isfinite().all()
    out, lse = TreeAttention([-1], [[(0, 3)]], [])(q[:0], k, v)
    assert out.shape == (0, 2, 8) and lse.shape == (0, 2)


def test_last_position_is_the_default() -> None:
    q, k, v = torch.randn(2, 2, 8), torch.randn(20, 2, 8), torch.randn(20, 2, 8)
    tree = ([-1, 0, 0], [[(0, 9)], [(9, 2)], [(12, 3), (17, 1)]])
    default = TreeAttention(*tree, [1, 2])(q, k, v)
    stated = TreeAttention(*tree, [1, 2], [10, 12])(q, k, v)
    assert torch.equal(default[0], stated[0])


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"parents": [-1, 1], "extents": [[], []], "row_nodes": [0]}, "parents"),
        ({"parents": [-1], "extents": [], "row_nodes": [0]}, "extents"),
        ({"parents": [-1], "extents": [[(-1, 2)]], "row_nodes": [0]}, "extents"),
        ({"parents": [-1], "extents": [[(0, 2)]], "row_nodes": [1]}, "row_nodes"),
        ({"parents": [-1], "extents": [[(0, 2)]], "row_nodes": [0], "row_positions": [2]}, "row_pos"),
        ({"parents": [-1], "extents": [[(0, 2)]], "row_nodes": [0], "window": 0}, "window"),
        ({"parents": [-1], "extents": [[(0, 2)]], "row_nodes": [0], "attention": "x"}, "attention"),
        ({"parents": [-1], "extents": [[(0, 2)]], "row_nodes": [0], "mode": "x"}, "mode"),
    ],
)  # fmt: skip
def test_bad_trees_are_named(arguments: dict, field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        TreeAttention(**arguments)


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 2, 8), (5, 1, 8), (5, 1, 8)),
        ((1, 3, 8), (5, 2, 8), (5, 2, 8)),
        ((1, 2, 8), (4, 1, 8), (4, 1, 8)),
        ((1, 2, 8), (5, 1, 9), (5, 1, 8)),
    ],
)
def test_bad_shapes_are_named(shapes) -> None:
    attn = TreeAttention([-1], [[(0, 5)]], [0])
    with pytest.raises(InvalidRequest):
        attn(*(torch.zeros(shape) for shape in shapes))


def test_units_that_are_not_in_the_order_of_rows() -> None:
    """Whole subtrees in one tile come before what is left of the subtrees ahead of them, with partials or without."""
    parents = [-1, 0, 0] + [1 + leaf % 2 for leaf in range(28)]
    extents = [[(3, 3)], [(10, 277)], [(300, 37)]] + [[(400 + 9 * leaf, 1 + leaf % 7)] for leaf in range(28)]
    case = Case(parents, extents, list(range(3, 31)), None, 700)
    tiles = TileCost(16, 5.0, 1.0, 2.0), TileCost(64, 6.0, 1.2, 2.4), TileCost(128, 9.0, 1.3, 2.6)
    cost = CostModel(tiles, partial=0.5, first_key=0.1, group=4, kv_heads=2, programs=3, least_run=128, mix=True)
    plan = TreeAttention(case.parents, case.extents, case.row_nodes, case.row_positions, cost=cost).plan
    assert plan.single and (np.diff(plan.unit_rows[:, 0]) < 0).any()
    q, k, v = tensors(case, (8, 2), (16, 16), torch.float64)
    attn = TreeAttention(case.parents, case.extents, case.row_nodes, case.row_positions, cost=cost, attention="torch")
    plain = {"scale": 0.25, "dtype": torch.float64, "window": None, "softcap": None, "sinks": None}
    assert error(attn(q, k, v)[0], reference(case, q, k, v, **plain)[0]) < 1e-12
