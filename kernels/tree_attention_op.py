"""`radixgen::tree_attention`: attention over a plan as an operator without state, for `torch.export`.

The plan is among its arguments, as the tensors of `radixgen.kernels.unit_groups`: another plan needs no other export,
within the bounds that the exporter gives its sizes. It has no gradient.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, library

from radixgen.kernels.unit_groups import attend


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Sequence[Tensor],
    slots: Sequence[Tensor],
    bias: Sequence[Tensor],
    partials: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Call the operator, with the arguments and results of `radixgen.kernels.unit_groups.attend`."""
    register()
    out, lse = torch.ops.radixgen.tree_attention(q, k, v, rows, slots, bias, partials, scale, softcap, sinks)
    return out, lse


def register() -> None:
    """Register the operator with PyTorch."""
    if hasattr(torch.ops.radixgen, "tree_attention"):
        return

    operator = library.custom_op("radixgen::tree_attention", attend, mutates_args=())

    @operator.register_fake
    def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        num_rows, q_heads = q.shape[:2]
        return q.new_empty((num_rows, q_heads, v.shape[2])), q.new_empty((num_rows, q_heads))


def to_standard_operators(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Replace the operator by the standard ones that it consists of."""
    register()
    standard: torch.export.ExportedProgram
    with any_size():
        standard = program.run_decompositions({torch.ops.radixgen.tree_attention.default: attend})
    return standard


def any_size() -> AbstractContextManager[None]:
    """Let `torch.export` make no exception of sizes 0 and 1, which groups of units often have."""
    from torch.fx.experimental import _config

    patched: AbstractContextManager[None] = _config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    return patched
