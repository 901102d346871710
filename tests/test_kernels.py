"""The Triton kernels against float64 attention and against their plain twins: on a GPU where there is one, else in
Triton's interpreter.
"""

from dataclasses import replace

import families
import numpy as np
import pytest
import torch
from sizes import EVERYTHING, pairs
from test_attention import Case, error, poison, random_case, random_tree, reference, tensors
from test_exactness import Oracle, greedy, prompts
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from radixgen import Engine, TreeAttention
from radixgen.core import Chunk, Plan
from radixgen.kernels.assignment import assign, makespan
from radixgen.kernels.backend import backend
from radixgen.kernels.chip import Chip
from radixgen.kernels.geometry import Geometry
from radixgen.kernels.work import TABLES, Launch, Work, lay_out
from radixgen.kernels.workspace import Workspace
from radixgen.model import graphs
from radixgen.scheduler.cost import CostModel, TileCost
from radixgen.scheduler.forest import Forest
from radixgen.scheduler.planner import plan

pytest.importorskip("triton")
from radixgen.kernels import triton_backend

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE.type == "cuda" else [])
COST = CostModel(tiles=(TileCost(16, 60.0, 1.0), TileCost(64, 70.0, 1.2)), partial=0.1, programs=7, mix=True)
WIDE = CostModel(
    tiles=(TileCost(16, 60.0, 1.0, 2.0), TileCost(64, 70.0, 1.2, 2.4), TileCost(128, 20.0, 1.3, 2.6)),
    partial=0.1, programs=3, least_run=128, mix=True,
)  # fmt: skip
MASKS = [(None, None, False), (1, None, False), (70, None, True), (None, 20.0, True), (Chunk(70), None, False)]
HEADS = [
    ((2, 2), (64, 64)), ((6, 2), (80, 80)), ((3, 1), (96, 96)), ((16, 1), (128, 128)), ((2, 1), (192, 128)),
    ((2, 1), (256, 256)), ((20, 1), (16, 32)), ((1, 1), (7, 5)),
]  # fmt: skip


def attend(
    case: Case, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, **options
) -> tuple[Tensor, Tensor]:
    attn = TreeAttention(case.parents, case.extents, case.row_nodes, case.row_positions, attention="triton", **options)
    out, lse = attn(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), sinks=None if sinks is None else sinks.to(DEVICE))
    return out.cpu(), lse.cpu()


def check(
    case: Case, heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype, *, bits: bool = EVERYTHING, **options
) -> None:
    """Within tolerance of float64 with NaN in slots on no row's path; `bits`: the same bits whatever stands there."""
    q, k, v = tensors(case, heads, dims, dtype)
    sinks = torch.randn(heads[0]) if options.pop("sinks", False) else None
    window, softcap = options.get("window"), options.get("softcap")
    expected, expected_lse = reference(
        case, q, k, v, scale=dims[0] ** -0.5, dtype=torch.float64, window=window, softcap=softcap, sinks=sinks
    )
    clean = attend(case, q, k, v, sinks, **options) if bits else None
    poison(case, None, k, v)
    out, lse = attend(case, q, k, v, sinks, **options)
    assert clean is None or (torch.equal(out, clean[0]) and torch.equal(lse, clean[1]))
    assert out.dtype == dtype
    assert error(out, expected) < TOLERANCE[dtype]
    assert error(lse, expected_lse) < TOLERANCE[dtype]


@pytest.mark.parametrize(("shape", "mode", "dtype"), pairs(HEADS, ["auto", "naive"], DTYPES, everything=EVERYTHING))
def test_head_shapes(shape, mode, dtype) -> None:
    heads, dims = shape
    rng = np.random.default_rng(11 + heads[0])
    parents, lengths = random_tree(rng, nodes=9, longest=150)
    rows = 17 if EVERYTHING else 7
    check(random_case(rng, lengths, parents, rows), heads, dims, dtype, mode=mode, cost=COST)


