"""The `flash` backend with plain twins in place of the flash-attn package, against float64 attention."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import invalidate_caches
from pathlib import Path
from textwrap import dedent
from typing import Any

import families
import numpy as np
import pytest
import torch
from sizes import EVERYTHING, pairs
from test_attention import (
    CHEAP_UNITS,
    MASKS,
    MIXED,
    MODES,
    Case,
    error,
    first_key,
    poison,
    random_case,
    random_tree,
    reference,
    tensors,
)
from test_exactness import Oracle, greedy, prompts
from torch import Tensor

from radixgen import Engine, TreeAttention, calibration
from radixgen.core import Chunk, InvalidRequest, Window
from radixgen.kernels import flash_backend, torch_backend
from radixgen.kernels.backend import backend
from radixgen.kernels.flash_backend import (
    CheapestAttention,
    FlashCost,
    FlashPackage,
    MergeTables,
    attend_reference,
    backend_with_flash,
)
from radixgen.kernels.geometry import Geometry
from radixgen.kernels.varlen_runs import split
from radixgen.scheduler.cost import CostModel, TileCost

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Recorder:
    """A twin that counts, and that reads `beyond` keys past each sequence as a kernel of whole blocks does."""

    def __init__(self, beyond: int) -> None:
        self.beyond = beyond
        self.calls: list[tuple[int, bool]] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *lengths: int, **options: Any):
        assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q[0] == cu_k[0] == 0
        assert cu_q[-1] == len(q) and cu_k[-1] <= len(k)
        self.calls.append((int((cu_q.diff() > 0).sum()), options["causal"]))
        out, lse = attend_reference(q, k, v, cu_q, cu_k, *lengths, **options)
        for row, row_end, end in zip(cu_q, cu_q[1:], cu_k[1:], strict=False):
            out[row:row_end] += 0 * v[end : end + self.beyond].sum()
        return out, lse


BEYOND = [0, 256]
"""Keys that a twin reads past each sequence: with none the pool is read in place, else its keys are packed."""


@pytest.fixture(params=BEYOND, ids=["in place", "packed"])
def twin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder(request.param)
    package = FlashPackage("twin", recorder, request.param, FLOATS, 1)
    monkeypatch.setattr(flash_backend, "load", lambda device: package)
    monkeypatch.setattr(flash_backend, "runs_on", lambda device: True)
    return recorder


def made(case: Case, **options: Any) -> TreeAttention:
    return TreeAttention(case.parents, case.extents, case.row_nodes, case.row_positions, attention="flash", **options)


def check(case: Case, heads: tuple[int, int], dims: tuple[int, int], sinks: bool = False, **options: Any) -> None:
    """Equal to float64, and the same bits whatever stands in slots that no row may see."""
    q, k, v = tensors(case, heads, dims, torch.float32)
    logits = torch.randn(heads[0]) if sinks else None
    masks = {"window": options.get("window"), "softcap": options.get("softcap")}
    expected, expected_lse = reference(case, q, k, v, scale=dims[0] ** -0.5, dtype=torch.float64, sinks=logits, **masks)
    attn = made(case, **options)
    clean, clean_lse = attn(q, k, v, sinks=logits)
    poison(case, masks["window"], k, v)
    out, lse = attn(q, k, v, sinks=logits)
    assert torch.equal(out, clean) and torch.equal(lse, clean_lse)
    assert error(out, expected) < 1e-6
    assert error(lse, expected_lse) < 1e-6


@pytest.mark.parametrize(
    ("twin", "way", "masks", "shape"),
    pairs(BEYOND, MODES, MASKS, [((9, 3), 64), ((4, 4), 63), ((8, 1), 129)]),
    indirect=["twin"],
)
def test_equals_float64(twin: Recorder, way, masks, shape) -> None:
    (mode, cost), (window, softcap, sinks), (heads, dim) = way, masks, shape
    rng = np.random.default_rng(7)
    parents, lengths = random_tree(rng, nodes=23, longest=300)
    case = random_case(rng, lengths, parents, rows=37)
    check(case, heads, (dim, dim), sinks, mode=mode, cost=cost, window=window, softcap=softcap)
    assert twin.calls or window is not None


@pytest.mark.parametrize(
    ("twin", "masks", "mode"),
    pairs(
        BEYOND,
        [(None, None, False), (70, None, True), (None, 20.0, True), (Chunk(70), None, False)],
        ["auto", "naive"],
        everything=EVERYTHING,
    ),
    indirect=["twin"],
)
def test_with_our_kernels_for_the_rest(twin: Recorder, monkeypatch: pytest.MonkeyPatch, masks, mode) -> None:
    window, softcap, sinks = masks
    pytest.importorskip("triton")
    monkeypatch.setattr(flash_backend, "backend", lambda name, device: backend("triton", device))
    rng = np.random.default_rng(3)
    parents, lengths = random_tree(rng, nodes=14 if EVERYTHING else 9, longest=300)
    case = random_case(rng, lengths, parents, rows=33 if EVERYTHING else 11)
    q, k, v = (tensor.to(DEVICE) for tensor in tensors(case, (6, 2), (64, 64), torch.float16))
    logits = torch.randn(6, device=DEVICE) if sinks else None
    expected, expected_lse = reference(
        case, q.cpu(), k.cpu(), v.cpu(), scale=0.125, dtype=torch.float64, window=window, softcap=softcap,
        sinks=logits if logits is None else logits.cpu(),
    )  # fmt: skip
    poison(case, None, k, v)
    out, lse = made(case, mode=mode, cost=MIXED, window=window, softcap=softcap)(q, k, v, sinks=logits)
    assert error(out.cpu(), expected) < 2e-3 and error(lse.cpu(), expected_lse) < 2e-3
    assert twin.calls


@pytest.mark.parametrize(("twin", "depth", "way"), pairs(BEYOND, [1, 2, 17, 64], MODES), indirect=["twin"])
def test_depths(twin: Recorder, depth: int, way) -> None:
    mode, cost = way
    rng = np.random.default_rng(depth)
    parents = [-1, *range(depth - 1)] + list(range(depth))
    lengths = [int(rng.integers(1, 40)) for _ in range(2 * depth)]
    check(random_case(rng, lengths, parents, rows=max(depth, 3)), (4, 2), (32, 32), mode=mode, cost=cost)


@pytest.mark.parametrize("rows", [1, 3, 17, 65])
@pytest.mark.parametrize("length", [0, 1, 63, 64, 257])
@pytest.mark.parametrize("mode", ["naive", "unshared"])
def test_a_shared_node_is_one_sequence(twin: Recorder, rows: int, length: int, mode) -> None:
    """However many tiles hold its rows, and whether the plan cuts or folds it."""
    leaves = 5
    parents = [-1] + [0] * leaves
    extents = [[(3, length)]] + [[(length + 10 * leaf + 4, leaf + 1)] for leaf in range(leaves)]
    case = Case(parents, extents, [1 + row % leaves for row in range(rows)], None, length + 80)
    cost = replace(CHEAP_UNITS, tiles=(TileCost(4, 1.0, 1.0),))
    check(case, (8, 2), (64, 64), mode=mode, cost=cost)
    assert set(twin.calls) == {(min(rows, leaves) + (length > 0), False)}


@pytest.mark.parametrize("tile", [1, 7, 16, 149, 1000])
@pytest.mark.parametrize("cached", [0, 50])
def test_a_span_is_one_diagonal(twin: Recorder, tile: int, cached: int) -> None:
    """Rows at the last 150 positions of a node, as in prefill, above 200 keys of another: two runs, whatever the
    tiles.
    """
    node = cached + 150
    case = Case([-1, 0], [[(0, 200)], [(250, node)]], [1] * 150, list(range(200 + cached, 200 + node)), 260 + node)
    check(case, (4, 2), (16, 16), mode="naive", cost=CostModel(tiles=(TileCost(tile, 1.0, 1.0),), partial=0.1))
    if tile > 1:
        assert set(twin.calls) == {(1, False), (1, True)}


def test_rows_that_skip_positions_have_no_diagonal(twin: Recorder) -> None:
    case = Case([-1], [[(2, 90)]], [0] * 4, [3, 4, 6, 89], 95)
    check(case, (2, 1), (16, 16))
    assert not twin.calls


def test_a_gap_between_tiles_parts_a_diagonal(twin: Recorder) -> None:
    case = Case([-1], [[(2, 90)]], [0] * 6, [3, 4, 5, 7, 8, 9], 95)
    cost = CostModel(tiles=(TileCost(3, 1.0, 1.0),))
    assert made(case, cost=cost).plan.num_units == 2
    check(case, (2, 1), (16, 16), cost=cost)
    assert set(twin.calls) == {(1, True)}


def test_a_diagonal_over_two_extents(twin: Recorder) -> None:
    case = Case([-1], [[(50, 30), (0, 40)]], [0] * 60, list(range(10, 70)), 90)
    check(case, (2, 1), (16, 16), mode="naive", cost=CostModel(tiles=(TileCost(9, 1.0, 1.0),)))


def test_mixed_subtrees_go_to_our_own_kernels(twin: Recorder) -> None:
    cost = CostModel(tiles=(TileCost(32, 1000.0, 1.0),), partial=100.0, mix=True)
    case = Case([-1, 0, 0], [[(0, 40)], [(40, 3)], [(50, 4)]], [1, 2], None, 60)
    plan = made(case, cost=cost).plan
    assert plan.num_units == 1
    runs, rest = split(plan)
    assert runs.lengths.tolist() == [40] and rest is not None
    assert rest.plan.segment_lengths.tolist() == [3, 4] and rest.rows.tolist() == [0, 1]
    check(case, (2, 1), (16, 16), cost=cost)


@pytest.mark.parametrize(("mode", "cost"), MODES)
@pytest.mark.parametrize("window", [None, 9, 100, Chunk(9)])
def test_every_key_is_in_one_part(mode, cost, window) -> None:
    """Runs and rest hold each row's keys once, and the rest is a plan of its own."""
    rng = np.random.default_rng(2)
    parents, lengths = random_tree(rng, nodes=40, longest=90)
    case = random_case(rng, lengths, parents, rows=70)
    plan = made(case, mode=mode, cost=cost).plan.within(window)
    runs, rest = split(plan)
    keys = [_seen(plan, row, window) for row in range(plan.num_rows)]
    found: list[list[int]] = [[] for _ in keys]
    for index, (start, length) in enumerate(zip(runs.starts, runs.lengths, strict=True)):
        rows = runs.rows[runs.offsets[index] : runs.offsets[index + 1]]
        for place, row in enumerate(rows.tolist()):
            hidden = (len(rows) - 1 - place) * runs.causal[index]
            found[row] += range(start, start + length - hidden)
    for call in range(runs.num_calls):
        within = runs.calls == call
        ends = (runs.starts + runs.lengths)[within]
        assert (ends[:-1] <= runs.starts[within][1:]).all() and len(set(runs.causal[within])) == 1
    if rest is not None:
        units = [np.arange(*bounds) for bounds in rest.plan.unit_rows]
        assert np.array_equal(rest.plan.row_extra + 1, np.bincount(np.concatenate(units)))
        for place, row in enumerate(rest.rows.tolist()):
            found[row] += _seen(rest.plan, place, window)
    assert [sorted(slots) for slots in found] == [sorted(slots) for slots in keys]


