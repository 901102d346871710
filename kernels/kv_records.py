"""KV of all layers as one record per token, for copies between the device and other memory.

A record holds the token's part of each tensor, in order: K and V of each layer, and the scales of 8-bit ones. So a
token's KV is contiguous in the other memory, whatever the number of layers, and a copy of few tokens is large.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import accumulate

import torch
from torch import Tensor

from radixgen.kernels.quantized import KV, QuantizedKV, as_bytes

_WORD = 4
_BLOCK = 512
"""Words that a program of the kernel copies at once."""


class KVRecords:
    """Packs tokens of `pools` into records of `size` bytes, and unpacks them."""

    def __init__(self, pools: Sequence[KV], *, kernel: bool | None = None) -> None:
        """`pools`: K and V of each layer, `[slots, kv_heads, dim]`, in the order of the record. `kernel`: whether one
        Triton kernel copies all of them; by default on a GPU.
        """
        self._parts = [part for pool in pools for part in _parts(pool)]
        self._sizes = [part[0].numel() * part.itemsize for part in self._parts]
        self.size = sum(self._sizes)
        if kernel is None:
            kernel = self._parts[0].is_cuda and find_spec("triton") is not None
        whole_words = all(size % _WORD == 0 for size in self._sizes)
        self._table = self._word_table() if kernel and whole_words else None

    def warm_up(self) -> None:
        """Compile the kernel, if there is one, by copying a token to a record and back. Nothing else may use the pools
        meanwhile.
        """
        if self._table is not None:
            slots = torch.zeros(1, dtype=torch.int64, device=self._table.device)
            records = torch.empty((1, self.size), dtype=torch.uint8, device=self._table.device)
            self.pack(slots, records)
            self.unpack(records, slots)

    def pack(self, slots: Tensor, records: Tensor) -> None:
        """Copy the KV of `slots` int64 `[tokens]` to `records` uint8 `[tokens, size]`, contiguous."""
        if self._table is not None:
            self._launch(self._table, slots, records, pack=True)
            return
        for part, record in zip(self._parts, torch.split(records, self._sizes, 1), strict=True):
            record.copy_(part[slots].contiguous().view(torch.uint8).view(record.shape))

    def unpack(self, records: Tensor, slots: Tensor) -> None:
        """Copy `records` uint8 `[tokens, size]`, contiguous, to `slots` int64 `[tokens]`, which are distinct."""
        if self._table is not None:
            self._launch(self._table, slots, records, pack=False)
            return
        for part, record in zip(self._parts, torch.split(records, self._sizes, 1), strict=True):
            part.index_copy_(0, slots, record.contiguous().view(part.dtype).view(-1, *part.shape[1:]))

    def _word_table(self) -> Tensor:
        """For each part: its address, its strides between slots and between words, its words, and its first word in a
        record; `[parts, 5]` int64.
        """
        starts = accumulate(self._sizes, initial=0)
        rows = [
            [part.data_ptr(), *_word_strides(part), size // _WORD, start // _WORD]
            for part, size, start in zip(self._parts, self._sizes, starts, strict=False)
        ]
        return torch.tensor(rows, dtype=torch.int64, device=self._parts[0].device)

    def _launch(self, table: Tensor, slots: Tensor, records: Tensor, *, pack: bool) -> None:
        from radixgen.kernels.kv_record_kernels import kv_records_kernel

        if slots.numel():
            kv_records_kernel[(slots.numel(), table.shape[0])](
                table, slots, records.view(torch.int32), SIZE=self.size // _WORD, BLOCK=_BLOCK, PACK=pack
            )


def _parts(pool: KV) -> list[Tensor]:
    """Return the tensors of a pool, slots first."""
    if isinstance(pool, QuantizedKV):
        return [as_bytes(pool.data), pool.scales.T]
    return [pool]


def _word_strides(part: Tensor) -> tuple[int, int]:
    """Return the strides between slots, and between words of a slot, in words."""
    if part.is_contiguous():
        return part[0].numel() * part.itemsize // _WORD, 1
    return part.stride(0), part.stride(1)  # scales, of a word each
