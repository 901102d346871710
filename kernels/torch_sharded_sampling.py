"""One rank's part in draws from sharded logits, in PyTorch; `radixgen.kernels.triton_sharded_sampling` is for GPUs."""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from radixgen.kernels.draw_settings import ROW, UNIFORM, UNIT


class Shard(NamedTuple):
    """A rank's part of the vocabulary."""

    rank: int
    ranks: int
    first: int
    """Token of the first column"""
    most: int
    """Columns of the rank that has most"""


class BlockWeights(NamedTuple):
    """What is known of blocks of tokens, each `[draws, blocks]`."""

    tops: Tensor
    """Largest logit; NaN if the block holds NaN or +inf."""
    masses: Tensor
    """Sum of the weights, relative to the block's largest logit."""
    best: Tensor
    """First token with the largest logit."""

    @classmethod
    def of(cls, packed: Tensor) -> "BlockWeights":
        """Return the parts of one tensor, `[3, draws, blocks]`, in which tokens are integers of the same size."""
        tops, masses, best = packed
        return cls(tops, masses, best.view(torch.int32 if packed.dtype == torch.float32 else torch.int64))


class ShardSampler(Protocol):
    """One rank's part in the draws of a step."""

    def weigh(self, floors: Tensor | None) -> Tensor:
        """Weigh the rank's blocks. With `floors` `[draws]`, only logits that reach them have a weight.

        Returns what `BlockWeights.of` takes apart, in float32 or float64, of as many blocks on each rank.
        """

    def choose(self, blocks: BlockWeights, floors: Tensor | None) -> Tensor:
        """Return the tokens, int64 `[draws]`, given the blocks of all ranks: -1 if the row is invalid, and 0 for tokens
        that another rank has. What all ranks know, rank 0 returns.
        """


class TorchShardSampler:
    """As `ShardSampler`, in PyTorch and float64. A rank's part of the vocabulary is one block."""

    def __init__(self, logits: Tensor, shard: Shard, settings: Tensor) -> None:
        self._scores = logits.index_select(0, settings[ROW].long()).double()
        self._shard, self._unit, self._uniform = shard, settings[UNIT], settings[UNIFORM]
        self._top, best = self._scores.max(-1)
        broken = (self._scores.isnan() | self._scores.isposinf()).any(-1, keepdim=True)
        self._tops = torch.where(broken, math.nan, self._top[:, None])
        self._best = shard.first + best[:, None]

    def weigh(self, floors: Tensor | None) -> Tensor:
        """As `ShardSampler.weigh`."""
        masses = weights_of(self._kept(floors), self._top, self._unit).sum(-1, keepdim=True)
        return torch.stack([self._tops, masses, self._best.view(torch.float64)])

    def choose(self, blocks: BlockWeights, floors: Tensor | None) -> Tensor:
        """As `ShardSampler.choose`."""
        tops, rank = blocks.tops, self._shard.rank
        top = tops.amax(-1)
        likeliest = torch.where(tops == top[:, None], blocks.best, torch.iinfo(torch.int64).max).amin(-1)
        ends = (blocks.masses * weights_of(tops, top, self._unit)).cumsum(-1)
        target = self._uniform * ends[:, -1]
        chosen = _first_beyond(ends, target)
        before = ends[:, rank - 1] if rank else torch.zeros_like(target)
        reached = before[:, None] + weights_of(self._kept(floors), top, self._unit).cumsum(-1)
        own = torch.where(chosen == rank, self._shard.first + _first_beyond(reached, target), 0)
        common = torch.where(top.isfinite(), likeliest, -1) if rank == 0 else torch.zeros_like(own)
        return torch.where((self._unit > 0) & top.isfinite(), own, common)

    def _kept(self, floors: Tensor | None) -> Tensor:
        return self._scores if floors is None else self._scores.masked_fill(self._scores < floors[:, None], -math.inf)


def _first_beyond(ends: Tensor, target: Tensor) -> Tensor:
    """Return the first place at which a cumulative sum `[draws, n]` exceeds `target` `[draws]`, or the last at which it
    grows.
    """
    grows = ends.diff(dim=-1, prepend=torch.zeros_like(ends[:, :1])) > 0
    place = torch.arange(ends.shape[-1], device=ends.device)
    last = torch.where(grows, place, 0).amax(-1)
    return torch.minimum(torch.where(ends > target[:, None], place, ends.shape[-1]).amin(-1), last)


def weights_of(scores: Tensor, top: Tensor, unit: Tensor) -> Tensor:
    """Return powers of two of logits `[draws, ...]`, 1 for the largest of a draw, `top` `[draws]`; 0 if that is
    -inf.
    """
    return torch.exp2((scores - torch.where(top.isneginf(), 0.0, top)[:, None]) * unit[:, None])
