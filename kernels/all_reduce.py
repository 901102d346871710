"""One-shot all-reduce over the GPUs of one host.

Library all-reduces are made for many hosts and long messages. Between GPUs that read each other's memory, two passes
over NVLink suffice: each rank copies its data to memory that its peers can read, then all ranks add everything up in
the same order. The kernel is in `radixgen.kernels.all_reduce_kernels`; the reference is `torch.distributed.all_reduce`.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from radixgen.kernels.all_reduce_kernels import all_reduce_kernel
from radixgen.kernels.chip import Chip
from radixgen.kernels.triton_backend import overlaps
from radixgen.kernels.work import pdl

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32)
MAX_PROGRAMS = 512
_BLOCK = 4096
"""Maximum elements that a program sums at a time."""
_LEAST = 512
"""Minimum elements per program, so that small sums need few programs to wait for each other."""
_ROOM = 4 * _BLOCK
"""Bytes of a block of the widest elements. Each program has two rooms."""
_ROOMS = MAX_PROGRAMS * 2 * _ROOM
_LARGEST = 4 << 20
"""Bytes of the largest tensor with two ranks. Beyond it, a library that leaves most of the chip to others is faster in
a step, though not by itself.
"""
_LARGEST_OF_MANY = 1 << 20
"""Bytes of the largest tensor with more ranks, each of which reads it from all others."""
_LOOKS = 1 << 18
"""Polls of a peer's flag, together a fraction of a second, between two checks whether to stop waiting."""
_FLAG = 8
"""Bytes of one rank's flag for one program."""


def shared_bytes(ranks: int) -> int:
    """Return the bytes that every rank shares with all others, zeroed before the first sum: rooms, then flags."""
    return _ROOMS + MAX_PROGRAMS * ranks * _FLAG


class AllReduce:
    """All-reduce of one rank. As in any collective, all ranks sum tensors of the same sizes in the same order."""

    def __init__(self, addresses: Sequence[int], rank: int, device: torch.device) -> None:
        """`addresses`: address of each rank's `shared_bytes` in this rank's address space, by rank."""
        self._rank, self._size = rank, len(addresses)
        self._rooms = torch.tensor(addresses, dtype=torch.int64, device=device)
        self._flags = self._rooms + _ROOMS
        self._rounds = torch.zeros(MAX_PROGRAMS, dtype=torch.int64, device=device)
        self._stop = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._overlap = device.type == "cuda" and overlaps(Chip.of(device))

    def supports(self, dtype: torch.dtype, size: int) -> bool:
        """Return whether the kernel handles a tensor: a small one, in a dtype of `DTYPES`."""
        return dtype in DTYPES and size <= (_LARGEST if self._size == 2 else _LARGEST_OF_MANY)

    def __call__(self, data: Tensor, parts: Tensor | None = None) -> None:
        """Write the sum over all ranks into contiguous `data`, with the same bits on each rank.

        Each rank contributes `data`; with `parts` (float32 `[n, *data.shape]`), their rounded sum instead. Floats are
        added in float32.
        """
        count, number = data.numel(), 1 if parts is None else parts.shape[0]
        block = min(max(triton.next_power_of_2(triton.cdiv(count, MAX_PROGRAMS)), _LEAST), _BLOCK)
        all_reduce_kernel[(min(triton.cdiv(count, block), MAX_PROGRAMS),)](
            data, data if parts is None else parts, count, self._rooms, self._flags, self._rounds, self._stop,
            RANK=self._rank, SIZE=self._size, BLOCK=block, ROOM=_ROOM // data.element_size(), PARTS=number,
            LOOKS=_LOOKS, PDL=self._overlap, num_warps=4 if block <= 2048 else 8, **pdl(self._overlap),
        )  # fmt: skip

    def stop(self) -> None:
        """Stop waiting for peers. Sums from now on are invalid."""
        self._stop.fill_(1)
