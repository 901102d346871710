"""Host arrays onto a device, without waiting for it."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def upload(values: NDArray[Any], device: torch.device) -> Tensor:
    """A copy of `values` on `device`. On a GPU it is made in the order of the current stream, from pinned memory: the
    host goes on at once, where a copy from ordinary memory waits for all that was given to the device before.
    """
    host = torch.from_numpy(np.ascontiguousarray(values))
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
