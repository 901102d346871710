"""What our kernels need to know of a GPU: what it can do, and how much of it there is.

Kernels and launches read a `Chip` and nothing else of the device. Another target needs its properties here, and sizes
of launches in `radixgen.kernels.triton_backend`.

| kernels | need |
| --- | --- |
| attention, sampling, writes of KV | any chip that Triton compiles for |
| bulk copies of keys, experts' products | `has_descriptors` |
| attention of wide tiles, products of few rows | `is_hopper`, and Gluon (`radixgen.kernels.gluon_support`) |
| launches that begin while the ones before end | `overlaps` |
| FP8 keys | `has_fp8` |

Sizes of programs (warps, stages, registers) follow from `shared_bytes` and the shape of a model's heads
(`radixgen.kernels.triton_backend.choose_launch`).
"""

from dataclasses import dataclass

import torch

WARP = 32
"""Threads of a warp."""


@dataclass(frozen=True, slots=True)
class Chip:
    """Properties of a GPU that determine launches."""

    capability: int
    """80 for sm_80, 90 for sm_90."""
    multiprocessors: int

    @classmethod
    def of(cls, device: torch.device) -> "Chip":
        """Return the chip of a device; for the interpreter, which has none, a small one like sm_90."""
        if device.type != "cuda":
            return cls(90, 3)
        properties = torch.cuda.get_device_properties(device)
        return cls(10 * properties.major + properties.minor, properties.multi_processor_count)

    @property
    def shared_bytes(self) -> int:
        """Shared memory per multiprocessor available to blocks of keys in flight."""
        return (208 if self.capability >= 90 else 144) * 1024

    @property
    def is_hopper(self) -> bool:
        return self.capability == 90

    @property
    def has_descriptors(self) -> bool:
        """Whether blocks of a tensor are copied in bulk, by a descriptor (TMA)."""
        return self.capability >= 90

    @property
    def overlaps(self) -> bool:
        """Whether a launch may begin while the previous one ends (programmatic dependent launch)."""
        return self.capability >= 90

    @property
    def has_fp8(self) -> bool:
        return self.capability >= 89
