"""Logits of which each rank of a sharded model has some columns, and what the ranks do with them together."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from radixgen.core import SamplingParams
from radixgen.kernels.draw_settings import draw_settings
from radixgen.kernels.drawable_tokens import DrawableTokens
from radixgen.kernels.sharded_sampling import draw_tokens
from radixgen.kernels.torch_sharded_sampling import Shard
from radixgen.model.collectives import GatherColumns, Rank, gather_ranks
from radixgen.model.graphs import Agree
from radixgen.model.lockstep import RankCommand, pack
from radixgen.model.reference import close_to
from radixgen.model.tree_model import TreeModel

Together = Callable[[bytes, Callable[[], Tensor]], Tensor]
"""Sends a command to the other ranks, and returns the result of this rank's part in it."""


class RankLogits:
    """A rank's columns of the logits of the last step, and its part in what all ranks do with theirs."""

    last: Tensor
    """`[n, columns]`"""
    drawable: DrawableTokens | None = None
    """The tokens that may be drawn, as the ranks know them; set on rank 0."""

    def __init__(self, head: GatherColumns, rank: Rank) -> None:
        """`head`: the end of the model's last layer."""
        most = -(-head.width // head.size)
        self.shard = Shard(rank.index, rank.size, min(rank.index * most, head.width), most)
        self.width = head.width
        """Columns of all ranks."""
        self._head = head
        self._own_drawable: DrawableTokens | None = None

    @property
    def columns(self) -> slice:
        """The rank's columns of all logits."""
        return slice(self.shard.first, min(self.shard.first + self.shard.most, self.width))

    @torch.inference_mode()
    def gather(self) -> Tensor:
        """Return the logits of all ranks, `[n, width]`."""
        return self._head.gather(self.last)

    @torch.inference_mode()
    def draw(self, settings: NDArray[np.float64], excluded: NDArray[np.int64] | None = None) -> Tensor:
        """As `radixgen.kernels.sharded_sampling.draw_tokens`. `excluded`: tokens below `width` that must not be drawn
        in this call and later ones, ascending; by default as before.
        """
        if excluded is not None:
            own = excluded[(excluded >= self.columns.start) & (excluded < self.columns.stop)] - self.columns.start
            self._own_drawable = DrawableTokens(own, self.last.shape[1]) if own.size else None
        logits = self.last if self._own_drawable is None else self._own_drawable.among(self.last)
        return draw_tokens(logits, self.shard, settings, gather_ranks)


class StepOfRanks:
    """The logits of all ranks' last step, on rank 0: a `radixgen.kernels.sharded_sampling.ShardedLogits`."""

    def __init__(self, own: RankLogits, together: Together) -> None:
        self._own, self._together = own, together
        self._last = own.last
        self._whole: Tensor | None = None

    def __len__(self) -> int:
        return self._last.shape[0]

    def gather(self) -> Tensor:
        """As `ShardedLogits.gather`. The ranks communicate at the first call."""
        if self._whole is None:
            self._whole = self._run(RankCommand.GATHER, [], self._own.gather)
        return self._whole

    def draw_tokens(
        self,
        rows: Sequence[int],
        params: Sequence[SamplingParams],
        uniforms: NDArray[np.float64],
        drawable: DrawableTokens | None,
    ) -> Tensor:
        """As `ShardedLogits.draw_tokens`."""
        sent: list[NDArray[Any]] = [draw_settings(rows, params, uniforms)]
        if drawable is not self._own.drawable:
            self._own.drawable = drawable
            sent.append(_excluded(drawable, self._own.width))
        return self._run(RankCommand.DRAW, sent, partial(self._own.draw, *sent))

    def _run(self, command: RankCommand, sent: Sequence[NDArray[Any]], take_part: Callable[[], Tensor]) -> Tensor:
        assert self._own.last is self._last, "the model has run another step"
        return self._together(pack(command, sent), take_part)


def shard_logits(model: TreeModel, rank: Rank, agree: Agree) -> RankLogits | None:
    """Let a sharded model return only this rank's columns of the logits, and return what draws from them.

    Returns None, with nothing changed, if the model's head is not sharded, or if the code behind the head does more
    than change each logit by itself.
    """
    head = _head(model.model)
    if head is None:
        return None
    logits = RankLogits(head, rank)
    expected = model.probe()[:, logits.columns]
    head.gathers = False
    try:
        own = model.probe()
        same = own.shape == expected.shape and all(map(close_to, own, expected))
    except (IndexError, RuntimeError, ValueError):
        same = False
    if agree(same):
        return logits
    head.gathers = True
    return None


def _head(model: nn.Module) -> GatherColumns | None:
    """Return the module that gathers the logits, or None if they are computed whole."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    last = head[-1] if isinstance(head, nn.Sequential) else None
    return last if isinstance(last, GatherColumns) else None


def _excluded(drawable: DrawableTokens | None, width: int) -> NDArray[np.int64]:
    """Return the tokens below `width` that must not be drawn, ascending."""
    if drawable is None:
        return np.empty(0, np.int64)
    return np.concatenate([drawable.others, np.arange(drawable.vocab_size, width)])
