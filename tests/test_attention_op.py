"""The operator that compiled blocks call: it is what PyTorch expects, and breaks no graph."""

from functools import partialmethod

import families
import pytest
import torch
from torch import Tensor, library, nn

from radixgen import Engine, SamplingParams
from radixgen.model.attention_op import handle_attention, layer_attention, register


def answer(
    query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    return query.transpose(1, 2)[..., : value.shape[3]].contiguous() * scale


@pytest.mark.parametrize("rows", [1, 5])
def test_the_operator_is_sound(rows: int) -> None:
    register()
    query, key, value = torch.randn(1, 4, rows, 8), torch.randn(1, 2, rows, 8), torch.randn(1, 2, rows, 6)
    with handle_attention(answer):
        assert layer_attention(query, key, value, 0.5, None, None).shape == (1, rows, 4, 6)
        for sinks in (None, torch.randn(4)):
            library.opcheck(torch.ops.radixgen.layer_attention.default, (query, key, value, 0.5, 30.0, sinks))
    with pytest.raises(LookupError):
        layer_attention(query, key, value, 0.5, None, None)


def test_a_block_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for all blocks, with all matrix products around the operator, and answers stay what they were."""
    graphs: list[list[str]] = []

    def record(module: torch.fx.GraphModule, _: object) -> object:
        graphs.append([str(node.target) for node in module.graph.nodes])
        return module.forward

    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    with Engine(families.build("gemma2"), kv_tokens=64) as engine:
        expected = engine.generate([5, 6, 7], params)[0].outputs[0].token_ids
    torch._dynamo.reset()
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=record))
    with Engine(families.build("gemma2"), kv_tokens=64, torch_compile=True) as engine:
        for _ in range(2):
            assert engine.generate([5, 6, 7], params)[0].outputs[0].token_ids == expected
            engine.reset_prefix_cache()
    blocks = [graph for graph in graphs if any("layer_attention" in name for name in graph)]
    assert len(blocks) <= 2  # one row is a case of its own
    for graph in blocks:
        assert sum("linear" in name for name in graph) >= 4
    assert not torch._dynamo.utils.counters["graph_break"]