def _seen(plan, row: int, window: Window | None) -> list[int]:
    slots: list[int] = []
    position = plan.row_positions[row]
    for (first, stop), segments in zip(plan.unit_rows, plan.unit_segments, strict=True):
        for segment in range(*segments) if first <= row < stop else ():
            low, high = plan.segment_rows[segment]
            places = plan.segment_positions[segment] + np.arange(plan.segment_lengths[segment])
            seen = (places <= position) & (places >= first_key(window, position))
            if low <= row < high:
                slots += (plan.segment_starts[segment] + np.flatnonzero(seen)).tolist()
    return slots


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 6e-3), (torch.float16, 1e-3)])
def test_half_precision(twin: Recorder, dtype: torch.dtype, bound: float) -> None:
    rng = np.random.default_rng(5)
    parents, lengths = random_tree(rng, nodes=20, longest=500)
    case = random_case(rng, lengths, parents, rows=30)
    q, k, v = tensors(case, (8, 2), (64, 64), dtype)
    expected, _ = reference(case, q, k, v, scale=0.125, dtype=torch.float64, window=None, softcap=None, sinks=None)
    out, lse = made(case)(q, k, v)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert error(out, expected) < bound


@pytest.mark.parametrize(
    ("dims", "dtype"),
    [((63, 63), torch.bfloat16), ((64, 32), torch.float16), ((264, 264), torch.float16), ((64, 64), torch.float32)],
)
def test_shapes_that_the_package_does_not_take(monkeypatch: pytest.MonkeyPatch, dims, dtype) -> None:
    twin = Recorder(0)
    monkeypatch.setattr(flash_backend, "load", lambda device: FlashPackage("flash-attn", twin))
    monkeypatch.setattr(flash_backend, "runs_on", lambda device: True)
    case = Case([-1, 0, 0], [[(0, 40)], [(40, 3)], [(50, 4)]], [1, 2], None, 60)
    q, k, v = tensors(case, (2, 1), dims, dtype)
    out, lse = made(case)(q, k, v)
    own, own_lse = TreeAttention(case.parents, case.extents, case.row_nodes, attention="torch")(q, k, v)
    assert torch.equal(out, own) and torch.equal(lse, own_lse)
    assert not twin.calls


