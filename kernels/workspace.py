"""Memory of captured steps for their tables and partial results."""

import torch
from torch import Tensor

from radixgen.kernels.work import WorkSizes


class Workspace:
    """Memory shared by captured steps, of which one runs at a time: partial results, and the sizes of new tables.

    It only grows, so that plans of every kind soon fit into whatever is captured.
    """

    def __init__(self) -> None:
        self._sizes: WorkSizes | None = None
        self._partials: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def sizes(self, wanted: WorkSizes) -> WorkSizes:
        """Return sizes of new tables, with spare room for `wanted` and everything wanted before."""
        roomy = wanted.roomy()
        self._sizes = roomy if self._sizes is None else self._sizes.union(roomy)
        return self._sizes

    def partials(self, rows: int, q_heads: int, v_head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return LSE `[rows or more, q_heads]` and values `[rows or more, q_heads, v_head_dim]`, float32.

        Tensors returned earlier stay valid, for the steps captured with them.
        """
        kind = q_heads, v_head_dim
        if kind not in self._partials or len(self._partials[kind][0]) < rows:
            lse = torch.empty((rows, q_heads), dtype=torch.float32, device=device)
            self._partials[kind] = lse, torch.empty((rows, q_heads, v_head_dim), dtype=torch.float32, device=device)
        return self._partials[kind]
