"""The window of each layer of a model, derived from the attention masks that transformers makes.

transformers describes a mask by a function of row and key positions. `read_mask` finds an equivalent window, and
`MaskReader` tracks which layer received which mask. Masks that are neither causal, sliding-window nor chunked raise
`MaskError`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixgen.core import Chunk, Window, first_seen

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""transformers' mask function: whether a row sees a key, by broadcast indices of batch, head, row and key."""

_DENSE = 96
"""Rows at either end of a context at which masks are compared key by key."""
_SCATTERED = 64

_reader: ContextVar["MaskReader | None"] = ContextVar("radixgen_mask_reader", default=None)


class MaskError(ValueError):
    """A mask that tree attention does not support. The message describes it."""


class MaskReader:
    """Reads the masks of one forward pass over a single sequence, for contexts of up to `reach` tokens."""

    def __init__(self, reach: int, device: torch.device) -> None:
        self._reach = reach
        self._device = device
        self._made: list[tuple[Tensor, Window | None]] = []

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Use this reader in `make_mask` within the context."""
        token = _reader.set(self)
        try:
            yield
        finally:
            _reader.reset(token)

    def make(self, mask_function: MaskFunction, rows: int, keys: int) -> Tensor:
        """Make the mask of `rows` over `keys`, bool `[1, 1, rows, keys]`. Raises `MaskError`."""
        window = read_mask(mask_function, self._reach, self._device)
        seen = _visible(window, np.arange(rows), np.arange(keys))
        mask = torch.from_numpy(seen).to(self._device)[None, None]
        self._made.append((mask, window))
        return mask

    def window_of(self, mask: Tensor | None, rows: int) -> Window | None:
        """Return the window of a layer that received `mask`, one of the masks made or a copy. Raises `MaskError`."""
        if mask is None:
            return None
        same = {window for made, window in self._made if mask is made}
        same = same or {window for made, window in self._made if _equal(mask, made, rows)}
        if len(same) != 1:
            raise MaskError("a layer changes its attention mask, or makes one of its own")
        return same.pop()


def make_mask(*, q_length: int, kv_length: int, mask_function: MaskFunction, **_: Any) -> Tensor | None:
    """Mask function for transformers' `AttentionMaskInterface`: a mask if a reader is active, else None."""
    reader = _reader.get()
    return reader.make(mask_function, q_length, kv_length) if reader else None


def read_mask(mask_function: MaskFunction, reach: int, device: torch.device) -> Window | None:
    """Return the window equivalent to `mask_function` at all positions below `reach`; None for a plain causal mask.

    The window is derived from what the last rows see, then compared at both ends of the context, around the first and
    last window or chunk edges, and at scattered positions: about 10^5 pairs for any `reach`. Raises `MaskError`.
    """

    def seen(rows: NDArray[np.int64], keys: NDArray[np.int64]) -> NDArray[np.bool_]:
        zero = torch.zeros((), dtype=torch.int64, device=device)
        row, key = torch.from_numpy(rows).to(device), torch.from_numpy(keys).to(device)
        try:
            answer = mask_function(zero, zero, row[:, None], key[None, :])
            full: NDArray[np.bool_] = answer.to(torch.bool).expand(len(rows), len(keys)).cpu().numpy()
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise MaskError(f"its attention mask depends on more than positions: {error}") from error
        return full

    for window in _candidates(seen, reach):
        rows, keys = _sample(window, reach)
        if np.array_equal(seen(rows, keys), _visible(window, rows, keys)):
            return window
    raise MaskError("its attention mask is neither causal, nor a sliding window, nor chunked")


def _candidates(
    seen: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.bool_]], reach: int
) -> list[Window | None]:
    """Return the windows that fit the first key seen by the last row and by the row before that key."""

    def first(row: int) -> int:
        low, high = 0, row
        while low < high:
            middle = (low + high) // 2
            if seen(np.array([row]), np.array([middle]))[0, 0]:
                high = middle
            else:
                low = middle + 1
        return low

    start = first(reach - 1)
    return [reach - start, Chunk(start - first(start - 1))] if start else [None]


def _sample(window: Window | None, reach: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows and keys at which a mask is compared, ascending."""
    scattered = np.random.default_rng(0).integers(0, reach, _SCATTERED)
    size = (window.size if isinstance(window, Chunk) else window) or reach
    last = (reach - 1) // size
    edges = np.array([step * size + by for step in (1, 2, 3, last - 1, last) for by in (-1, 0, 1)])
    ends = np.concatenate([np.arange(_DENSE), np.arange(reach - _DENSE, reach)])
    rows = np.concatenate([ends, edges, scattered])
    keys = np.concatenate([rows, rows - size - 1, rows - size, rows - size + 1, rows + 1])
    return _within(rows, reach), _within(keys, reach)


def _within(positions: NDArray[np.int64], reach: int) -> NDArray[np.int64]:
    return np.unique(positions[(positions >= 0) & (positions < reach)])


def _visible(window: Window | None, rows: NDArray[np.int64], keys: NDArray[np.int64]) -> NDArray[np.bool_]:
    visible: NDArray[np.bool_] = keys[None, :] <= rows[:, None]
    if window is not None:
        visible &= keys[None, :] >= first_seen(window, rows)[:, None]
    return visible


def _equal(mask: Tensor, made: Tensor, rows: int) -> bool:
    """Return whether `mask`, boolean or additive, is equivalent to `made`."""
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[-2:] != made.shape[-2:] or mask.shape[-1] != rows:
        return False
    if mask.dtype == torch.bool:
        return bool((mask == made).all())
    hidden = mask <= torch.finfo(mask.dtype).min if mask.is_floating_point() else mask != 0
    return bool(((mask == 0) | hidden).all() and (hidden == ~made).all())
