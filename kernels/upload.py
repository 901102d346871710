"""Host arrays onto a device, without waiting for it."""

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
