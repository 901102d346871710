"""Weights of a GGUF file in its own blocks of 4 bits.

transformers dequantizes a file, and for some models permutes rows. So each row of a loaded weight is looked up by its
values, which are unique to it, and gets the codes of the row with these values in the file.
"""

from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixgen.core import UnsupportedModel
from radixgen.kernels.int4_linear import GROUP, Int4Weight

Q4_0, Q4_1 = "Q4_0", "Q4_1"
_MIDDLE = 8
"""Code of zero in Q4_0."""


class GgufBlocks:
    """All rows of a file's tensors in Q4_0 or Q4_1 that are matrices."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        """`dtype`: of the model that was loaded from the file. Raises `UnsupportedModel` if it has no such tensors."""
        from gguf import GGUFReader

        self._weights: list[Int4Weight] = []
        self._rows: dict[bytes, tuple[int, int]] = {}
        """Values of a row, and its tensor and place there"""
        kinds = set()
        for tensor in GGUFReader(path).tensors:
            kind = tensor.tensor_type.name
            kinds.add(kind)
            if kind in (Q4_0, Q4_1) and len(tensor.shape) == 2:
                weight = unpack(np.asarray(tensor.data), kind)
                for row, values in enumerate(_values(weight, dtype)):
                    self._rows.setdefault(values, (len(self._weights), row))
                self._weights.append(weight)
        if not self._weights:
            reason = f"its GGUF file has no matrices in {Q4_0} or {Q4_1}, only {', '.join(sorted(kinds))}"
            raise UnsupportedModel(f"{path.name}: {reason}; use quantization='int8'")

    def find(self, weight: Tensor) -> Int4Weight | None:
        """Return the blocks of a loaded weight `[outputs, inputs]`; None if the file has it in another type."""
        places = [self._rows.get(values) for values in _row_bytes(weight)]
        tensors = {None if place is None else place[0] for place in places}
        if len(tensors) != 1 or None in tensors:
            return None
        rows = torch.tensor([place[1] for place in places if place is not None])
        (tensor,) = (index for index in tensors if index is not None)
        return Int4Weight(*(part[rows] for part in self._weights[tensor]))


def unpack(data: NDArray[np.uint8], kind: str) -> Int4Weight:
    """Read rows of blocks, uint8 `[outputs, bytes]`. A block is a float16 scale, in Q4_1 also a float16 minimum, and 32
    codes: byte i has code i in its low half and code i + 16 in its high half (ggml's `ggml-common.h`).
    """
    head = 1 if kind == Q4_0 else 2
    blocks = data.reshape(data.shape[0], -1, 2 * head + GROUP // 2)
    numbers = np.ascontiguousarray(blocks[..., : 2 * head]).view(np.float16).astype(np.float32)
    halves = blocks[..., 2 * head :]
    codes = np.concatenate((halves & 15, halves >> 4), axis=2).reshape(data.shape[0], -1)
    scales = torch.from_numpy(numbers[..., 0].copy())
    minima = -_MIDDLE * scales if kind == Q4_0 else torch.from_numpy(numbers[..., 1].copy())
    return Int4Weight(torch.from_numpy(codes), scales, minima)


def _values(weight: Int4Weight, dtype: torch.dtype) -> list[bytes]:
    groups = weight.codes.view(len(weight.codes), -1, GROUP).float()
    return _row_bytes((groups * weight.scales[..., None] + weight.minima[..., None]).flatten(1).to(dtype))


def _row_bytes(weight: Tensor) -> list[bytes]:
    """A hash of each row, with one kind of zero."""
    rows = (weight + 0.0).contiguous().view(torch.uint8).numpy()
    return [blake2b(row.data, digest_size=16).digest() for row in rows]
