"""Memory that is shared by those who run one after the other."""

import torch
from torch import Tensor


class Scratch:
    """Memory in which nothing is kept from one layer to the next. What was handed out stays valid when more is asked
    for.
    """

    def __init__(self, device: torch.device) -> None:
        self._held = torch.empty(0, dtype=torch.float32, device=device)

    def floats(self, count: int) -> Tensor:
        """Uninitialized float32 `[count]`, the same memory each time, but where there is too little."""
        if self._held.numel() < count:
            self._held = self._held.new_empty(count)
        return self._held[:count]
