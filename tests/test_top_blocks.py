"""Attention over chosen blocks: bounds, the choice, plans, both backends and the engine."""

from dataclasses import replace

import families
import numpy as np
import pytest
import torch
from torch import Tensor

from radixgen import Engine, SamplingParams
from radixgen.core import InvalidRequest, Plan
from radixgen.core.plan import BLOCK
from radixgen.kernels import torch_blocks
from radixgen.kernels.block_bounds import BlockBounds
from radixgen.kernels.block_work import candidate_blocks, list_room
from radixgen.kernels.chip import Chip
from radixgen.kernels.quantized import QuantizedKV, allocate, quantize, read, write
from radixgen.kernels.torch_backend import TorchAttention
from radixgen.kernels.torch_blocks import block_scores, choose_blocks, unread_share
from radixgen.kernels.work import lay_out
from radixgen.kernels.workspace import Workspace
from radixgen.reading import Exact, ReadingPolicy, TopBlocks
from radixgen.scheduler import top_blocks
from radixgen.scheduler.cost import CostModel, TileCost
from radixgen.scheduler.forest import Forest
from radixgen.scheduler.planner import plan
from radixgen.scheduler.top_blocks import add_choosing_units, withhold_blocks

CPU = torch.device("cpu")
COST = CostModel(tiles=(TileCost(16, 60.0, 1.0), TileCost(64, 70.0, 1.2)), partial=0.1, programs=7, mix=True)
ALL = TopBlocks(budget=1.0, recent=1, sinks=0)


@pytest.fixture(autouse=True)
def few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let rows choose among as few as two blocks."""
    monkeypatch.setattr(top_blocks, "LEAST_CANDIDATES", 2)


def shared_forest(rows: int, prefix: int, tail: int, first_slot: int = 5) -> tuple[Forest, np.ndarray]:
    """A prefix in two extents, and a tail for each row."""
    half = prefix // 2
    starts = np.array([0] + [prefix] * rows, np.int32)
    lengths = np.array([prefix] + [tail] * rows, np.int32)
    extents = np.array([half, prefix - half] + [tail] * rows, np.int32)
    slots = first_slot + np.cumsum(extents + 3, dtype=np.int64) - extents
    offsets = np.concatenate([[0], np.arange(2, rows + 3)])
    return Forest(np.array([-1] + [0] * rows, np.int32), starts, lengths, offsets, slots, extents), np.arange(
        1, rows + 1
    )


def make_plan(
    forest: Forest,
    nodes: np.ndarray,
    policies: list[ReadingPolicy],
    kinds: np.ndarray | None = None,
    positions: np.ndarray | None = None,
    slots: np.ndarray | None = None,
) -> Plan:
    """The plan of rows that read under the policies with these indices: by default the first."""
    nodes = nodes.astype(np.int32)
    if positions is None:
        positions = forest.starts[nodes] + forest.lengths[nodes] - 1
    kinds = np.zeros_like(nodes) if kinds is None else kinds.astype(np.int32)
    slots = np.full(nodes.size, -1) if slots is None else slots
    withheld = withhold_blocks(forest, nodes, positions, kinds, policies, slots)
    if withheld is None:
        return plan(forest, nodes, positions, cost=COST)
    return add_choosing_units(plan(withheld.forest, withheld.row_nodes, positions, cost=COST), withheld)


def seen(made: Plan, row: int) -> list[tuple[int, int]]:
    """Position and slot of each key that a row of the plan sees, choosing units' candidates included, ascending."""
    keys = []
    for unit in range(made.num_units):
        if made.unit_rows[unit, 0] <= row < made.unit_rows[unit, 1]:
            for segment in range(*made.unit_segments[unit].tolist()):
                if made.segment_rows[segment, 0] <= row < made.segment_rows[segment, 1]:
                    within = np.arange(made.segment_lengths[segment])
                    positions = made.segment_positions[segment] + within
                    kept = positions <= made.row_positions[row]
                    slots = made.segment_starts[segment] + within
                    keys += zip(positions[kept].tolist(), slots[kept].tolist(), strict=True)
    return sorted(keys)


