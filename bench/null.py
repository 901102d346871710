"""A model that costs nothing: what is left of a step is the host's own work."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixgen.core import Plan


class NullModel:
    """Answers every row with random logits made beforehand; stores nothing and reads nothing."""

    name = "null"
    eos_token_ids: frozenset[int] = frozenset()
    kv_bytes_per_token = 1
    kv_bytes_read = 0
    kv_bytes_unshared = 0

    def __init__(self, vocab_size: int = 128, max_model_len: int = 1 << 17, rows: int = 2_048) -> None:
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        generator = torch.Generator().manual_seed(0)
        self._logits = torch.randn(rows, vocab_size, generator=generator)

    def allocate(self, slots: int) -> None:
        """Nothing is stored."""

    def run(
        self, plan: Plan, token_ids: NDArray[np.int64], slots: NDArray[np.int64], logit_rows: NDArray[np.int64]
    ) -> Tensor:
        return self._logits[: logit_rows.size]

    def release(self) -> None:
        """Nothing was borrowed."""