def test_rows_without_keys_give_zero(twin: Recorder) -> None:
    q, k, v = torch.randn(3, 2, 8), torch.randn(10, 1, 8), torch.randn(10, 1, 8)
    out, lse = TreeAttention([-1, -1, 1], [[(2, 3)], [], []], [2, 0, 1], attention="flash")(q, k, v)
    assert (out[[0, 2]] == 0).all() and lse[[0, 2]].isneginf().all()
    assert lse[1].isfinite().all()


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_merge_kernel_equals_its_twin(dtype: torch.dtype, sinks: bool) -> None:
    pytest.importorskip("triton")
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 29, 90)
    rows[:40] = 3  # more than the kernel takes at once
    tables = MergeTables.of(rows, rng.permutation(90), 30, DEVICE)
    assert tables.most > 2 * 16
    out = torch.randn(90, 6, 24, device=DEVICE).to(dtype)
    lse = 5 * torch.randn(90, 6, device=DEVICE)
    logits = torch.randn(6, device=DEVICE) if sinks else None
    plain, plain_lse = flash_backend.merge_reference(out, lse, tables, logits)
    merged, merged_lse = flash_backend.merge_by_kernel(out, lse, tables, logits)
    assert merged.dtype == dtype and error(merged, plain) < (1e-3 if dtype == torch.float16 else 1e-6)
    assert torch.equal(merged_lse.isneginf(), plain_lse.isneginf()) and (merged[29] == 0).all()
    finite = plain_lse.isfinite()
    assert error(merged_lse[finite], plain_lse[finite]) < 1e-6


