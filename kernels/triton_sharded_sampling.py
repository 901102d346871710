"""Sampling from a part of the vocabulary on a GPU, by the kernels of `radixgen.kernels.sampling_kernels`."""

import math

import torch
import triton
from torch import Tensor

from radixgen.kernels import sampling_kernels
from radixgen.kernels.sharded_sampling import BlockWeights, Shard
from radixgen.kernels.triton_sampling import BLOCK


class TritonShardSampler:
    """As `radixgen.kernels.sharded_sampling.ShardSampler`, in float32. Each rank has the same number of blocks."""

    def __init__(self, logits: Tensor, shard: Shard, settings: Tensor) -> None:
        """Logits not in float64."""
        self._logits = logits if logits.stride(-1) == 1 else logits.contiguous()
        self._shard, self._settings = shard, settings
        self._draws, self._width = settings.shape[1], logits.shape[1]
        self._blocks = triton.cdiv(shard.most, BLOCK)
        self._tops, self._masses = (self._empty(torch.float32) for _ in range(2))
        self._best = self._empty(torch.int32)
        self._no_floors = torch.full((self._draws,), -math.inf, device=logits.device)
        self._weigh(None)

    def weigh(self, floors: Tensor | None) -> BlockWeights:
        """As `ShardSampler.weigh`."""
        if floors is not None:
            self._weigh(floors)
        return BlockWeights(self._tops, self._masses, self._best)

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
            self._tops, self._masses, self._best, self._width, self._shard.first, self._draws, self._blocks,
            BLOCK=BLOCK, FILTERED=floors is not None, num_warps=4,
        )  # fmt: skip

    def _empty(self, dtype: torch.dtype) -> Tensor:
        return torch.empty((self._draws, self._blocks), dtype=dtype, device=self._logits.device)