def path(forest: Forest, node: int, position: int) -> list[tuple[int, int]]:
    """The same for a row at a position of a node, by the forest."""
    keys: list[tuple[int, int]] = []
    while node >= 0:
        for extent in range(*forest.extent_offsets[node : node + 2].tolist()):
            within = np.arange(forest.extent_lengths[extent])
            positions = forest.positions[extent] + within
            keys += zip(positions.tolist(), (forest.extent_starts[extent] + within).tolist(), strict=True)
        node = int(forest.parents[node])
    return sorted(key for key in keys if key[0] <= position)


def random_forest(rng: np.random.Generator) -> Forest:
    """Up to 12 nodes of up to 600 keys in up to 3 extents that lie in any order."""
    size = int(rng.integers(1, 13))
    parents = np.maximum(np.arange(size) - rng.integers(1, 4, size), -1)
    counts = rng.integers(1, 4, size)
    extents = rng.integers(1, 200, int(counts.sum()))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    lengths = np.add.reduceat(extents, offsets[:-1])
    starts = np.zeros(size, np.int64)
    for node, parent in enumerate(parents.tolist()):
        starts[node] = starts[parent] + lengths[parent] if parent >= 0 else 0
    order, slots = rng.permutation(extents.size), np.empty(extents.size, np.int64)
    slots[order] = np.cumsum(extents[order] + rng.integers(0, 3, extents.size)) - extents[order]
    narrow = [array.astype(np.int32) for array in (parents, starts, lengths)]
    return Forest(*narrow, offsets, slots, extents.astype(np.int32))


