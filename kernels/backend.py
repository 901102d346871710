"""Attention over a plan, the writes of new keys and values, and the merge of partial results.

A backend is a module with two classes, each built once a step and called once a layer, `Attention` and `KVWriter`, and
with `StaticAttention` where it can be captured. `backend` finds it by name and imports it only then.
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

    from radixgen.kernels.flash_backend import FlashCost
    from radixgen.kernels.workspace import Workspace

BACKENDS = ("torch", "triton", "flash")


class Attention(Protocol):
    """Attention over one plan, for one window, on one device. Made once a step, called once a layer.

    A row at position `p` sees, of the segments of the units that cover it, the keys at positions `<= p`, and from
    `first_seen(window, p)` where there is a window. Slots outside the plan's segments, as they are before a window
    trims them, are undefined memory, NaN perhaps, and so is the room into which a segment may grow: nothing of it may
    reach a result.
    """

    def __init__(self, plan: Plan, window: Window | None, device: "torch.device") -> None: ...

    def __call__(
        self,
        q: "Tensor",
        k: "Tensor",
        v: "Tensor",
        scale: float,
        softcap: float | None = None,
        sinks: "Tensor | None" = None,
    ) -> "tuple[Tensor, Tensor]":
        """
        Rows come in the plan's order: q `[rows, q_heads, head_dim]`. k `[slots, kv_heads, head_dim]` and v
        `[slots, kv_heads, v_head_dim]` are the whole pool, in any floating dtype. Scores are multiplied by `scale`, a
        positive number, then capped: `softcap * tanh(score / softcap)`. `sinks [q_heads]` are logits that take weight
        and give no value, one a head.

        Returns `out [rows, q_heads, v_head_dim]` in q's dtype and `lse [rows, q_heads]` (natural log, without sinks)
        in float32, or in float64 for float64 inputs; sums are float32 or better. A row that sees no key gives 0 and
        -inf.
        """


class StaticAttention(Protocol):
    """As `Attention`, but at fixed addresses: what was captured with it answers whatever plan is loaded since.

    Rows beyond those of the plan come out as something finite. A call raises `ValueError` for shapes that it does not
    answer.
    """

    def __init__(self, plan: Plan, window: Window | None, positions: "Tensor", workspace: "Workspace") -> None:
        """`positions` int64 `[rows]`, at least as many as the plan's rows, is read at each call. `plan` is loaded.
        `workspace` is shared with others, of which only one runs at a time.
        """

    def load(self, plan: Plan) -> bool:
        """Make ready for a plan of the same `tile_rows`: no work where lengths only grew and there was room for it.
        False where the plan takes more memory than there is.
        """

    def __call__(
        self,
        q: "Tensor",
        k: "Tensor",
        v: "Tensor",
        scale: float,
        softcap: float | None = None,
        sinks: "Tensor | None" = None,
    ) -> "tuple[Tensor, Tensor]": ...


class KVWriter(Protocol):
    """Puts the keys and values of a step's rows into their slots. Made once a step, called once a layer."""

    def __init__(self, slots: "NDArray[np.int64] | Tensor", device: "torch.device") -> None:
        """`slots` `[rows]`, distinct; -1 where a row's KV exists already."""

    def __call__(self, key: "Tensor", value: "Tensor", k: "Tensor", v: "Tensor") -> None:
        """Key `[rows, kv_heads, head_dim]` goes to k `[slots, kv_heads, head_dim]`, value likewise to v."""


class AttentionBackend(NamedTuple):
    """What answers a step's layers."""

    name: str
    attention: "Callable[[Plan, Window | None, torch.device], Attention]"
    kv_writer: type[KVWriter]
    static: type[StaticAttention] | None
    """Where there is one, `kv_writer` reads a tensor of slots on the device anew at each call."""


def check_backend(name: str) -> None:
    """Raises `InvalidRequest` unless `name` is `"auto"` or one of `BACKENDS`."""
    if not isinstance(name, str) or name not in ("auto", *BACKENDS):
        raise InvalidRequest("attention", name, f"must be one of auto, {', '.join(BACKENDS)}")


def backend(name: str, device: "torch.device", flash: "FlashCost | None" = None) -> AttentionBackend:
    """The backend called `name`; `"auto"` is the fastest one that runs on `device`: `"triton"` or `"torch"`, but for
    plans that the flash-attn package answers sooner, where it is installed and its cost `flash` is known. Raises
    `InvalidRequest`.
    """
    check_backend(name)
    if name == "auto":
        own = _named("triton" if device.type == "cuda" and find_spec("triton") else "torch", device)
        return own if flash is None else _cheapest(own, flash, device)
    return _named(name, device)


def _named(name: str, device: "torch.device") -> AttentionBackend:
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


def _cheapest(own: AttentionBackend, flash: "FlashCost", device: "torch.device") -> AttentionBackend:
    """Our own backend, but for plans that flash-attn answers sooner."""
    from radixgen.kernels import flash_backend

    try:
        usable = flash_backend.runs_on(device)
    except ImportError:
        usable = False
    return own._replace(attention=flash_backend.CheapestAttention(flash, own.attention)) if usable else own