def _two(q, k, v, a, b, c, d, dropout_p=0.0, softmax_scale=None, causal=False, softcap=0.0, return_attn_probs=False):
    assert return_attn_probs
    return *attend_reference(q, k, v, a, b, c, d, causal=causal, scale=softmax_scale, softcap=softcap or None), None


def _three(q, k, v, a, b, c, d, seqused_q=None, softmax_scale=None, causal=False, softcap=0.0):
    return attend_reference(q, k, v, a, b, c, d, causal=causal, scale=softmax_scale, softcap=softcap or None)


@pytest.mark.parametrize("function", [_two, _three, partial(_three, causal=False)])
def test_both_packages_are_called_by_their_own_names(function: Callable[..., Any]) -> None:
    q, k = torch.randn(3, 2, 8), torch.randn(5, 1, 8)
    bounds = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([0, 5], dtype=torch.int32)
    options = {"causal": True, "scale": 0.3, "softcap": 4.0}
    out, lse = flash_backend._through(function)(q, k, k, *bounds, 3, 5, **options)
    plain, plain_lse = attend_reference(q, k, k, *bounds, 3, 5, **options)
    assert torch.equal(out, plain) and torch.equal(lse, plain_lse) and lse.shape == (2, 3)


FAKES = {
    "flash_attn": """
        __version__ = "2.8.3.post2"
        def flash_attn_varlen_func(*arguments, dropout_p=0.0, return_attn_probs=False, **options): ...
    """,
    "flash_attn_interface": "def flash_attn_varlen_func(*arguments, seqused_q=None, **options): ...",
}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str, str], None]]:
    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(dedent(text))
        invalidate_caches()
        monkeypatch.delitem(sys.modules, name, raising=False)

    monkeypatch.syspath_prepend(tmp_path)
    flash_backend._load.cache_clear()
    yield write
    flash_backend._load.cache_clear()
    for name in FAKES:
        sys.modules.pop(name, None)