@pytest.mark.parametrize(("masks", "mode", "dtype"), pairs(MASKS, ["auto", "naive"], DTYPES, everything=EVERYTHING))
def test_masks(masks, mode, dtype) -> None:
    window, softcap, sinks = masks
    rng = np.random.default_rng(3 if EVERYTHING else 6)  # either tree has runs that are copied in bulk
    parents, lengths = random_tree(rng, nodes=14 if EVERYTHING else 9, longest=300)
    case = random_case(rng, lengths, parents, rows=33 if EVERYTHING else 11)
    check(
        case, (6, 2), (64, 64), dtype, bits=True, mode=mode, cost=COST, window=window, softcap=softcap, sinks=sinks
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "length", "mode", "dtype"),
    pairs([1, 3, 17, 65], [0, 1, 63, 64, 65, 257], ["naive", "unshared"], DTYPES[::-1], everything=EVERYTHING),
)
def test_sizes(rows: int, length: int, mode, dtype) -> None:
    """A shared node of `length` keys in one extent, and leaves of a few keys."""
    leaves = 5
    parents = [-1] + [0] * leaves
    extents = [[(3, length)]] + [[(length + 10 * leaf + 4, leaf + 1)] for leaf in range(leaves)]
    nodes = [1 + row % leaves for row in range(rows)]
    case = Case(parents, extents, nodes, None, length + 80)
    check(case, (8, 2) if EVERYTHING else (4, 1), (64, 64), dtype, mode=mode, cost=COST)


@pytest.mark.parametrize(
    ("mode", "dtype", "window"),
    pairs(["auto", "naive", "unshared"], DTYPES, [None, 300, Chunk(300)], everything=EVERYTHING),
)
def test_a_long_extent(mode, dtype, window) -> None:
    """Copied in bulk: whole, or from within where a window of the last rows begins."""
    case = Case([-1, 0, 0], [[(5, 4097)], [(4200, 70)], [(4300, 1)]], [1, 2, 2], None, 4400)
    check(case, (4, 1), (128, 128), dtype, mode=mode, cost=COST, window=window)


def test_a_span_has_its_own_diagonal() -> None:
    """Rows at every position of a node, as in prefill, above 200 cached keys."""
    case = Case([-1, 0], [[(0, 200)], [(250, 150)]], [1] * 150, list(range(200, 350)), 450)
    for window in (None, 40, Chunk(40)):
        check(case, (4, 2) if EVERYTHING else (2, 1), (64, 64), torch.float32, cost=COST, window=window)


def leaves_and_span(rows: int) -> tuple[Case, Case]:
    """A prefix, part of it private to some, under leaves of a few keys with a row each; and a span of a prompt."""
    parents = [-1, 0, 0] + [1 + leaf % 2 for leaf in range(rows)]
    extents = [[(3, 260), (300, 150)], [(460, 70)], [(540, 1)]]
    extents += [[(600 + 9 * leaf, 1 + leaf % 7)] for leaf in range(rows)]
    leaves = Case(parents, extents, list(range(3, 3 + rows)), None, 620 + 9 * rows)
    return leaves, Case([-1, 0], [[(0, 140)], [(150, rows)]], [1] * rows, list(range(140, 140 + rows)), 170 + rows)


