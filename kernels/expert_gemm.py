"""Matrix products of few rows with the weights of selected experts.

The kernel is in `radixgen.kernels.expert_gemm_kernels`. It reads the weights of each selected expert once, and does not
require sorted rows. The reference is `expert_linear_reference`.
"""

import torch
from torch import Tensor, library

from radixgen.kernels.chip import Chip

MAX_ROWS = 128
"""Beyond it, sorting pays off."""
_BLOCK_N, _BLOCK_K, _STAGES, _WARPS = 128, 64, 5, 8
_SCAN = 512
"""Maximum pairs that a program scans at once."""


def supports(weight: Tensor) -> bool:
    """Return whether the kernel supports these weights, `[experts, outputs, inputs]` or transposed.

    They must be contiguous, half precision, with sizes that fit the blocks of tensor descriptors, on a GPU with such
    descriptors (Hopper and later).
    """
    if not weight.is_cuda or weight.dtype not in (torch.bfloat16, torch.float16) or not weight.is_contiguous():
        return False
    whole = weight.ndim == 3 and weight.shape[1] % _BLOCK_K == 0 and weight.shape[2] % _BLOCK_K == 0
    return whole and Chip.of(weight.device).has_descriptors


def expert_linear_reference(given: Tensor, weight: Tensor, experts: Tensor, transposed: bool) -> Tensor:
    """As `expert_linear`, for any tensors, by copying each pair's weights."""
    rows = given.repeat_interleave(experts.numel() // given.shape[0], 0)
    chosen = weight[experts]
    return torch.bmm(rows[:, None], chosen if transposed else chosen.transpose(1, 2))[:, 0]


def expert_linear(given: Tensor, weight: Tensor, experts: Tensor, transposed: bool) -> Tensor:
    """Multiply rows by the weights of their chosen experts. Pair `i` belongs to row `i // experts_per_row` and uses
    `weight[experts[i]]`. Returns `[pairs, outputs]`.

    `given [rows, inputs]`; `experts` int64 `[pairs]`; `weight [experts, outputs, inputs]`, or
    `[experts, inputs, outputs]` if `transposed`.

    The kernel must support the weights. A row's result is bitwise equal in any batch.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    from radixgen.kernels.expert_gemm_kernels import expert_linear_kernel

    given, experts = given.contiguous(), experts.contiguous()
    result = _empty(given, weight, experts, transposed)
    pairs, outputs = result.shape
    if not pairs:
        return result
    count = weight.shape[0]
    block = [_BLOCK_K, _BLOCK_N] if transposed else [_BLOCK_N, _BLOCK_K]
    blocks = TensorDescriptor.from_tensor(weight.view(-1, weight.shape[2]), block)
    expert_linear_kernel[(-(-outputs // _BLOCK_N), min(pairs, count))](
        given, blocks, experts, result, pairs,
        OUTPUTS=outputs, INPUTS=given.shape[1], SHARE=pairs // given.shape[0], TRANSPOSED=transposed,
        EACH_EXPERT=pairs >= count, BLOCK_M=_block_pairs(pairs, count), BLOCK_N=_BLOCK_N, BLOCK_K=_BLOCK_K,
        STAGES=_STAGES, SCAN=min(_SCAN, _power_of_2(max(16, pairs))), num_warps=_WARPS,
    )  # fmt: skip
    return result


def _block_pairs(pairs: int, experts: int) -> int:
    """Return room for twice the average pairs per expert. With more pairs, an expert's weights are read again."""
    return min(64, _power_of_2(max(16, 2 * pairs // experts)))


def _power_of_2(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _empty(given: Tensor, weight: Tensor, experts: Tensor, transposed: bool) -> Tensor:
    return given.new_empty((experts.numel(), weight.shape[2 if transposed else 1]))


def register() -> None:
    """Register `expert_linear` with PyTorch as `radixgen::expert_linear`, opaque to the compiler."""
    if hasattr(torch.ops.radixgen, "expert_linear"):
        return

    @library.custom_op("radixgen::expert_linear", mutates_args=())
    def operator(given: Tensor, weight: Tensor, experts: Tensor, transposed: bool) -> Tensor:
        return expert_linear(given, weight, experts, transposed)

    @operator.register_fake
    def _(given: Tensor, weight: Tensor, experts: Tensor, transposed: bool) -> Tensor:
        return _empty(given, weight, experts, transposed)
