"""Sampling from logits of which each rank has a part: ranks send each other what a draw needs, and no logits.

A draw inverts the cumulative distribution in the order of token ids, as in `radixgen.kernels.torch_sampling`. Its token
follows from these figures:

- of each block of tokens the largest logit, the first token that has it, and the sum of its weights. The first two are
  enough for greedy draws. For others the sums tell in which block the token is; the rank with that block finds it.
- with top-k, the `k` largest logits of each rank. The `k` largest of all are among them, and the least of these is the
  *floor* of the draw: all ranks keep what reaches it, ties included.
- top-p after top-k is a higher floor, and so is min-p. The former follows from the same `k` logits and the sum of all
  weights, the latter from the largest logit.

So greedy draws, and draws with any temperature, min-p, and a top-k of at most `MAX_TOP_K`, are exact. Top-p without
top-k, which may keep any number of tokens, is not among them. As between all implementations, draws are the same except
for a uniform within 1e-6 of the boundary between two tokens.
"""

import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixgen.core import SamplingParams
from radixgen.kernels.draw_settings import MIN_P, ROW, TOP_K, TOP_P, UNIT
from radixgen.kernels.drawable_tokens import DrawableTokens
from radixgen.kernels.torch_sharded_sampling import BlockWeights, Shard, ShardSampler, TorchShardSampler, weights_of
from radixgen.kernels.upload import upload

MAX_TOP_K = 256
"""Maximum top-k of a draw from sharded logits. Beyond, the ranks would send each other about as much as the logits."""

Gather = Callable[[Tensor], Tensor]
"""Returns an int32 tensor of each rank, which all have the same shape: `[ranks, *shape]`."""


class ShardedLogits(Protocol):
    """Logits `[n, vocab]` of a step, of which each rank has some columns. Invalid once the model runs another step."""

    def __len__(self) -> int:
        """Return `n`."""

    def gather(self) -> Tensor:
        """Return the logits whole, as `Model.run`."""

    def draw_tokens(
        self,
        rows: Sequence[int],
        params: Sequence[SamplingParams],
        uniforms: NDArray[np.float64],
        drawable: DrawableTokens | None,
    ) -> Tensor:
        """As `radixgen.kernels.torch_sampling.draw_tokens`, of drawable tokens, for params that `is_exact` allows."""


def is_exact(params: SamplingParams) -> bool:
    """Return whether a draw with these parameters is exact without all logits."""
    return params.greedy or (params.top_k <= MAX_TOP_K and (params.top_k > 0 or params.top_p >= 1.0))


def draw_tokens(logits: Tensor, shard: Shard, settings: NDArray[np.float64], gather: Gather) -> Tensor:
    """Draw one token per draw; called on all ranks at the same time.

    `logits` `[rows, columns]`: those of the rank; perhaps fewer columns than its part of the vocabulary, or none.
    `settings`: as returned by `draw_settings`, of draws that `is_exact` allows.

    Returns tokens, int64 `[draws]`, on rank 0 as `radixgen.kernels.torch_sampling.draw_tokens`.
    """
    if not logits.shape[1]:
        logits = logits.new_full((logits.shape[0], 1), -math.inf)
    on_device = upload(settings, logits.device)
    sampled = settings[UNIT] > 0.0
    sampler = _sampler(logits, shard, on_device)
    floors, largest = None, None
    if (settings[TOP_K, sampled] > 0).any():
        count = min(int(settings[TOP_K, sampled].max()), shard.most)
        largest = _largest(logits, count, gather).index_select(0, on_device[ROW].long())
        floors = _top_k_floors(largest, on_device)
    blocks = _gather_blocks(sampler.weigh(floors), gather)
    if (settings[TOP_P, sampled] < 1.0).any() or (settings[MIN_P, sampled] > -math.inf).any():
        floors = _raised_floors(floors, largest, blocks, on_device)
        blocks = _gather_blocks(sampler.weigh(floors), gather)
    tokens = sampler.choose(blocks, floors)
    return gather(tokens.int()).sum(0) if sampled.any() else tokens


def _sampler(logits: Tensor, shard: Shard, settings: Tensor) -> ShardSampler:
    """Return the Triton implementation on a GPU if Triton is installed, else PyTorch's."""
    if not logits.is_cuda or logits.dtype == torch.float64 or find_spec("triton") is None:
        return TorchShardSampler(logits, shard, settings)
    from radixgen.kernels.triton_sharded_sampling import TritonShardSampler

    return TritonShardSampler(logits, shard, settings)


def _largest(logits: Tensor, count: int, gather: Gather) -> Tensor:
    """Return the `count` largest logits of each rank, descending, `[rows, ranks * count]`; -inf where it has fewer."""
    own = logits.topk(min(count, logits.shape[1]), -1).values
    own = torch.nn.functional.pad(own, (0, count - own.shape[1]), value=-math.inf)
    own = own if own.dtype == torch.float64 else own.float()
    parts = gather(own.contiguous().view(torch.int32)).view(own.dtype)
    return parts.transpose(0, 1).flatten(1).sort(-1, descending=True).values


def _top_k_floors(largest: Tensor, settings: Tensor) -> Tensor:
    """Return the least logit that top-k keeps, `[draws]`; -inf for draws without top-k. `largest`: by draw."""
    wanted = (settings[TOP_K] > 0) & (settings[UNIT] > 0)
    index = (settings[TOP_K].clamp(1, largest.shape[1]) - 1).long()
    floors = largest.gather(-1, index[:, None])[:, 0]
    return torch.where(wanted, floors, -math.inf)


def _raised_floors(floors: Tensor | None, largest: Tensor | None, blocks: BlockWeights, settings: Tensor) -> Tensor:
    """Raise the floors, if any, to what top-p and min-p keep, `[draws]`. The most likely token is always kept."""
    unit = settings[UNIT]
    top = blocks.tops.amax(-1).double()
    raised = top + settings[MIN_P] / unit.clamp(min=1e-300)
    if floors is not None and largest is not None:
        raised = torch.maximum(raised, floors.double())
        weights = weights_of(largest.double(), top, unit) * (largest >= floors[:, None])
        total = (blocks.masses * weights_of(blocks.tops.double(), top, unit)).sum(-1)
        kept = (weights.cumsum(-1) - weights < (settings[TOP_P] * total)[:, None]) & (largest >= floors[:, None])
        least = torch.where(kept, largest.double(), math.inf).amin(-1)
        raised = torch.maximum(raised, torch.where(settings[TOP_P] < 1.0, least, -math.inf))
    raised = torch.where(unit > 0, torch.minimum(raised, top), -math.inf)
    return raised.to(blocks.tops.dtype)


def _gather_blocks(own: Tensor, gather: Gather) -> BlockWeights:
    """Return the blocks of all ranks, in the order of tokens. `own`: as returned by `ShardSampler.weigh`."""
    parts = gather(own.view(torch.int32)).view(own.dtype)
    return BlockWeights.of(parts.permute(1, 2, 0, 3).flatten(2).contiguous())