@pytest.mark.parametrize(
    ("heads", "mode", "masks"),
    [
        ((8, 2), "auto", MASKS[0]),
        ((20, 2), "naive", (None, None, True)),
        *(pairs([(8, 2), (20, 2), (128, 4)], ["auto", "naive"], MASKS, everything=True) if EVERYTHING else []),
    ],
)
def test_wide_tiles(heads: tuple[int, int], mode, masks) -> None:
    window, softcap, sinks = masks
    cost = replace(WIDE, group=heads[0] // heads[1])
    for case in leaves_and_span(150 * heads[1] // heads[0]):
        attn = TreeAttention(case.parents, case.extents, case.row_nodes, case.row_positions, mode=mode, cost=cost)
        assert attn.plan.tile_rows == 128 and np.diff(attn.plan.unit_rows).max() * cost.group > 64
        options = {"mode": mode, "cost": cost, "window": window, "softcap": softcap, "sinks": sinks}
        check(case, heads, (128, 128), DTYPES[-1], **options)


@pytest.mark.parametrize("static", [False, True])
def test_layers_with_a_soft_cap_and_without_over_the_same_plan(static: bool) -> None:
    """The launch of wide tiles knows no soft cap, so that layers of both kinds have tables of their own."""
    case, _ = leaves_and_span(40)
    plan = TreeAttention(case.parents, case.extents, case.row_nodes, case.row_positions, cost=WIDE).plan
    q, k, v = (tensor.to(DEVICE) for tensor in tensors(case, (4, 1), (128, 128), torch.float16))
    positions = torch.from_numpy(plan.row_positions.astype(np.int64)).to(DEVICE)

    def prepared():
        if static:
            return triton_backend.TritonStaticAttention(plan, None, positions, Workspace())
        return triton_backend.TritonAttention(plan, None, DEVICE)

    shared = prepared()
    for softcap in (None, 2.0, None):
        assert torch.equal(shared(q, k, v, 0.1, softcap)[0], prepared()(q, k, v, 0.1, softcap)[0])


def test_each_class_of_tiles_has_a_launch() -> None:
    hopper, geometry = Chip(90, 132), Geometry(8, 4, 128, 128, torch.bfloat16)
    if not triton_backend.takes_wide(geometry, hopper):
        pytest.skip("this version of Triton does not compile the kernel")
    found = triton_backend.choose_launch(geometry, 128, hopper)
    assert [one.rows for one in found.classes] == [16, 64, 128]
    assert [one.hopper for one in found.classes] == [False, False, True] and found.classes[-1].programs == 132
    for launch in (
        triton_backend.choose_launch(geometry, 64, hopper),
        triton_backend.choose_launch(geometry, 128, hopper, windowed=True),
        triton_backend.choose_launch(geometry, 128, hopper, capped=True),
        triton_backend.choose_launch(geometry, 128, Chip(80, 108)),
        triton_backend.choose_launch(replace(geometry, head_dim=64, v_head_dim=64), 128, hopper),
    ):
        assert [one.rows for one in launch.classes] == [16, 64] and not any(one.hopper for one in launch.classes)


def test_a_row_without_keys() -> None:
    case = Case([-1, -1], [[(0, 0)], [(8, 40)]], [0, 1], None, 64)
    q, k, v = tensors(case, (2, 1), (64, 64), torch.float32)
    out, lse = attend(case, q, k, v)
    assert not out[0].any() and lse[0].isneginf().all()
    assert out[1].isfinite().all() and lse[1].isfinite().all()
    out, lse = attend(Case([-1], [[]], [0], None, 64), q[:1], k, v)
    assert not out.any() and lse.isneginf().all()


def test_two_runs_agree_bit_for_bit() -> None:
    rng = np.random.default_rng(1)
    parents, lengths = random_tree(rng, nodes=30 if EVERYTHING else 12, longest=200)
    case = random_case(rng, lengths, parents, rows=40 if EVERYTHING else 17)
    q, k, v = tensors(case, (4, 2), (64, 64), DTYPES[-1])
    first, again = (attend(case, q, k, v, mode="naive") for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize(("heads", "dims"), [((2, 1), (257, 16)), ((129, 1), (16, 16))])
def test_other_shapes_go_to_torch(heads, dims) -> None:
    rng = np.random.default_rng(0)
    parents, lengths = random_tree(rng, nodes=5, longest=50)
    check(random_case(rng, lengths, parents, rows=4), heads, dims, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kv_heads", "dims"), [(1, (64, 64)), (3, (80, 33)), (8, (128, 128))])
def test_writes_equal_their_twin(kv_heads, dims, dtype) -> None:
    slots = np.array([7, -1, 0, 30, -1, 8], np.int64)
    key = torch.randn(kv_heads, 6, dims[0], dtype=dtype, device=DEVICE).transpose(0, 1)
    value = torch.randn(6, kv_heads, dims[1], dtype=dtype, device=DEVICE)
    pools = []
    for name in ("torch", "triton"):
        k = torch.zeros(32, kv_heads, dims[0], dtype=dtype, device=DEVICE)
        v = torch.zeros(32, kv_heads, dims[1], dtype=dtype, device=DEVICE)
        backend(name, DEVICE).kv_writer(slots, DEVICE)(key, value, k, v)
        pools.append((k, v))
    assert torch.equal(pools[0][0], pools[1][0]) and torch.equal(pools[0][1], pools[1][1])
    assert pools[0][0][7].any() and not pools[0][0][1].any()


@pytest.mark.parametrize(("items", "programs"), [(1, 7), (7, 7), (100, 7), (2_000, 132)])
def test_schedule_is_complete_and_even(items: int, programs: int) -> None:
    costs = np.random.default_rng(items).exponential(1.0, items)
    offsets, queue = assign(costs, programs)
    assert sorted(queue.tolist()) == list(range(items))
    loads = [costs[queue[a:b]].sum() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    assert max(loads) <= costs.sum() / programs + costs.max()


def time_of(*launches: tuple[list[float], int, float], copies: int = 1) -> float:
    """`makespan` of launches, the first one first: costs, programs, and how much slower all of them are."""
    costs, programs, slowed = zip(*launches[::-1], strict=True)
    of = np.repeat(np.arange(len(launches)), [len(part) for part in costs])
    return makespan(np.concatenate(costs), of, np.array(programs), np.array(slowed), copies)


def test_a_launch_begins_where_the_one_before_it_ends() -> None:
    """Three programs of one launch, six of the next."""
    wide, narrow = ([9.0, 4.0], 3, 1.0), ([1.0] * 10, 6, 1.0)
    assert time_of(wide, narrow) == 9.0 and time_of(wide, ([1.0] * 100, 6, 1.0)) == 21.0
    assert time_of(wide, narrow, copies=3) == 13.0 + 5.0


def test_few_programs_are_not_slowed_by_memory() -> None:
    """Memory for two of four programs: two take no longer than one, four take twice as long."""
    for items, time in ((1, 10.0), (2, 10.0), (4, 20.0)):
        assert time_of(([10.0] * items, 4, 2.0)) == time
    assert time_of(([10.0, 10.0, 10.0, 30.0], 4, 2.0)) == 40.0


def laid_out(rows: int, keys: int) -> tuple[Plan, Launch, Work]:
    """A plan of leaves with a row each beside a node with `rows` rows, for the launch of its widest tiles."""
    parents, lengths = np.full(41, -1, np.int32), np.append(np.arange(1, 41), keys).astype(np.int32)
    starts, extents = np.zeros(41, np.int32), np.cumsum(lengths) - lengths
    forest = Forest(parents, starts, lengths, np.arange(42), extents.astype(np.int64), lengths)
    nodes = np.append(np.arange(40), np.full(rows, 40)).astype(np.int32)
    made = plan(forest, nodes, (lengths - 1)[nodes], mode="unshared", cost=replace(WIDE, group=4))
    geometry = Geometry(2, 4, 128, 128, torch.float16)
    launch = triton_backend.choose_launch(geometry, made.tile_rows, Chip(90, 3))
    return made, launch, lay_out(made, launch, group=4, kv_heads=2)


def test_items_are_sorted_by_class_and_cost() -> None:
    _, launch, work = laid_out(rows=70, keys=50)
    tables = dict(zip(TABLES, work.tables, strict=True))
    bounds = tables["bounds"][: len(launch.classes) + 1]
    items = tables["items"][: 9 * bounds[-1]].reshape(-1, 9)
    assert [one.rows for one in launch.classes] == [16, 64, 128] and work.used == (True, True, True)
    for kind, shape in enumerate(launch.classes):
        rows = 4 * items[bounds[kind] : bounds[kind + 1], 1]
        assert (rows <= shape.rows).all() and (not kind or (rows > launch.classes[kind - 1].rows).all())
    gathered = np.diff(items[: bounds[1], 4:6], axis=1)[:, 0]
    assert gathered.size == 40 and (np.diff(gathered) <= 0).all()
    queue = tables["queue"][tables["queue"] >= 0]
    assert sorted(queue.tolist()[: 2 * int(bounds[3] - bounds[2])]) == list(range(2 * bounds[2], 2 * bounds[3]))


def test_programs_take_what_is_left_in_turn() -> None:
    """More items than programs, again and again over the same tables: the last one resets the tickets."""
    made, launch, _ = laid_out(rows=3, keys=9)
    assert launch.classes[0].programs < 2 * 40
    slots = int((made.segment_starts + made.segment_lengths).max())
    q = torch.randn(made.num_rows, 8, 128, device=DEVICE, dtype=torch.float16)
    k, v = torch.randn(2, slots, 2, 128, device=DEVICE, dtype=torch.float16)
    positions = torch.from_numpy(made.row_positions).long().to(DEVICE)
    static = triton_backend.TritonStaticAttention(made, None, positions, Workspace())
    first = [one.clone() for one in static(q, k, v, 0.1)]
    again = static(q, k, v, 0.1)
    expected = backend("torch", DEVICE).attention(made, None, DEVICE)(q.float(), k.float(), v.float(), 0.1)
    assert all(map(torch.equal, first, again)) and error(first[0], expected[0]) < TOLERANCE[torch.float16]
    assert not any(tables.tickets.any() for tables in static._tables.values())


def test_every_supported_geometry_has_a_launch() -> None:
    for group in (1, 3, 16, 17, 64, 71, 128):
        for dtype in DTYPES:
            geometry = Geometry(2, group, 128, 128, dtype)
            for rows in (1, 64):
                launch = triton_backend.choose_launch(geometry, 200, Chip.of(DEVICE), rows=rows)
                assert launch.classes[-1].rows >= group


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss"])
def test_an_engine_answers_as_transformers_does(name: str) -> None:
    """Prefill in chunks, decode and a pool that always evicts, through the kernels' plans."""
    oracle, served = Oracle(families.build(name).to(DEVICE)), families.build(name).to(DEVICE)
    asked = prompts(families.VOCAB)[:3]
    with Engine(served, attention="triton", max_step_tokens=24, kv_tokens=160, debug=True) as engine:
        for prompt, output in zip(asked, engine.generate(asked, greedy(5)), strict=True):
            oracle.expect(engine, prompt, output.outputs[0].token_ids, 5)
        engine.check()
    oracle.settle()


def test_a_static_attention_answers_every_plan_that_is_loaded() -> None:
    """The same tables, loaded with plan after plan; where lengths only grew, nothing is laid out anew."""
    rng = np.random.default_rng(5)
    static = None
    positions = torch.zeros(64, dtype=torch.int64, device=DEVICE)
    for rows in (30, 9, 40) if EVERYTHING else (11, 5, 17):
        parents, lengths = random_tree(rng, nodes=12, longest=90)
        case = random_case(rng, lengths, parents, rows=rows)
        q, k, v = (tensor.to(DEVICE) for tensor in tensors(case, (4, 2), (64, 64), torch.float32))
        attn = TreeAttention(
            case.parents, case.extents, case.row_nodes, case.row_positions, attention="triton", cost=COST, window=50
        )
        expected, expected_lse = attn(q, k, v)
        made = replace(attn.plan, tile_rows=64)
        order = torch.from_numpy(attn.plan.row_order).to(DEVICE)
        positions[:rows] = torch.from_numpy(attn.plan.row_positions).to(DEVICE)
        padded = torch.zeros(64, *q.shape[1:], device=DEVICE)
        padded[:rows] = q[order]
        if static is None:
            static = triton_backend.TritonStaticAttention(made, 50, positions, Workspace())
        else:
            assert static.load(made)
        out, lse = static(padded, k, v, 64**-0.5)
        assert not out[rows:].any()
        assert error(out[:rows], expected[order]) < 1e-6 and error(lse[:rows], expected_lse[order]) < 1e-6


@pytest.mark.parametrize("window", [None, 5, 60])
@pytest.mark.parametrize("mode", ["auto", "naive"])
def test_rows_move_on_over_the_same_tables(mode, window) -> None:
    """Leaves grow into their rooms, which hold NaN until then: as if each step had been laid out anew."""
    leaves, steps = np.array([3, 40, 1, 17, 130, 9], np.int32), 6
    lengths = np.concatenate([[150], leaves]).astype(np.int32)
    starts = np.concatenate([[0], np.full(leaves.size, 150)]).astype(np.int32)
    rooms = np.concatenate([[0], steps + np.arange(leaves.size)]).astype(np.int32)
    extents = np.cumsum(np.concatenate([[2], (lengths + rooms)[:-1]])).astype(np.int64)
    parents, nodes = np.minimum(np.arange(7) - 1, 0).astype(np.int32), np.arange(1, 7).astype(np.int32)
    forest = Forest(parents, starts, lengths, np.arange(8), extents, lengths, rooms)
    made = plan(forest, nodes, (starts + lengths - 1)[nodes], mode=mode, cost=COST)
    assert made.slack == steps and made.growing.size == leaves.size
    heads, kv_heads = (6, 2) if EVERYTHING else (3, 1)
    q = torch.randn(leaves.size, heads, 64, device=DEVICE)
    full = torch.randn(2, int(extents[-1]) + 160, kv_heads, 64, device=DEVICE)
    pools = full.clone()
    for begin, length, room in zip(extents, lengths, rooms, strict=True):
        pools[:, begin + length : begin + length + room] = float("nan")
    positions = torch.from_numpy(made.row_positions).long().to(DEVICE)
    static = triton_backend.TritonStaticAttention(made, window, positions, Workspace())
    looked_at = range(steps + 1) if EVERYTHING else (0, 1, steps)
    for step in range(steps + 1):
        if step:
            made = made.advance()
            assert static.load(made)
            positions += 1
            reached = torch.from_numpy((extents + lengths)[1:] + step - 1).to(DEVICE)
            pools[:, reached] = full[:, reached]
        if step not in looked_at:
            continue
        out, lse = static(q, *pools, 0.125)
        expected, expected_lse = backend("torch", DEVICE).attention(made, window, DEVICE)(q, *pools, 0.125)
        assert error(out, expected) < 1e-5 and error(lse, expected_lse) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma2"] if EVERYTHING else ["gemma2"])
def test_captured_steps_give_the_tokens_of_eager_ones(name: str) -> None:
    """With requests that come and go, so that graphs of several sizes are made, outgrown and used again."""
    asked = prompts(families.VOCAB)[:4]
    params = [greedy(3 + 3 * (i % 2)) for i in range(len(asked))]
    with Engine(families.build(name).to(DEVICE), attention="triton", enforce_eager=True, kv_tokens=512) as engine:
        expected = [output.outputs[0].token_ids for output in engine.generate(asked, params)]
    with Engine(families.build(name).to(DEVICE), attention="triton", kv_tokens=512, debug=True) as engine:
        assert [output.outputs[0].token_ids for output in engine.generate(asked, params)] == expected
        engine.check()
        assert engine.stats().failed_captures == 0


def test_prompts_are_computed_by_captured_steps_too(monkeypatch) -> None:
    """Also beside sequences that decode, with logits for few of the rows."""
    monkeypatch.setattr(graphs, "_FINE", 8)
    monkeypatch.setattr(graphs, "FEW_LOGITS", 8)
    asked = [[*range(5, 45)], [*range(5, 25), 7], [9, 8, 7]]

    def answers(engine: Engine) -> list[list[int]]:
        engine.submit(asked[0], greedy(20))
        for _ in range(4):
            engine.step()
        return [output.outputs[0].token_ids for output in engine.generate(asked[1:], greedy(6))]

    with Engine(families.build("llama").to(DEVICE), attention="triton", enforce_eager=True, kv_tokens=512) as engine:
        expected = answers(engine)
    with Engine(families.build("llama").to(DEVICE), attention="triton", kv_tokens=512, debug=True) as engine:
        assert answers(engine) == expected
        engine.check()
        sizes = set(engine._model._graphs._graphs)
        assert engine.stats().failed_captures == 0
    assert {(128, 8), (1, 1)} <= {(size.rows, size.logits) for size in sizes}


class Traced(TorchDispatchMode):
    """The operators of PyTorch that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="stands a plain function in for the graph's replay")
def test_where_lengths_grow_a_step_allocates_nothing(monkeypatch) -> None:
    """Before the graph is replayed, only the inputs are filled in, where they lie."""
    with Engine(families.build("llama"), attention="triton", kv_tokens=512) as engine:
        for index in range(3):
            engine.submit([5, 6, index], greedy(60))
        graphs = engine._model._graphs
        while not engine._core.ahead.pending or engine._core.planner.last.slack < 2:
            engine.step()
        plan, logits = engine._core.planner.last.advance(), torch.zeros(4, families.VOCAB)
        for graph in graphs._graphs.values():
            monkeypatch.setattr(graph, "replay", lambda: logits)
        monkeypatch.setattr(triton_backend, "lay_out", lambda *_: pytest.fail("laid out anew"))
        tokens, rows = torch.tensor([7, 8, 9]), np.arange(3)
        with Traced() as traced:
            assert graphs.run_ahead(plan, tokens, rows, rows) is not None
        assert traced.names <= {"index_copy_", "slice", "select"}


def test_a_model_that_can_not_be_captured_runs_eagerly(monkeypatch, caplog) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("no kernel")

    monkeypatch.setattr(triton_backend.TritonStaticAttention, "__call__", refuse)
    with Engine(families.build("llama").to(DEVICE), attention="triton", kv_tokens=256) as engine:
        assert len(engine.generate([[1, 2, 3]], greedy(4))[0].outputs[0].token_ids) == 4
        assert engine.stats().failed_captures == 1
    assert "runs without CUDA graphs from now on: no kernel" in caplog.text


def test_a_size_that_can_not_be_captured_leaves_the_others_alone(monkeypatch, caplog) -> None:
    """Steps of one sequence are replayed, those of two run eagerly."""
    asked, attend = [[1], [3]], triton_backend.TritonStaticAttention.__call__
    with Engine(families.build("llama").to(DEVICE), attention="triton", kv_tokens=256) as engine:
        expected = [output.outputs[0].token_ids for output in engine.generate(asked, greedy(4))]

    def refuse(self, q: Tensor, *arguments: object) -> object:
        if q.shape[0] == 2:
            raise ValueError("no memory")
        return attend(self, q, *arguments)

    monkeypatch.setattr(triton_backend.TritonStaticAttention, "__call__", refuse)
    with Engine(families.build("llama").to(DEVICE), attention="triton", kv_tokens=256) as engine:
        engine.generate([[5]], greedy(4))
        assert [output.outputs[0].token_ids for output in engine.generate(asked, greedy(4))] == expected
        assert engine.stats().failed_captures == 1 and engine._model._graphs.usable
    assert "steps like one of 2 rows run without CUDA graphs" in caplog.text
