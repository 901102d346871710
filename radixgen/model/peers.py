"""Sums over the ranks of the process group: by our own kernel where their GPUs read each other's memory."""

import logging
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from radixgen.kernels.all_reduce import AllReduce

logger = logging.getLogger(__name__)


class Peers:
    """What this rank shares with the others."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        """Which the others read as long as it lives; it is kept until there is another one."""
        self._sum: AllReduce | None = None

    def meet(self, device: torch.device, store: dist.FileStore) -> None:
        """Let the ranks read each other's memory, where all of their GPUs can; all of them do this at the same time.

        They find each other by `store`, a file of which no other group of ranks knows.
        """
        try:
            shared = _share(device, store)
        except (RuntimeError, ImportError, AttributeError) as error:  # of an interface that PyTorch calls unfinished
            logger.info("GPUs don't share memory, so that PyTorch's library adds up: %s", error)
            shared = None
        agreed = torch.tensor([int(shared is not None)], device=device)
        dist.all_reduce(agreed, dist.ReduceOp.MIN)
        self._memory, self._sum = shared if shared and agreed.item() else (None, None)

    def add_up(self, data: Tensor) -> None:
        """Put the sum over all ranks in its place."""
        if self._sum is not None and data.is_cuda and self._sum.supports(data):
            self._sum(data)
        else:
            dist.all_reduce(data)

    def part(self) -> None:
        """Wait for no other rank any more, whatever the device still does."""
        if self._sum is not None:
            self._sum.stop()


PEERS = Peers()
"""Of this process, as it has one process group."""


def _share(device: torch.device, store: dist.FileStore) -> "tuple[Tensor, AllReduce] | None":
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if not all(torch.cuda.can_device_access_peer(rank, peer) for peer in range(ranks) if peer != rank):
        return None
    from torch.distributed import _symmetric_memory as symmetric_memory

    from radixgen.kernels.all_reduce import AllReduce, shared_bytes

    name = store.path  # PyTorch remembers a group by its name, and would take any two worlds of a process for one
    symmetric_memory._SymmetricMemory.set_group_info(name, rank, ranks, dist.PrefixStore("memory", store))
    memory = symmetric_memory.empty(shared_bytes(ranks), dtype=torch.uint8, device=device)
    memory.zero_()
    torch.cuda.synchronize(device)
    addresses = symmetric_memory.rendezvous(memory, name).buffer_ptrs  # type: ignore[arg-type]
    return memory, AllReduce(addresses, rank, device)
