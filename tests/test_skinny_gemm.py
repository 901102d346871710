"""Products of few rows by their own kernel, against float64 and PyTorch's, on a Hopper GPU."""

import pytest
import torch
from torch import library, nn

from radixgen.kernels import skinny_gemm
from radixgen.model.fused_linear import FusedLinearSlice, fuse_linears, restore_linears

CUDA = torch.cuda.is_available()
SHAPES = [(128, 128), (384, 640), (6144, 4096), (4096, 14_336), (1000, 256)]
on_hopper = pytest.mark.skipif(
    not CUDA or not skinny_gemm.supports(torch.empty(128, 128, dtype=torch.bfloat16, device="cuda")),
    reason="needs a Hopper GPU and the version of Triton that compiles the kernel",
)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def test_inputs_are_split_until_all_programs_are_busy() -> None:
    assert [skinny_gemm.split_k(*shape, 132) for shape in SHAPES] == [1, 1, 2, 4, 2]
    assert skinny_gemm.split_k(28_672, 4096, 132) == 1
    assert skinny_gemm.split_k(4096, 4096, 132) == 4


def test_other_weights_are_not_supported() -> None:
    assert not skinny_gemm.supports(torch.empty(128, 128, dtype=torch.bfloat16))
    layer = nn.Sequential(nn.Linear(128, 128, bias=False, device="meta"))
    fuse_linears(layer)
    assert type(layer[0]) is nn.Linear


@on_hopper
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_as_exact_as_pytorch_s(shape: tuple[int, int]) -> None:
    weight, given = random(*shape) * 0.02, random(64, shape[1])
    skinny_gemm.register()
    wanted = given.double() @ weight.double().T
    for rows in (1, 2, 8, 9, 16, 17, 32, 33, 63, 64):
        found = skinny_gemm.linear(given[:rows], weight)
        theirs = nn.functional.linear(given[:rows], weight)
        errors = [float((one - wanted[:rows]).norm() / wanted[:rows].norm()) for one in (found, theirs)]
        assert found.dtype == torch.bfloat16 and errors[0] <= 1.05 * errors[1] + 1e-6
        alone = skinny_gemm.linear(given[rows - 1], weight)
        assert torch.equal(found[-1], alone), "a row depends on the others"
    for other in (random(65, shape[1]), given[:0]):
        assert torch.equal(skinny_gemm.linear(other, weight), nn.functional.linear(other, weight))


@on_hopper
@pytest.mark.parametrize("shape", [(128, 256), (384, 512), (6144, 4096), (4096, 14_336), (1000, 256)])
def test_products_in_fp8(shape: tuple[int, int]) -> None:
    weight, given = ((8 * random(*size)).to(torch.float8_e4m3fn) for size in (shape, (64, shape[1])))
    assert skinny_gemm.supports(weight)
    skinny_gemm.register()
    wanted = given.double() @ weight.double().T
    for rows in (1, 3, 8, 9, 17, 33, 64):
        parts = skinny_gemm.linear_parts(given[:rows], weight)
        assert parts is not None and parts.dtype == torch.float32
        assert float((parts.sum(0) - wanted[:rows]).norm() / wanted[:rows].norm()) < 2e-3
        alone = skinny_gemm.linear_parts(given[rows - 1 : rows], weight)
        assert alone is not None and torch.equal(parts[:, -1], alone[:, 0]), "a row depends on the others"
    assert not skinny_gemm.supports(weight[:, :128].contiguous()), "inputs of half a tile"


@on_hopper
def test_the_operator_is_sound() -> None:
    skinny_gemm.register()
    skinny_gemm.register()
    library.opcheck(torch.ops.radixgen.linear_partials.default, (random(5, 256), random(256, 256)))


@on_hopper
def test_layers_alone_are_replaced_and_given_back() -> None:
    model = nn.Sequential(nn.Linear(256, 384, bias=False), nn.Linear(384, 128), nn.Linear(384, 100, bias=False))
    model = model.to("cuda", torch.bfloat16)
    given, layers = random(3, 256), list(model)
    wanted, address = layers[0](given), layers[0].weight.data_ptr()
    fuse_linears(model)
    assert [type(layer) for layer in model] == [FusedLinearSlice, nn.Linear, nn.Linear]
    torch.testing.assert_close(model[0](given), wanted)
    assert model[0].weight.data_ptr() == address
    restore_linears(model)
    assert list(model) == layers
