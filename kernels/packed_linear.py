"""Matrix products on a CPU whose weights are packed once, in the layout that oneDNN reads fastest.

`torch.nn.functional.linear` packs weights anew in each product, which takes longer than a product with few rows; the
packed product is the faster one for any number of rows. `linear` of PyTorch is the reference, and is used for weights
that are not supported.
"""

import torch
from torch import Tensor

_ROWS = 64
"""Rows that the layout is chosen for. It is as fast as any other from 1 to 2,048 rows."""


def supports(weight: Tensor) -> bool:
    """Return whether this weight `[outputs, inputs]` can be packed: float32, or a half precision that oneDNN multiplies
    on this processor, which must have AVX2.
    """
    if weight.device.type != "cpu" or weight.numel() == 0 or not torch._C._has_mkldnn:
        return False
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if weight.dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return weight.dtype == torch.float32


def pack(weight: Tensor) -> Tensor:
    """Return a packed copy of a supported weight, which only `linear` and `unpack` can read."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
    return packed


def unpack(packed: Tensor) -> Tensor:
    """Return the weight `[outputs, inputs]`, bit for bit."""
    return packed.to_dense()


def linear(given: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply `given [..., inputs]` by a packed weight, and add `bias [outputs]`; `[..., outputs]` in the dtype of
    `given`.
    """
    output: Tensor = torch.ops.mkldnn._linear_pointwise(given, packed, bias, "none", [], "")
    return output
