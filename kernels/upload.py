"""Host arrays onto a device, without waiting for what it does."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def upload(values: NDArray[Any], device: torch.device) -> Tensor:
    """`values` on `device`; on the CPU they may share memory. On a GPU they are copied in the order of the current
    stream, from pinned memory, so that the host goes on at once: a copy from ordinary memory waits for what was begun
    before.
    """
    host = torch.from_numpy(np.ascontiguousarray(values))
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


class Upload:
    """A tensor at a fixed address that the host fills again and again.

    `tensor` is on the device. `fill` gives the array to write to, once the copy before is over; `send` copies all of it
    in the order of the current stream.
    """

    def __init__(self, shape: int | Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self.tensor = torch.zeros(shape, dtype=dtype, device=device)
        self._host = torch.zeros(shape, dtype=dtype, pin_memory=cuda)
        self._copied = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]

    def fill(self) -> NDArray[Any]:
        """The host's array, as it was sent last."""
        if self._copied is not None:
            self._copied.synchronize()
        filled: NDArray[Any] = self._host.numpy()
        return filled

    def send(self) -> None:
        """Copy to the device."""
        self.tensor.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