@pytest.mark.parametrize("seed", range(30))
def test_plans_cover_each_path_once(seed: int) -> None:
    """Whatever rows read under: no key is lost or read twice, and blocks are neither recent, nor sinks, nor written."""
    rng = np.random.default_rng(seed)
    forest = random_forest(rng)
    nodes = rng.integers(0, forest.parents.size, int(rng.integers(1, 20)))
    positions = (forest.starts[nodes] + rng.integers(0, forest.lengths[nodes])).astype(np.int32)
    policies = [Exact(), TopBlocks(recent=40, sinks=9, budget=0.3), TopBlocks(recent=1, sinks=0, budget=0.1)]
    kinds, slots = rng.integers(0, 3, nodes.size), np.where(rng.random(nodes.size) < 0.5, -1, rng.integers(0, 900))
    made = make_plan(forest, nodes, policies, kinds, positions, slots)
    for row in range(made.num_rows):
        given = int(made.row_order[row])
        assert seen(made, row) == path(forest, int(nodes[given]), int(positions[given]))
    over = np.zeros(made.num_rows, np.int64)
    for unit in range(made.num_units):
        first, stop = made.unit_rows[unit].tolist()
        over[first:stop] += 1
        if not made.unit_blocks[unit]:
            continue
        candidates = candidate_blocks(made, unit)
        assert 0 < made.unit_blocks[unit] < candidates.size
        assert not np.isin(slots[slots >= 0] // BLOCK, candidates).any()
        segments = slice(*made.unit_segments[unit].tolist())
        ends = made.segment_positions[segments] + made.segment_lengths[segments]
        for row in range(first, stop):
            policy = policies[kinds[made.row_order[row]]]
            assert isinstance(policy, TopBlocks)
            assert made.segment_positions[segments].min() >= policy.sinks
            assert ends.max() <= made.row_positions[row] + 1 - policy.recent
    assert (over == made.row_extra + 1).all()


def test_chains_of_nodes_choose_together() -> None:
    """One row below 8 nodes of 200 keys has one choosing unit; a branch divides them into two."""
    size = 8
    lengths = np.full(size, 200, np.int32)
    starts = np.arange(size, dtype=np.int32) * 200
    offsets, slots = np.arange(size + 1), np.arange(size, dtype=np.int64) * 256
    forest = Forest(np.arange(-1, size - 1, dtype=np.int32), starts, lengths, offsets, slots, lengths)
    policy = TopBlocks(budget=0.25, recent=30, sinks=0)
    alone = make_plan(forest, np.array([size - 1]), [policy])
    assert np.count_nonzero(alone.unit_blocks) == 1
    assert int(alone.unit_blocks.max()) == -(-(3 * size - 1) // 4)
    branch = make_plan(forest, np.array([size - 1, 3]), [policy])
    assert sorted(np.diff(branch.unit_rows[branch.unit_blocks > 0], axis=1)[:, 0].tolist()) == [1, 2]


def test_mixed_policies_share_no_choice() -> None:
    forest, nodes = shared_forest(6, 900, 7)
    made = make_plan(forest, nodes, [Exact(), TopBlocks(recent=20)], np.array([0, 1, 0, 1, 1, 0]))
    (unit,) = np.flatnonzero(made.unit_blocks).tolist()
    assert sorted(made.row_order[slice(*made.unit_rows[unit].tolist())].tolist()) == [1, 3, 4]


def tensors(made: Plan, heads: tuple[int, int], dims: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, BlockBounds]:
    slots = -(-int((made.segment_starts + made.segment_lengths).max()) // BLOCK) * BLOCK
    generator = torch.Generator().manual_seed(1)
    q = 2 * torch.randn(made.num_rows, heads[0], dims[0], generator=generator)
    k = torch.randn(slots, heads[1], dims[0], generator=generator)
    v = torch.randn(slots, heads[1], dims[1], generator=generator)
    k[:, 0] *= 1.5
    bounds = BlockBounds([k])
    bounds.prepare(made)
    return q, k, v, bounds


CASES = [
    (1, 430, 0.4, (4, 2), (16, 16), None),
    (65, 900, 0.2, (2, 1), (16, 16), None),
    (3, 5000, 0.1, (6, 3), (24, 16), None),
    (2, 700, 0.6, (3, 3), (16, 24), 5.0),
]


@pytest.mark.parametrize(("rows", "prefix", "budget", "heads", "dims", "softcap"), CASES)
def test_kernels_equal_their_twin(rows, prefix, budget, heads, dims, softcap) -> None:
    triton_backend = pytest.importorskip("radixgen.kernels.triton_backend")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not triton_backend.runs_on(device):
        pytest.skip("needs a GPU or TRITON_INTERPRET=1")
    forest, nodes = shared_forest(rows, prefix, 9)
    made = make_plan(forest, nodes, [TopBlocks(budget=budget, recent=20, sinks=10)])
    assert made.selects
    q, k, v, bounds = tensors(made, heads, dims)
    (of_keys,) = bounds.layers
    expected = TorchAttention(made, None, CPU)(q, k, v, 0.3, softcap, None, of_keys)
    given = [tensor.to(device) for tensor in (q, k, v)]
    found = triton_backend.TritonAttention(made, None, device)(*given, 0.3, softcap, None, of_keys.to(device))
    for one, other in zip(found, expected, strict=True):
        assert float((one.cpu() - other).abs().max()) < 1e-5
    exact = TorchAttention(made.read_all(), None, CPU)(q, k, v, 0.3, softcap)
    assert float((exact[0] - expected[0]).abs().max()) > 1e-3


def test_kernels_at_fixed_addresses_take_other_plans() -> None:
    """As in a captured step: tables are loaded with a plan of other candidates, rows and positions."""
    triton_backend = pytest.importorskip("radixgen.kernels.triton_backend")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not triton_backend.runs_on(device):
        pytest.skip("needs a GPU or TRITON_INTERPRET=1")
    policy, static = TopBlocks(budget=0.3, recent=20, sinks=10), None
    positions = torch.zeros(4, dtype=torch.int64, device=device)
    for rows, prefix in ((3, 700), (4, 1100), (2, 500)):
        forest, nodes = shared_forest(rows, prefix, 9)
        made = make_plan(forest, nodes, [policy])
        q, k, v, bounds = tensors(made, (4, 2), (16, 16))
        (of_keys,) = bounds.layers
        expected = TorchAttention(made, None, CPU)(q, k, v, 0.3, bounds=of_keys)
        positions[:rows] = torch.from_numpy(made.row_positions.astype(np.int64))
        if static is None:
            static = triton_backend.TritonStaticAttention(made, None, positions, Workspace())
        assert static.load(made)
        padded = torch.cat([q, q.new_zeros(4 - rows, *q.shape[1:])]).to(device)
        found = static(padded, k.to(device), v.to(device), 0.3, bounds=of_keys.to(device))
        for one, other in zip(found, expected, strict=True):
            assert float((one[:rows].cpu() - other).abs().max()) < 1e-5


@pytest.mark.parametrize("rows", [1, 5, 9])
def test_compiled_loops_equal_their_twin(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """For up to 16 query-head rows; where there are more, nothing changes."""
    forest, nodes = shared_forest(rows, 5_000, 9)
    made = make_plan(forest, nodes, [TopBlocks(budget=0.1, recent=20, sinks=10)])
    q, k, v, bounds = tensors(made, (6, 2), (24, 16))
    found = TorchAttention(made, None, CPU)(q, k, v, 0.3, bounds=bounds.layers[0])
    monkeypatch.setattr(torch_blocks, "COMPILED", False)
    expected = TorchAttention(made, None, CPU)(q, k, v, 0.3, bounds=bounds.layers[0])
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).abs().max()) < 1e-5
    assert torch.equal(found[0], expected[0]) == (rows == 9)


def test_choosing_kernel_equals_its_twin() -> None:
    """With heads that want more than their room, ties, and the least and the most that can be chosen."""
    triton_backend = pytest.importorskip("radixgen.kernels.triton_backend")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not triton_backend.runs_on(device):
        pytest.skip("needs a GPU or TRITON_INTERPRET=1")
    from radixgen.kernels.block_kernels import choose_blocks as kernel

    rng = np.random.default_rng(0)
    for heads, count, chosen in [(3, 37, 5), (1, 3, 1), (4, 16, 15), (2, 70, 8), (5, 9, 4)]:
        for kind in ("spread", "focused", "tied"):
            weights = torch.from_numpy(rng.random((heads, count)).astype(np.float32))
            if kind == "focused":
                weights[0] += 10.0
            elif kind == "tied":
                weights = (weights * 3).floor()
            room, total = list_room(count, chosen), heads * chosen
            expected = choose_blocks(weights, total, room)
            choices = torch.tensor([[0, count, total, room, 2, 0, 0, 0]], dtype=torch.int32, device=device)
            counts = torch.tensor([0, 0, 0, 0, 1, 0, 0, 0], dtype=torch.int32, device=device)
            lists = torch.full((heads * (1 + room),), -1, dtype=torch.int32, device=device)
            names = torch.arange(100, 100 + count, dtype=torch.int32, device=device)
            parts = torch.stack([weights / 2, weights / 2]).to(device)
            kernel[(1,)](
                parts, names, choices, counts, lists, KV_HEADS=heads, HEADS=1 << (heads - 1).bit_length(),
                BLOCKS=128, PDL=False,
            )  # fmt: skip
            sizes, entries = lists[:heads].cpu(), lists[heads:].view(heads, room).cpu()
            assert sizes.tolist() == expected.sum(1).tolist()
            for head in range(heads):
                assert (entries[head, : sizes[head]] - 100).tolist() == expected[head].nonzero()[:, 0].tolist()


def test_choice_takes_the_greatest_within_its_room() -> None:
    weights = torch.tensor([[90.0, 50.0, 30.0, 20.0, 10.0], [0.1, 0.4, 0.2, 0.3, 0.2]])
    chosen = choose_blocks(weights, total=4, room=3)
    assert chosen.tolist() == [[True, True, True, False, False], [False, True, False, False, False]]
    assert choose_blocks(weights, total=4, room=2).sum(1).tolist() == [2, 1]
    assert choose_blocks(weights, 10, 5).all()


def test_bounds_are_bounds_of_scores() -> None:
    keys = torch.randn(8 * BLOCK, 2, 8)
    forest, nodes = shared_forest(1, 400, 3)
    bounds = BlockBounds([keys])
    made = make_plan(forest, nodes, [TopBlocks(recent=1, sinks=0, budget=0.5)])
    bounds.prepare(made)
    (unit,) = np.flatnonzero(made.unit_blocks).tolist()
    q = torch.randn(2, 3, 8)
    for block in candidate_blocks(made, unit).tolist():
        scores = torch.einsum("hrd,khd->hrk", q, keys[block * BLOCK : (block + 1) * BLOCK]).amax(-1)
        assert (block_scores(q, bounds.layers[0][block : block + 1])[..., 0] >= scores - 1e-5).all()


def test_bounds_follow_what_is_written() -> None:
    keys = torch.zeros(8 * BLOCK, 1, 4)
    bounds, (forest, nodes) = BlockBounds([keys]), shared_forest(1, 400, 3)
    assert bounds.of(0) is None
    made = make_plan(forest, nodes, [TopBlocks(recent=1, sinks=0)])
    bounds.prepare(made)
    keys += 1.0
    bounds.prepare(made)
    (unit,) = np.flatnonzero(made.unit_blocks).tolist()
    block = int(candidate_blocks(made, unit)[0])
    assert bounds.layers[0][block].unique().tolist() == [0.0]
    bounds.forget(np.array([-1, block * BLOCK + 3]))
    bounds.prepare(made)
    assert bounds.layers[0][block].unique().tolist() == [1.0]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_keys(dtype: torch.dtype) -> None:
    """Blocks of 8-bit keys are read as the same numbers in float32 are."""
    forest, nodes = shared_forest(2, 900, 5)
    made = make_plan(forest, nodes, [TopBlocks(recent=9, budget=0.3)])
    q, k, v, _ = tensors(made, (4, 2), (16, 16))
    pools = [allocate(len(k), 2, 16, dtype, CPU) for _ in range(2)]
    for pool, numbers in zip(pools, (k, v), strict=True):
        write(pool, torch.arange(len(k)), numbers)
    assert isinstance(pools[0], QuantizedKV) and quantize(k, dtype)[0].dtype == dtype
    bounds = BlockBounds([pools[0]])
    bounds.prepare(made)
    (of_keys,) = bounds.layers
    found = TorchAttention(made, None, CPU)(q, *pools, 0.3, bounds=of_keys)[0]
    plain = [read(pool, slice(None), torch.float32) for pool in pools]
    expected = TorchAttention(made, None, CPU)(q, *plain, 0.3, bounds=of_keys)[0]
    assert float((found - expected).abs().max()) < 1e-5


def test_everything_is_read_at_full_budget() -> None:
    forest, nodes = shared_forest(3, 700, 5)
    assert not make_plan(forest, nodes, [ALL]).selects


def test_a_needle_is_read() -> None:
    """One key of 6,000 takes nearly all attention of a head: its block is chosen, with 1/16 of all."""
    forest, nodes = shared_forest(1, 6_000, 5)
    made = make_plan(forest, nodes, [TopBlocks(budget=1 / 16)])
    q, k, v, _ = tensors(made, (4, 2), (32, 32))
    for head, slot in ((0, 1_234), (1, 4_321)):
        k[slot, head] = 4.0 * q[0, 2 * head : 2 * head + 2].mean(0)
    bounds = BlockBounds([k])
    bounds.prepare(made)
    exact, every = TorchAttention(made.read_all(), None, CPU)(q, k, v, 1.0)
    out, lse = TorchAttention(made, None, CPU)(q, k, v, 1.0, bounds=bounds.layers[0])
    assert float(unread_share(lse, every).max()) < 1e-3
    assert float((out - exact).abs().max()) < 1e-2


def test_a_layer_with_a_window_reads_all_of_it() -> None:
    forest, nodes = shared_forest(2, 900, 5)
    made = make_plan(forest, nodes, [TopBlocks(recent=9)])
    q, k, v, _ = tensors(made, (4, 2), (16, 16))
    found = TorchAttention(made, 500, CPU)(q, k, v, 0.3)[0]
    assert torch.equal(found, TorchAttention(made.read_all(), 500, CPU)(q, k, v, 0.3)[0])
    assert not torch.equal(found, TorchAttention(made.read_all(), None, CPU)(q, k, v, 0.3)[0])


def test_a_launch_without_choices_refuses_them() -> None:
    triton_backend = pytest.importorskip("radixgen.kernels.triton_backend")
    geometry = triton_backend.Geometry(2, 2, 16, 16, torch.float32)
    forest, nodes = shared_forest(1, 900, 5)
    made = make_plan(forest, nodes, [TopBlocks(recent=9)])
    launch = triton_backend.choose_launch(geometry, made.tile_rows, Chip(90, 3), block_rows=0)
    with pytest.raises(AssertionError):
        lay_out(made, launch, group=2, kv_heads=2)


@pytest.mark.parametrize("options", [{"budget": 0.0}, {"budget": 1.5}, {"budget": True}, {"recent": 0}, {"block": 32}])
def test_bad_policies_are_named(options: dict) -> None:
    (name,) = options
    with pytest.raises(InvalidRequest, match=f"reading.{name}"):
        TopBlocks(**options)


GREEDY = SamplingParams(temperature=0.0, max_tokens=6)


def answers(engine: Engine, prompts: list[list[int]], reading: ReadingPolicy) -> list[list[int]]:
    params = replace(GREEDY, reading=reading)
    return [output.outputs[0].token_ids for output in engine.generate(prompts, params)]


def prompts_of(count: int) -> list[list[int]]:
    rng = np.random.default_rng(3)
    shared = rng.integers(3, families.VOCAB, 220).tolist()
    return [shared + rng.integers(3, families.VOCAB, 7).tolist() for _ in range(count)]


def test_engine_at_full_budget_is_exact() -> None:
    with Engine(families.build("llama"), kv_tokens=1024, attention="torch", debug=True) as engine:
        prompts = prompts_of(3)
        assert answers(engine, prompts, ALL) == answers(engine, prompts, Exact())


def test_engine_reads_less_and_layers_and_heads_choose_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Tensor] = []

    def record(weights: Tensor, total: int, room: int) -> Tensor:
        chosen.append(choose_blocks(weights, total, room))
        return chosen[-1]

    monkeypatch.setattr(torch_blocks, "COMPILED", False)
    monkeypatch.setattr(torch_blocks, "choose_blocks", record)
    with Engine(families.build("llama"), kv_tokens=1024, attention="torch", debug=True) as engine:
        prompts = prompts_of(3)
        answers(engine, prompts, Exact())
        before = engine.stats()
        answers(engine, prompts, Exact())
        between = engine.stats()
        answers(engine, prompts, TopBlocks(budget=0.3, recent=8, sinks=4))
        after = engine.stats()
        engine.check()
    assert after.kv_bytes_read - between.kv_bytes_read < 0.8 * (between.kv_bytes_read - before.kv_bytes_read)
    layers = families.HEADS["num_hidden_layers"]
    steps = [chosen[first : first + layers] for first in range(0, len(chosen), layers)]
    assert any(not torch.equal(step[0], step[1]) for step in steps)
    assert any(not torch.equal(mask[0], mask[1]) for mask in chosen)


def test_engine_gives_the_same_tokens_with_kernels() -> None:
    """In captured steps, which are kept apart from those of other plans."""
    triton_backend = pytest.importorskip("radixgen.kernels.triton_backend")
    if not triton_backend.runs_on(CPU) or torch.cuda.is_available():
        pytest.skip("needs TRITON_INTERPRET=1")
    params = SamplingParams(temperature=0.0, max_tokens=3, reading=TopBlocks(budget=0.3, recent=1, sinks=0))
    found = []
    for attention in ("torch", "triton"):
        with Engine(families.build("llama"), kv_tokens=256, attention=attention, debug=True) as engine:
            found.append(engine.generate(prompts_of(1)[0][:150], params)[0].outputs[0].token_ids)
            assert engine._model.storage.bounds.layers
    assert found[0] == found[1]
