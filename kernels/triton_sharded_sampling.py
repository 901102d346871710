"""Sampling from a part of the vocabulary on a GPU, by the kernels of `radixgen.kernels.sampling_kernels`."""

import math

import torch
import triton
from torch import Tensor

from radixgen.kernels import sampling_kernels
from radixgen.kernels.torch_sharded_sampling import BlockWeights, Shard
from radixgen.kernels.triton_sampling import BLOCK

_MULTIPLE = 4
"""Divides a rank's blocks, so that packed tensors are aligned to 16 bytes: Triton compiles anew for other addresses."""


class TritonShardSampler:
    """As `radixgen.kernels.torch_sharded_sampling.ShardSampler`, in float32. Ranks have equally many blocks."""

    def __init__(self, logits: Tensor, shard: Shard, settings: Tensor) -> None:
        """Logits not in float64."""
        self._logits = logits if logits.stride(-1) == 1 else logits.contiguous()
        self._shard, self._settings = shard, settings
        self._draws, self._width = settings.shape[1], logits.shape[1]
        self._blocks = _MULTIPLE * triton.cdiv(shard.most, _MULTIPLE * BLOCK)
        self._packed = torch.empty((3, self._draws, self._blocks), device=logits.device)
        self._no_floors = torch.full((self._draws,), -math.inf, device=logits.device)
        self._weigh(None)

    def weigh(self, floors: Tensor | None) -> Tensor:
        """As `ShardSampler.weigh`."""
        if floors is not None:
            self._weigh(floors)
        return self._packed

    def choose(self, blocks: BlockWeights, floors: Tensor | None) -> Tensor:
        """As `ShardSampler.choose`."""
        tokens = self._logits.new_empty(self._draws, dtype=torch.int64)
        count = blocks.tops.shape[1]
        sampling_kernels.choose[(self._draws,)](
            self._logits, self._logits.stride(0), self._settings, self._no_floors if floors is None else floors,
            *blocks, tokens, self._width, self._shard.first, self._draws, count,
            self._shard.rank * self._blocks, self._blocks,
            BLOCKS=triton.next_power_of_2(count), BLOCK=BLOCK, FILTERED=floors is not None, num_warps=4,
        )  # fmt: skip
        return tokens

    def _weigh(self, floors: Tensor | None) -> None:
        sampling_kernels.weigh_blocks[(self._blocks, self._draws)](
            self._logits, self._logits.stride(0), self._settings, self._no_floors if floors is None else floors,
            *BlockWeights.of(self._packed), self._width, self._shard.first, self._draws, self._blocks,
            BLOCK=BLOCK, FILTERED=floors is not None, num_warps=4,
        )  # fmt: skip
