"""Which keys each layer of a model sees, read from the masks that transformers makes for it.

transformers describes a mask by a function of row and key positions. `read_mask` finds the window that is equal to it;
`MaskReader` knows which layer was given which mask. A mask that is no window, whole or by chunks, raises `MaskError`.
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
"""transformers' own: whether a row sees a key, by indices of batch, head, row and key that broadcast."""

_DENSE = 96
"""Rows at either end of a context at which a mask is read key by key."""
_SCATTERED = 64

_reader: ContextVar["MaskReader | None"] = ContextVar("radixgen_mask_reader", default=None)


class MaskError(ValueError):
    """A mask that tree attention does not have; the message says what it is."""


class MaskReader:
    """The masks of one forward pass over one whole sequence, for a context of `reach` tokens."""

    def __init__(self, reach: int, device: torch.device) -> None:
        self._reach = reach
        self._device = device
        self._made: list[tuple[Tensor, Window | None]] = []

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Masks that transformers makes meanwhile, by `make_mask`, are this reader's."""
        token = _reader.set(self)
        try:
            yield
        finally:
            _reader.reset(token)

    def make(self, mask_function: MaskFunction, rows: int, keys: int) -> Tensor:
        """The mask of `rows` over `keys`, bool `[1, 1, rows, keys]`. Raises `MaskError`."""
        window = read_mask(mask_function, self._reach, self._device)
        seen = _visible(window, np.arange(rows), np.arange(keys))
        mask = torch.from_numpy(seen).to(self._device)[None, None]
        self._made.append((mask, window))
        return mask

    def window_of(self, mask: Tensor | None, rows: int) -> Window | None:
        """What a layer that was given `mask` sees: one of those made, or a copy of one. Raises `MaskError`."""
        if mask is None:
            return None
        same = {window for made, window in self._made if mask is made}
        same = same or {window for made, window in self._made if _equal(mask, made, rows)}
        if len(same) != 1:
            raise MaskError("a layer changes its attention mask, or makes one of its own")
        return same.pop()


def make_mask(*, q_length: int, kv_length: int, mask_function: MaskFunction, **_: Any) -> Tensor | None:
    """For transformers' `AttentionMaskInterface`: a mask where one is being read, else none."""
    reader = _reader.get()
    return reader.make(mask_function, q_length, kv_length) if reader else None


def read_mask(mask_function: MaskFunction, reach: int, device: torch.device) -> Window | None:
    """The window that equals `mask_function` at all positions below `reach`; None where rows see all before them.

    It is derived from what the last rows see, then compared at both ends of the context, about the first and last
    edges of windows or chunks, and at scattered places: some 10^5 pairs, whatever `reach` is. Raises `MaskError`.
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
    """What the mask can be, by the first keys that its last row sees, and the row before those."""

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
    """Rows and keys at which a mask is compared, ascending."""
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
    """Whether `mask`, of bool or of what is added to scores, says what `made` says."""
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[-2:] != made.shape[-2:] or mask.shape[-1] != rows:
        return False
    if mask.dtype == torch.bool:
        return bool((mask == made).all())
    hidden = mask <= torch.finfo(mask.dtype).min if mask.is_floating_point() else mask != 0
    return bool(((mask == 0) | hidden).all() and (hidden == ~made).all())
