"""Keys and values in 8 bits: what is lost, what stays exact, and each kernel against its twin."""

from dataclasses import replace

import families
import numpy as np
import pytest
import torch
from oracle import StampModel
from test_attention import Case, error, poison, random_case, random_tree, reference, tensors
from test_exactness import greedy, prompts

from radixgen import Engine, InvalidRequest, TreeAttention, calibration
from radixgen.cache.storage import KVStorage, LayerShape
from radixgen.core import Chunk
from radixgen.kernels.backend import backend
from radixgen.kernels.geometry import Geometry
from radixgen.kernels.quantized import KV_DTYPES, QuantizedKV, allocate, as_bytes, read, write
from radixgen.scheduler.cost import CostModel, TileCost

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ["torch", "triton"]
ERRORS = {"int8": 0.01, "fp8": 0.04}
COST = CostModel(tiles=(TileCost(16, 60.0, 1.0), TileCost(64, 70.0, 1.2)), partial=0.1, programs=7, mix=True)
WIDE = replace(COST, tiles=(*COST.tiles, TileCost(128, 20.0, 1.3, 2.6)), group=4)
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
"""The kernels multiply 8-bit numbers in float16; Triton's interpreter knows no bfloat16."""
MASKS = [(None, None, False), (70, None, True), (None, 20.0, True), (Chunk(70), None, False)]


