"""Interface of attention backends: attention over a plan, writes of new KV, and the merge of partial results.

A backend is a module with two classes named after it (`TritonAttention`, `TritonKVWriter`), and a third,
`TritonStaticAttention`, if steps can be captured. Each is constructed once per step and called once per layer.
`backend` imports the module by name on first use.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from radixgen.core import InvalidRequest, Plan, Window

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from radixgen.kernels.quantized import KV
    from radixgen.kernels.workspace import Workspace

BACKENDS = ("torch", "triton", "flash")


class Attention(Protocol):
    """Attention over one plan, for one window, on one device. Constructed once per step, called once per layer.

    A row at position `p` sees the keys at positions `<= p` in the segments of the units that cover it, from
    `first_seen(window, p)` on if there is a window. Slots outside of the plan's segments, before a window trims them,
    are undefined memory, perhaps NaN, and so is the room into which a segment may grow: they must not affect any
    result.
    """

    def __init__(self, plan: Plan, window: Window | None, device: "torch.device") -> None: ...

    def __call__(
        self,
        q: "Tensor",
        k: "KV",
        v: "KV",
        scale: float,
        softcap: float | None = None,
        sinks: "Tensor | None" = None,
        bounds: "Tensor | None" = None,
    ) -> "tuple[Tensor, Tensor]":
        """Compute attention of all rows, in the plan's order.

        q `[rows, q_heads, head_dim]`. k `[slots, kv_heads, head_dim]` and v `[slots, kv_heads, v_head_dim]` are the
        whole pool, in any floating dtype, or quantized. Scores are multiplied by `scale`, a positive number, then
        capped: `softcap * tanh(score / softcap)`. `sinks [q_heads]`: one logit per head that takes weight and has no
        value. `bounds [blocks, kv_heads, 2, head_dim]`: least and greatest keys of each block, for plans with units
        that choose blocks.

        Returns `out [rows, q_heads, v_head_dim]` in q's dtype and `lse [rows, q_heads]` (natural log, without sinks) in
        float32, or in float64 for float64 inputs. Sums are in float32 or better. A row that sees no key gives 0 and
        -inf.
        """


class StaticAttention(Protocol):
    """As `Attention`, at fixed addresses: a captured call works for any plan loaded later.

    Rows beyond those of the plan give finite values. A call raises `ValueError` for shapes that are not supported.
    """

    def __init__(self, plan: Plan, window: Window | None, positions: "Tensor", workspace: "Workspace") -> None:
        """Load `plan`. `positions` int64 `[rows]`, at least as many as the plan's rows, is read in each call.

        `workspace` is shared with other objects, of which only one runs at a time.
        """

    def load(self, plan: Plan) -> bool:
        """Prepare for a plan with the same `tile_rows`. Free of cost if only lengths grew and there was room for it.

        Returns False if the plan needs more memory than was allocated.
        """

    def __call__(
        self,
        q: "Tensor",
        k: "KV",
        v: "KV",
        scale: float,
        softcap: float | None = None,
        sinks: "Tensor | None" = None,
        bounds: "Tensor | None" = None,
    ) -> "tuple[Tensor, Tensor]": ...


class KVWriter(Protocol):
    """Writes keys and values of a step's rows into their slots. Constructed once per step, called once per layer."""

    def __init__(self, slots: "NDArray[np.int64] | Tensor", device: "torch.device") -> None:
        """`slots` `[rows]`: distinct; -1 if a row's KV exists already."""

    def __call__(self, key: "Tensor", value: "Tensor", k: "KV", v: "KV") -> None:
        """Write key `[rows, kv_heads, head_dim]` to k `[slots, kv_heads, head_dim]`, and likewise value to v; quantize
        them if k and v are quantized.
        """


class AttentionBackend(NamedTuple):
    """The classes of a backend."""

    name: str
    attention: "Callable[[Plan, Window | None, torch.device], Attention]"
    kv_writer: type[KVWriter]
    static: type[StaticAttention] | None
    """If not None, `kv_writer` reads its tensor of slots on the device in each call."""


def check_backend(name: str) -> None:
    """Raise `InvalidRequest` unless `name` is `"auto"` or one of `BACKENDS`."""
    if not isinstance(name, str) or name not in ("auto", *BACKENDS):
        raise InvalidRequest("attention", name, f"must be one of auto, {', '.join(BACKENDS)}")


def backend(name: str, device: "torch.device") -> AttentionBackend:
    """Return the backend called `name`; `"auto"` is `"triton"` or `"torch"`. Raises `InvalidRequest`.

    `radixgen.kernels.flash_backend.backend_with_flash` also considers the flash-attn package for `"auto"`.
    """
    check_backend(name)
    if name == "auto":
        name = "triton" if device.type == "cuda" and find_spec("triton") else "torch"
    try:
        module = import_module(f"radixgen.kernels.{name}_backend")
        runs = module.runs_on(device)
    except ImportError as error:
        raise InvalidRequest("attention", name, f"cannot be imported: {error}") from error
    if not runs:
        raise InvalidRequest("attention", name, f"does not run on {device.type}")
    family = name.capitalize()
    return AttentionBackend(
        name,
        getattr(module, f"{family}Attention"),
        getattr(module, f"{family}KVWriter"),
        getattr(module, f"{family}StaticAttention", None),
    )
