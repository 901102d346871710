"""Products of rows with their experts' weights, on a GPU or in Triton's interpreter, against their plain twin."""

from functools import partialmethod

import families
import pytest
import torch
from torch import Tensor, library, nn

from radixgen.kernels import expert_gemm
from radixgen.kernels.expert_gemm import expert_linear, expert_linear_reference
from radixgen.model.layer_call import LayerCall
from radixgen.model.tree_model import TreeModel

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KINDS = [torch.float16, torch.bfloat16] if torch.cuda.is_available() else [torch.float16]
on_gpu = pytest.mark.skipif(
    not expert_gemm.supports(torch.empty(1, 64, 64, dtype=torch.bfloat16, device=DEVICE)),
    reason="needs a GPU with descriptors of blocks (Hopper and later)",
)


def random(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def choices(rows: int, count: int, most: int) -> Tensor:
    """`most` different experts of `count` for each row; the last expert is never chosen, the first by every row."""
    others = torch.stack([1 + torch.randperm(max(count - 2, most), device=DEVICE)[: most - 1] for _ in range(rows)])
    return torch.cat([torch.zeros_like(others[:, :1]), others], 1)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("count", "most", "outputs", "inputs"), [(5, 2, 64, 128), (16, 3, 192, 64)])
def test_products_are_those_of_copied_weights(
    count: int, most: int, outputs: int, inputs: int, transposed: bool, dtype: torch.dtype
) -> None:
    shape = (count, inputs, outputs) if transposed else (count, outputs, inputs)
    weight = random(*shape, dtype=dtype) * inputs**-0.5
    weight[-1] = torch.nan
    for rows in (1, 2, 9, 40):
        experts, given = choices(rows, count, most), random(rows, inputs, dtype=dtype)
        found = expert_linear(given, weight, experts.reshape(-1), transposed)
        wanted = expert_linear_reference(given.float(), weight.float(), experts.reshape(-1), transposed)
        torch.testing.assert_close(found.float(), wanted, rtol=1e-2, atol=1e-2)
        # A row for each pair, as the second product has them.
        again = expert_linear(given.repeat_interleave(most, 0), weight, experts.reshape(-1), transposed)
        assert torch.equal(found, again)
        for row in (0, rows - 1):
            alone = expert_linear(given[row : row + 1], weight, experts[row], transposed)
            assert torch.equal(found[row * most : (row + 1) * most], alone), "a row depends on the others"
    assert expert_linear(given[:0], weight, experts[:0].reshape(-1), transposed).shape == (0, outputs)


def test_other_weights_are_not_supported() -> None:
    assert not expert_gemm.supports(torch.empty(2, 64, 64, dtype=torch.bfloat16))
    network = families.build("qwen3-moe")
    model = TreeModel(network, "qwen3-moe", None)
    model.fuse_linears()
    assert network.config._experts_implementation == "grouped_mm"
    model.release()


@on_gpu
def test_the_operator_is_sound() -> None:
    expert_gemm.register()
    expert_gemm.register()
    given, weight = random(5, 64, dtype=torch.bfloat16), random(7, 128, 64, dtype=torch.bfloat16)
    asked = given, weight, choices(5, 7, 2).reshape(-1), False
    library.opcheck(torch.ops.radixgen.expert_linear.default, asked)


def own_value(call: LayerCall) -> tuple[Tensor, Tensor]:
    """Attention of rows that see nothing but themselves."""
    return call.v.repeat_interleave(call.q.shape[1] // call.v.shape[1], 1), call.q[..., 0]


@pytest.mark.parametrize("family", ["qwen3-moe", "gpt-oss"])
def test_layers_of_experts_use_them(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows go through the operator, more through transformers' own, compiled or not, with the same logits."""
    calls: list[int] = []

    def counted(given: Tensor, weight: Tensor, experts: Tensor, transposed: bool) -> Tensor:
        calls.append(experts.numel())
        return expert_linear_reference(given, weight, experts, transposed)

    monkeypatch.setattr(expert_gemm, "supports", lambda weight: True)
    monkeypatch.setattr(expert_gemm, "expert_linear", counted)
    monkeypatch.setattr(expert_gemm, "MAX_ROWS", 7)
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    network = families.build(family)
    model = TreeModel(network, family, None)

    def logits(rows: int) -> Tensor:
        places = torch.arange(rows)
        return model.forward(places + 3, places, places, own_value)

    wanted = {rows: logits(rows) for rows in (1, 7, 8)}
    model.fuse_linears()
    for compiled in (False, True):
        if compiled:
            model.compile_blocks()
        for rows, logits_wanted in wanted.items():
            calls.clear()
            torch.testing.assert_close(logits(rows), logits_wanted, rtol=1e-4, atol=1e-4)
            assert bool(calls) == (rows <= 7)
    assert len(model._compiled) == 3 + 2  # the last norm and rotary embeddings
    model.release()
    assert network.config._experts_implementation == "grouped_mm"