@pytest.fixture(params=BACKENDS)
def name(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def quantized(pool: torch.Tensor, kv_dtype: str) -> QuantizedKV:
    """Every slot of a pool."""
    result = allocate(*pool.shape, KV_DTYPES[kv_dtype], pool.device)
    write(result, torch.arange(pool.shape[0], device=pool.device), pool)
    return result


def exact(pool: QuantizedKV) -> torch.Tensor:
    return read(pool, slice(0, pool.shape[0]), torch.float64)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_little_is_lost(kv_dtype: str) -> None:
    torch.manual_seed(0)
    pool = torch.randn(1_000, 2, 128)
    assert (exact(quantized(pool, kv_dtype)) - pool).norm() / pool.norm() < ERRORS[kv_dtype]


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_token_of_zeros_and_one_of_large_numbers(kv_dtype: str) -> None:
    pool = torch.zeros(3, 1, 16)
    pool[1] = torch.linspace(-3e30, 1e30, 16)
    pool[2, 0, 5] = -1e-30
    result = exact(quantized(pool, kv_dtype))
    assert not result[0].any() and result.isfinite().all()
    assert result[1, 0, 0].item() == pytest.approx(-3e30) and result[2, 0, 5].item() == pytest.approx(-1e-30)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize(("kv_heads", "dims"), [(1, (64, 64)), (3, (80, 33)), (8, (128, 128))])
def test_writes_equal_their_twin(kv_heads: int, dims: tuple[int, int], kv_dtype: str) -> None:
    pytest.importorskip("triton")
    slots = np.array([7, -1, 0, 30, -1, 8], np.int64)
    key = torch.randn(kv_heads, 6, dims[0], device=DEVICE).transpose(0, 1)
    value = torch.randn(6, kv_heads, dims[1], device=DEVICE)
    stored = []
    for name in BACKENDS:
        shape = LayerShape(kv_heads, *dims, KV_DTYPES[kv_dtype])
        storage = KVStorage([shape], 32, DEVICE)
        storage.zero(32)
        (k,), (v,) = storage.keys, storage.values
        backend(name, DEVICE).kv_writer(slots, DEVICE)(key, value, k, v)
        stored.append((k, v))
    for ours, twin in zip(*stored, strict=True):
        assert torch.equal(ours.scales, twin.scales)
        if kv_dtype == "fp8" and DEVICE.type == "cpu":  # Triton's interpreter loses the carry of a rounding
            assert error(exact(ours), exact(twin)) < 0.1
        else:
            assert torch.equal(as_bytes(ours.data), as_bytes(twin.data))
        assert ours.scales[:, 7].all() and not ours.scales[:, 1].any()


def check(
    name: str,
    case: Case,
    heads: tuple[int, int],
    dims: tuple[int, int],
    kv_dtype: str,
    *,
    dtype: torch.dtype = torch.float32,
    sinks: bool = False,
    **options,
) -> None:
    """Exact for the keys and values that are stored, with NaN in slots on no row's path."""
    q, k, v = (tensor.to(DEVICE) for tensor in tensors(case, heads, dims, dtype))
    q[0] *= 1e-3
    v *= torch.logspace(-6, 2, v.shape[0], device=DEVICE).to(dtype)[:, None, None]
    k8, v8 = quantized(k, kv_dtype), quantized(v, kv_dtype)
    weights = torch.randn(heads[0]) if sinks else None
    expected, expected_lse = reference(
        case, q.cpu(), exact(k8).cpu(), exact(v8).cpu(), scale=dims[0] ** -0.5, dtype=torch.float64,
        window=options.get("window"), softcap=options.get("softcap"), sinks=weights,
    )  # fmt: skip
    poisoned = torch.zeros(2, k.shape[0], 1, 1)
    poison(case, None, *poisoned)
    nowhere = poisoned[0, :, 0, 0].isnan().to(DEVICE)
    k8.scales[:, nowhere], v8.scales[:, nowhere] = float("nan"), float("nan")
    attn = TreeAttention(case.parents, case.extents, case.row_nodes, case.row_positions, attention=name, **options)
    out, lse = attn(q, k8, v8, sinks=None if weights is None else weights.to(DEVICE))
    assert out.dtype == dtype
    assert error(out.cpu(), expected) < TOLERANCES[dtype] and error(lse.cpu(), expected_lse) < TOLERANCES[dtype]


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("masks", MASKS)
def test_attention_is_exact_for_what_is_stored(name: str, masks: tuple, kv_dtype: str) -> None:
    window, softcap, sinks = masks
    rng = np.random.default_rng(6)
    parents, lengths = random_tree(rng, nodes=9, longest=300)
    case = random_case(rng, lengths, parents, rows=11)
    for heads, dims in (((6, 2), (64, 64)), ((3, 1), (80, 34)), ((2, 1), (80, 33))):
        check(name, case, heads, dims, kv_dtype, sinks=sinks, window=window, softcap=softcap, cost=COST)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("masks", MASKS)
def test_half_precision_loses_no_more_than_products_in_it(masks: tuple, kv_dtype: str) -> None:
    pytest.importorskip("triton")
    window, softcap, sinks = masks
    rng = np.random.default_rng(6)
    parents, lengths = random_tree(rng, nodes=9, longest=300)
    case = random_case(rng, lengths, parents, rows=11)
    check(
        "triton", case, (6, 2), (64, 64), kv_dtype, dtype=HALF, sinks=sinks, window=window, softcap=softcap, cost=COST
    )  # fmt: skip


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("sinks", [False, True])
def test_wide_tiles(sinks: bool, kv_dtype: str) -> None:
    """A prefix of whole blocks and some keys more under many leaves, and a span with its diagonal."""
    pytest.importorskip("triton")
    parents = [-1, 0, 0] + [1 + leaf % 2 for leaf in range(40)]
    extents = [[(3, 260), (300, 150)], [(460, 70)], [(540, 1)]]
    extents += [[(600 + 9 * leaf, 1 + leaf % 7)] for leaf in range(40)]
    leaves = Case(parents, extents, list(range(3, 43)), None, 980)
    span = Case([-1, 0], [[(0, 140)], [(150, 70)]], [1] * 70, list(range(140, 210)), 240)
    for case in (leaves, span):
        attn = TreeAttention(case.parents, case.extents, case.row_nodes, case.row_positions, cost=WIDE)
        assert attn.plan.tile_rows == 128
        check("triton", case, (8, 2), (128, 128), kv_dtype, dtype=HALF, sinks=sinks, cost=WIDE)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_long_extent(name: str, kv_dtype: str) -> None:
    """Copied in bulk on a GPU, and converted in chunks on a CPU; also for many rows, which share a conversion."""
    case = Case([-1, 0, 0], [[(5, 1300)], [(1400, 70)], [(1500, 1)]], [1, 2, 2], None, 1600)
    check(name, case, (4, 1), (128, 128), kv_dtype, cost=COST)
    many = replace(case, row_nodes=[1] * 30)
    check(name, many, (4, 1), (128, 128), kv_dtype, cost=COST)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss"])
def test_neither_sharing_nor_batching_changes_a_token(family: str) -> None:
    model = families.build(family)
    asked, alone = prompts(families.VOCAB), []
    for prompt in asked:
        with Engine(model, kv_tokens=512, kv_dtype="int8", debug=True) as engine:
            alone += tokens_of(engine, [prompt])
    with Engine(model, kv_tokens=160, kv_dtype="int8", max_step_tokens=17, debug=True) as engine:
        assert tokens_of(engine, asked) == alone, "batched, in a pool that is always full"
        engine.check()
    with Engine(model, kv_tokens=2048, kv_dtype="int8", debug=True) as engine:
        for _ in ("cold", "warm"):
            assert tokens_of(engine, asked) == alone


def tokens_of(engine: Engine, asked: list[list[int]]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in engine.generate(asked, greedy(12))]


def test_keys_in_8_bits_have_costs_of_their_own() -> None:
    """On a device where these were measured; elsewhere, only reading costs less."""
    plain = Geometry(8, 4, 128, 128, torch.bfloat16)
    small, known = replace(plain, kv_dtype=torch.int8), calibration._known("")
    for name, measured in (("NVIDIA H200", True), ("NVIDIA H100 80GB HBM3", False)):
        (*_, cost), (*_, other) = (known[name].cost_models(shape, wide=measured) for shape in (plain, small))
        assert (cost.tiles != other.tiles) == measured
        assert [tile.rows for tile in cost.tiles] == [tile.rows for tile in other.tiles]
        reads = [model.first_key / model.programs for model in (cost, other)]
        assert reads[1] == pytest.approx(reads[0] * (2 * 128 + 8) / 512)


def test_bytes_of_a_token() -> None:
    model, other = families.build("llama"), families.build("llama")
    with Engine(model, kv_tokens=64) as plain, Engine(other, kv_tokens=64, kv_dtype="int8") as engine:
        shape, heads = model.config, model.config.num_key_value_heads
        layers, dim = shape.num_hidden_layers, shape.head_dim
        assert plain._model.kv_bytes_per_token == layers * heads * 2 * 4 * dim
        assert engine._model.kv_bytes_per_token == layers * heads * 2 * (dim + 4)


@pytest.mark.parametrize(("head_dim", "ratio"), [(128, 1.9), (64, 1.85)])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES.values())
def test_a_pool_holds_almost_twice_the_tokens(head_dim: int, ratio: float, kv_dtype: torch.dtype) -> None:
    plain = LayerShape(8, head_dim, head_dim, torch.bfloat16)
    assert plain.bytes_per_token >= ratio * replace(plain, dtype=kv_dtype).bytes_per_token


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kv_dtype": "int4"}, "kv_dtype='int4': must be auto, int8 or fp8"),
        ({"kv_dtype": "fp8", "device": "cpu"}, "kv_dtype='fp8': needs a GPU of compute capability 8.9"),
    ],
)
def test_what_can_t_be_is_refused(options: dict, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        Engine(families.build("llama"), **options)


def test_a_model_object_stores_its_own_kv() -> None:
    with pytest.raises(InvalidRequest, match="kv_dtype='int8': must be auto: the model object stores its own KV"):
        Engine(StampModel(8, 64), kv_dtype="int8")
