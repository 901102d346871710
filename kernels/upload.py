"""Copies from host to device that do not block the host: copies from pageable memory would wait for earlier work."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def upload(values: NDArray[Any], device: torch.device) -> Tensor:
    """Copy `values` to `device`; on the CPU they may share memory.

    On a GPU the copy is ordered in the current stream, from pinned memory, and the host does not wait.
    """
    host = torch.from_numpy(np.ascontiguousarray(values))
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


class Staging:
    """Pinned memory from which one tensor is filled repeatedly, in the order of the current stream."""

    def __init__(self, target: Tensor) -> None:
        """On the CPU, the tensor is filled directly."""
        self._target = target
        self._copied = torch.cuda.Event() if target.is_cuda else None  # type: ignore[no-untyped-call]
        self._host = torch.zeros_like(target, device="cpu", pin_memory=True) if target.is_cuda else target
        self._array: NDArray[Any] = self._host.numpy()

    def open(self) -> NDArray[Any]:
        """Return the memory, of the tensor's shape, to be changed. Waits only for the last copy."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._array

    def copy(self) -> None:
        """Start copying the memory to the tensor."""
        if self._copied is not None:
            self._target.copy_(self._host, non_blocking=True)
            self._copied.record()