def test_the_package_for_hopper_goes_first(fake: Callable[[str, str], None]) -> None:
    for name, text in FAKES.items():
        fake(name, text)
    assert flash_backend._load(False).name == "flash-attn" and not flash_backend._load(False).reads_beyond
    assert flash_backend._load(True).name == "flash-attn-3" and flash_backend._load(True).reads_beyond
    assert not flash_backend.runs_on(CPU)
    with pytest.raises(InvalidRequest, match="does not run on cpu"):
        backend("flash", CPU)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('__version__ = "2.6.3"\ndef flash_attn_varlen_func(): ...', "older than 2.7"),
        ("raise ImportError('undefined symbol')", "broken: undefined symbol"),
        ("raise OSError('no libcudart')", "broken: no libcudart"),
        ("", "no flash_attn_varlen_func"),
    ],
)
def test_a_package_of_no_use_is_as_good_as_none(fake: Callable[[str, str], None], text: str, reason: str) -> None:
    fake("flash_attn", text)
    with pytest.raises(InvalidRequest, match=f"attention='flash'.*{reason}"):
        backend("flash", CPU)
    assert backend_with_flash("auto", CPU, FlashCost(0.0, 0.0)).attention is torch_backend.TorchAttention


@pytest.mark.skipif("not installed" not in flash_backend.installed(), reason="flash-attn is installed")
def test_without_the_package() -> None:
    """Asking for it is an error that says so; nothing else notices."""
    with pytest.raises(InvalidRequest, match=r"attention='flash'.*not installed"):
        backend("flash", CPU)
    with pytest.raises(InvalidRequest, match=r"attention='flash'.*not installed"):
        Engine(families.build("llama"), attention="flash", kv_tokens=64)
    assert backend_with_flash("auto", CPU, FlashCost(0.0, 0.0)).name == "torch"
    assert backend_with_flash("auto", CPU, FlashCost(0.0, 0.0)).attention is torch_backend.TorchAttention


def test_auto_asks_the_cost_model(twin: Recorder) -> None:
    case = Case([-1, 0, 0], [[(0, 400)], [(400, 3)], [(410, 4)]], [1, 2], None, 420)
    plan = made(case).plan
    assert backend("auto", CPU).attention is torch_backend.TorchAttention
    cheap, dear = (backend_with_flash("auto", CPU, FlashCost(call, 0.0)) for call in (0.01, 1e9))
    assert cheap.name == dear.name == "torch" and isinstance(cheap.attention, CheapestAttention)
    assert isinstance(cheap.attention(plan, None, CPU), flash_backend.FlashAttention)
    assert isinstance(dear.attention(plan, None, CPU), torch_backend.TorchAttention)
    assert isinstance(cheap.attention(plan, 7, CPU), torch_backend.TorchAttention)


def test_a_calibration_may_know_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    geometry = Geometry(2, 3, 64, 64, torch.bfloat16)
    monkeypatch.setattr(calibration, "cache_dir", lambda: tmp_path)
    assert calibration.flash_cost(CPU, geometry) is None
    shipped = calibration._read(calibration._SHIPPED)[0]
    assert shipped.flash is None
    calibration.keep(replace(shipped, device="cpu"))
    assert calibration.flash_cost(CPU, geometry) is None
    calibration.keep(replace(shipped, device="cpu", flash=FlashCost(5.0, 0.01)))
    assert calibration.flash_cost(CPU, geometry) == FlashCost(5.0, 0.005, 3, 2)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss"])
def test_an_engine_answers_as_transformers_does(twin: Recorder, name: str) -> None:
    """Prefill in chunks, decode and a pool that always evicts."""
    oracle, served = Oracle(families.build(name)), families.build(name)
    asked = prompts(families.VOCAB)[:3]
    with Engine(served, attention="flash", max_step_tokens=24, kv_tokens=160, debug=True) as engine:
        for prompt, output in zip(asked, engine.generate(asked, greedy(5)), strict=True):
            oracle.expect(engine, prompt, output.outputs[0].token_ids, 5)
        engine.check()
    oracle.settle()
    # The only layer of this gemma2 without a window is its last, which computes one row of a prompt.
    assert {causal for _, causal in twin.calls} == ({False} if name == "gemma2" else {False, True})
