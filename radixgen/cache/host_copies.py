"""What copies KV between the slots of a device and those of the host, as the host tier sees it."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Copy(Protocol):
    """A copy of KV in flight."""

    @property
    def seconds(self) -> float:
        """Duration of the copy once it has finished, without waiting for earlier copies."""

    def done(self) -> bool:
        """Whether the copy has finished."""

    def wait(self) -> None:
        """Block until the copy has finished."""


class KVCopies(Protocol):
    """Copies KV between slots of the device and slots of the host. Copies of one direction finish in order.

    Slots are int64 `[tokens]`, those of source and target in the same order.
    """

    num_slots: int
    """Slots of the host."""

    def save(self, slots: NDArray[np.int64], host_slots: NDArray[np.int64]) -> Copy:
        """Begin to copy from the device to the host, after all work that was submitted to the device so far."""

    def load(self, host_slots: NDArray[np.int64], slots: NDArray[np.int64]) -> Copy:
        """Begin to copy from the host to the device, after all work that was submitted to the device so far."""

    def release(self) -> None:
        """Free the memory of the host, once copies in flight have finished."""
