"""Matrix products of few rows with the weights of the experts that they chose.

The kernel is in `radixgen.kernels.expert_gemm_kernels`: it reads the weights of each chosen expert once, and wants no
sorted rows. Its plain twin is `expert_linear_reference`.
"""

import torch
from torch import Tensor, library

MAX_ROWS = 128
"""Beyond it sorting pays off."""
_BLOCK_N, _BLOCK_K, _STAGES, _WARPS = 128, 64, 5, 8
_SCAN = 512
"""Pairs that a program looks through at once, at most"""


def supports(weight: Tensor) -> bool:
    """Whether the kernel multiplies by these weights, `[experts, outputs, inputs]` or transposed: contiguous, half
    precision, of sizes that a descriptor of blocks takes, on a GPU that has such descriptors (Hopper and later).
    """
    if not weight.is_cuda or weight.dtype not in (torch.bfloat16, torch.float16) or not weight.is_contiguous():
        return False
    whole = weight.ndim == 3 and weight.shape[1] % _BLOCK_K == 0 and weight.shape[2] % _BLOCK_K == 0
    return whole and torch.cuda.get_device_capability(weight.device) >= (9, 0)


def expert_linear_reference(given: Tensor, weight: Tensor, experts: Tensor, transposed: bool) -> Tensor:
    """As `expert_linear`, for any tensors: by a copy of each pair's weights."""
    rows = given.repeat_interleave(experts.numel() // given.shape[0], 0)
    chosen = weight[experts]
    return torch.bmm(rows[:, None], chosen if transposed else chosen.transpose(1, 2))[:, 0]


def expert_linear(given: Tensor, weight: Tensor, experts: Tensor, transposed: bool) -> Tensor:
    """`[pairs, outputs]`: for pair i, row `i // (pairs / rows)` of `given [rows, inputs]` times `weight[experts[i]]`.

    `experts` int64 `[pairs]`; `weight [experts, outputs, inputs]`, or `[experts, inputs, outputs]` where `transposed`.

    Weights are such as the kernel `supports`. A row's bits depend neither on the other rows nor on their number.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    from radixgen.kernels.expert_gemm_kernels import expert_linear_kernel

    given, experts = given.contiguous(), experts.contiguous()
    found = _empty(given, weight, experts, transposed)
    pairs, outputs = found.shape
    if not pairs:
        return found
    count = weight.shape[0]
    block = [_BLOCK_K, _BLOCK_N] if transposed else [_BLOCK_N, _BLOCK_K]
    blocks = TensorDescriptor.from_tensor(weight.view(-1, weight.shape[2]), block)
    expert_linear_kernel[(-(-outputs // _BLOCK_N), min(pairs, count))](
        given, blocks, experts, found, pairs,
        OUTPUTS=outputs, INPUTS=given.shape[1], SHARE=pairs // given.shape[0], TRANSPOSED=transposed,
        EACH_EXPERT=pairs >= count, BLOCK_M=_block_pairs(pairs, count), BLOCK_N=_BLOCK_N, BLOCK_K=_BLOCK_K,
        STAGES=_STAGES, SCAN=min(_SCAN, _power_of_2(max(16, pairs))), num_warps=_WARPS,
    )  # fmt: skip
    return found


def _block_pairs(pairs: int, experts: int) -> int:
    """Room for twice the pairs that an expert has on average; for more of them it reads its weights again."""
    return min(64, _power_of_2(max(16, 2 * pairs // experts)))


def _power_of_2(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _empty(given: Tensor, weight: Tensor, experts: Tensor, transposed: bool) -> Tensor:
    return given.new_empty((experts.numel(), weight.shape[2 if transposed else 1]))


def register() -> None:
    """Make `expert_linear` known to PyTorch as `radixgen::expert_linear`, which a compiled model calls as it is."""
    if hasattr(torch.ops.radixgen, "expert_linear"):
        return

    @library.custom_op("radixgen::expert_linear", mutates_args=())
    def operator(given: Tensor, weight: Tensor, experts: Tensor, transposed: bool) -> Tensor:
        return expert_linear(given, weight, experts, transposed)

    @operator.register_fake
    def _(given: Tensor, weight: Tensor, experts: Tensor, transposed: bool) -> Tensor:
        return _empty(given, weight, experts, transposed)
