"""The collectives of a sharded model: they are the sums that they stand for, and break no compiled block."""

from functools import partialmethod

import families
import pytest
import torch
from torch import Tensor, library, nn
from torch.nn.functional import linear

from radixgen import Engine, SamplingParams
from radixgen.model import collectives
from radixgen.model.collectives import GatherColumns, Rank, RowParallelLinear, SelectColumns, register, silent
from radixgen.model.fused_linear import FusedLinear, FusedLinearSlice

SIZE = 3


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What all ranks hold, this one included, in the one collective that a test calls."""
    held: list[Tensor] = []

    def all_reduce(given: Tensor) -> None:
        given.copy_(torch.stack(held).sum(0))

    def gather(into: Tensor, _: Tensor) -> None:
        into.copy_(torch.cat(held))

    register()
    monkeypatch.setattr(collectives.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(collectives, "_gather_into", gather)
    return held


@pytest.mark.parametrize("width", [12, 13, 7])
def test_sharded_products_add_up(width: int, others: list[Tensor]) -> None:
    """By rows, of what each rank has or of what all have, with a bias once; and by columns, evenly or not."""
    given, bias = torch.randn(2, 5, width), torch.randn(4)
    weight = torch.randn(4, width)
    expected = linear(given, weight, bias)
    columns = [torch.arange(width).chunk(SIZE)[rank] for rank in range(SIZE)]
    others += [linear(given[..., part], weight[:, part]) for part in columns]
    for rank, part in enumerate(columns):
        layer = nn.Linear(width, 4)
        layer.weight = nn.Parameter(weight[:, part].clone(), requires_grad=False)
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
        whole = collectives._sharded_linear(layer, "rowwise_split_input", Rank(rank, SIZE))
        assert whole[0].columns == slice(int(part[0]), int(part[-1]) + 1)
        layer.in_features = width
        with torch.inference_mode():
            assert torch.allclose(whole(given), expected, atol=1e-5)
    wide = torch.randn(2, 5, width)
    pieces = [wide[..., part] for part in columns]
    most = max(piece.shape[-1] for piece in pieces)
    others[:] = [nn.functional.pad(one, (0, most - one.shape[-1])).reshape(-1, most) for one in pieces]
    assert torch.equal(GatherColumns(width, SIZE)(pieces[-1]), wide)


class Ones:
    """Stands for the kernel: adds 1 for the other rank."""

    def supports(self, *_: object) -> bool:
        return True

    def __call__(self, data: Tensor, parts: Tensor | None = None) -> None:
        data.copy_((data if parts is None else parts.sum(0)) + 1)


def test_a_product_in_parts_is_added_up_as_it_crosses(monkeypatch: pytest.MonkeyPatch, others: list[Tensor]) -> None:
    """By the kernel where there is one, or by the library."""
    layer, given = nn.Linear(6, 4, bias=False), torch.randn(2, 5, 6)
    expected = layer(given).detach()
    parts = torch.stack([linear(given[..., part], layer.weight[:, part]) for part in torch.arange(6).chunk(2)]).detach()
    summed = RowParallelLinear(FusedLinearSlice(FusedLinear([layer]), 0, layer))
    with torch.inference_mode():
        others[:] = [expected]
        assert torch.equal(summed(given), expected)
        monkeypatch.setattr(FusedLinear, "parts", lambda *_: parts)
        assert torch.allclose(summed(given), expected, atol=1e-6)
        monkeypatch.setattr(collectives.RANK_ALL_REDUCE, "_sum", Ones())
        assert torch.allclose(summed(given), expected + 1, atol=1e-6)
        monkeypatch.setattr(FusedLinear, "parts", lambda *_: parts[:1].clone())
        assert torch.allclose(summed(given), parts[0] + 1, atol=1e-6)


def test_few_columns_are_gathered_by_a_sum(monkeypatch: pytest.MonkeyPatch, others: list[Tensor]) -> None:
    monkeypatch.setattr(collectives.RANK_ALL_REDUCE, "_sum", Ones())
    monkeypatch.setattr(collectives.dist, "get_rank", lambda: 2)
    found = GatherColumns(13, SIZE)(torch.full((1, 2, 3), 5.0))
    assert found.tolist() == [[[1.0] * 10 + [6.0] * 3] * 2]


def test_an_embedding_is_looked_up_by_whoever_has_the_row(
    monkeypatch: pytest.MonkeyPatch, others: list[Tensor]
) -> None:
    table, ids = torch.randn(11, 4), torch.tensor([[0, 10, 3, 4, 7, 8]])
    found = []
    for rank in range(SIZE):
        embedding = nn.Embedding(11, 4, padding_idx=10)
        embedding.weight = nn.Parameter(table.chunk(SIZE)[rank].clone(), requires_grad=False)
        collectives._shard_lookup(embedding, Rank(rank, SIZE))
        with silent():
            found.append(embedding(ids))
    assert torch.equal(sum(found), table[ids])


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize("rows", [1, 5])
def test_the_operators_are_sound(rows: int) -> None:
    given = torch.randn(1, rows, 6)
    with silent():
        before = given.clone()
        assert torch.equal(RowParallelLinear(nn.Identity())(given), before)
        assert GatherColumns(17, SIZE)(given).shape == (1, rows, 17) and SelectColumns(slice(2, 4))(given).shape == (
            1,
            rows,
            2,
        )
        library.opcheck(torch.ops.radixgen.all_reduce_.default, (given,))
        library.opcheck(torch.ops.radixgen.all_gather.default, (given, 17, SIZE))
        library.opcheck(torch.ops.radixgen.all_reduce_parts.default, (given, torch.bfloat16))


def test_a_block_with_collectives_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    graphs: list[list[str]] = []

    def record(module: torch.fx.GraphModule, _: object) -> object:
        graphs.append([str(node.target) for node in module.graph.nodes])
        return module.forward

    def build() -> nn.Module:
        model = families.build("llama")
        for layer in model.model.layers:
            layer.self_attn.o_proj = RowParallelLinear(layer.self_attn.o_proj)
            layer.mlp.down_proj = RowParallelLinear(layer.mlp.down_proj)
        return model

    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    torch._dynamo.reset()
    with silent(), Engine(build(), kv_tokens=64, device="cpu") as engine:
        expected = engine.generate([5, 6, 7], params)[0].outputs[0].token_ids
        monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=record))
        engine._model.model.compile_blocks()
        assert engine._model.model.compiles()
        engine.reset_prefix_cache()
        assert engine.generate([5, 6, 7], params)[0].outputs[0].token_ids == expected
    blocks = [graph for graph in graphs if any("layer_attention" in name for name in graph)]
    assert blocks and all(sum("all_reduce_" in name for name in graph) == 2 for graph in blocks)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_plan_that_is_not_known_is_left_to_transformers() -> None:
    def tp_forward(given: Tensor) -> Tensor:
        return given

    model = nn.ModuleDict({"first": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    model.tp_plan = {"first": "colwise", "norm": "sequence_parallel"}
    for module in model.values():
        module.forward = tp_forward
    assert not collectives.use_plain_collectives(model, Rank(0, SIZE))
    assert all(module.forward is tp_forward for module in model.values())
    model.tp_plan["norm"] = "replicated_with_grad_allreduce"
    assert collectives.use_plain_collectives(model, Rank(0, SIZE))
    assert not any("forward" in vars(module) for module in model.values())
