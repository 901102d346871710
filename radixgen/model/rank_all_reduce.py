"""All-reduce over the ranks of the process group, by our own kernel if the GPUs can read each other's memory."""

import logging
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from radixgen.kernels.all_reduce import AllReduce

logger = logging.getLogger(__name__)


class RankAllReduce:
    """All-reduce of this rank with the other ranks."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        """Memory that the other ranks read while it exists; kept until it is replaced."""
        self._sum: AllReduce | None = None
        self._connected = False

    def connect(self, device: torch.device) -> None:
        """Share memory between all ranks if all of their GPUs can read each other's; called on all ranks at the same
        time.

        Works once per process: PyTorch counts the exchanges of a process, and would wait forever for a rank with fewer.
        """
        self._memory, self._sum = None, None
        first, self._connected = not self._connected, True
        if not _all_true(first, device):
            return
        try:
            memory, reduce = _share_memory(device)
        except (RuntimeError, ImportError, AttributeError) as error:  # the interface is experimental
            logger.warning("GPUs do not share memory; all-reduces use PyTorch's library: %s", error)
            _all_true(False, device)
        else:
            if _all_true(True, device):
                self._memory, self._sum = memory, reduce

    def supports(self, dtype: torch.dtype, size: int) -> bool:
        """Return whether a tensor of `size` bytes is reduced by our own kernel, in a few microseconds."""
        return self._kernel(dtype, size) is not None

    def all_reduce(self, data: Tensor) -> None:
        """Sum `data` over all ranks, in place. It is contiguous and on this rank's device."""
        kernel = self._kernel(data.dtype, data.nbytes)
        if kernel is None:
            dist.all_reduce(data)
        else:
            kernel(data)

    def all_reduce_parts(self, parts: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the sum of `parts` `[n, ...]` over `n` and over all ranks, in `dtype`."""
        kernel = self._kernel(dtype, parts[0].numel() * dtype.itemsize)
        if kernel is None:
            data = parts.sum(0).to(dtype)
            dist.all_reduce(data)
        else:
            data = parts.new_empty(parts.shape[1:], dtype=dtype)
            kernel(data, parts)
        return data

    def stop_waiting(self) -> None:
        """Stop waiting for other ranks, whatever the device is running."""
        if self._sum is not None:
            self._sum.stop()

    def _kernel(self, dtype: torch.dtype, size: int) -> "AllReduce | None":
        """Return our own all-reduce if it takes a tensor of `size` bytes."""
        return self._sum if self._sum is not None and self._sum.supports(dtype, size) else None


RANK_ALL_REDUCE = RankAllReduce()
"""The instance of this process, which has one process group."""


def _all_true(fine: bool, device: torch.device) -> bool:
    """Return whether `fine` holds on all ranks."""
    flag = torch.tensor([int(fine)], device=device)
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag.item())


def _share_memory(device: torch.device) -> "tuple[Tensor, AllReduce]":
    from torch.distributed import _symmetric_memory as symmetric_memory

    from radixgen.kernels.all_reduce import AllReduce, shared_bytes

    ranks, rank = dist.get_world_size(), dist.get_rank()
    if not all(torch.cuda.can_device_access_peer(rank, peer) for peer in range(ranks) if peer != rank):
        raise RuntimeError("the GPUs cannot access each other's memory")
    memory = symmetric_memory.empty(shared_bytes(ranks), dtype=torch.uint8, device=device)
    memory.zero_()
    torch.cuda.synchronize(device)
    handle = symmetric_memory.rendezvous(memory, dist.group.WORLD)  # type: ignore[arg-type]
    return memory, AllReduce(handle.buffer_ptrs, rank, device)
