"""`DrawableTokens`: the tokens that may be sampled, if not all."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class DrawableTokens:
    """The tokens that may be sampled, if not all: a model may have more tokens than its tokenizer.

    The others are sampled as if the model gave them no probability. Reported log-probabilities remain the model's own.
    """

    def __init__(self, others: NDArray[np.int64], vocab_size: int) -> None:
        """`others`: tokens below `vocab_size` that must not be sampled, ascending, at least one and not all."""
        self.others, self.vocab_size = others, vocab_size
        self.count = vocab_size - others.size
        last = vocab_size - 1
        for token in others[::-1]:
            if token != last:
                break
            last -= 1
        self._width = last + 1
        self._holes = torch.from_numpy(others[others < last])
        self._placed: dict[torch.device, Tensor] = {}

    def among(self, scores: Tensor) -> Tensor:
        """Return scores `[n, vocab]` without the excluded tokens; only the leading columns, if those are at the end."""
        kept = scores[:, : self._width]
        return kept.index_fill(-1, self._holes_on(scores.device), -math.inf) if self._holes.numel() else kept

    def hide(self, scores: Tensor) -> None:
        """Set the scores `[n, vocab]` of excluded tokens to -inf, in place."""
        scores[:, self._width :] = -math.inf
        if self._holes.numel():
            scores.index_fill_(-1, self._holes_on(scores.device), -math.inf)

    def _holes_on(self, device: torch.device) -> Tensor:
        if device not in self._placed:
            self._placed[device] = self._holes.to(device)
        return self._placed[device]
