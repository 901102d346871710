"""The last block of a model computes only the rows that give logits: of the others nobody reads more than K and V."""

from contextlib import suppress
from typing import Any

from torch import Tensor, nn


class KVWriteDone(Exception):
    """A block's attention has stored K and V, and nothing else of that call is wanted."""


class LastBlock(nn.Module):
    """Stands in for a model's last block, and has its attributes."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.rows: Tensor | None = None
        """The rows of the next passes that give logits, int64 `[n]`, ascending; None for all"""
        self.storing = False
        """Whether attention is to store K and V of all rows, and then to raise `KVWriteDone`"""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, hidden: Tensor, *arguments: Any, **options: Any) -> Any:
        """As the block, of hidden states `[1, rows, width]`."""
        if self.rows is None:
            return self.block(hidden, *arguments, **options)
        self.storing = True
        try:
            with suppress(KVWriteDone):
                self.block(hidden, *arguments, **options)
        finally:
            self.storing = False
        picked, options = _select_rows(((hidden, *arguments), options), self.rows, hidden.shape[1])
        return self.block(*picked, **options)


def insert_last_block(model: nn.Module, attention: nn.Module) -> LastBlock | None:
    """Put a `LastBlock` in the place of the block with this attention, the model's last one; None where it is not the
    last of a list of blocks.
    """
    for blocks in _lists(model):
        if any(module is attention for module in blocks[-1].modules()):
            blocks[-1] = last = LastBlock(blocks[-1])
            return last
    return None


def remove_last_block(model: nn.Module) -> None:
    """Undo `insert_last_block`."""
    for blocks in _lists(model):
        if isinstance(blocks[-1], LastBlock):
            blocks[-1] = blocks[-1].block


def _lists(model: nn.Module) -> list[nn.ModuleList]:
    return [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]


def _select_rows(value: Any, rows: Tensor, count: int) -> Any:
    """Of whatever has a row for each of `count`, in its second dimension, only `rows`."""
    if isinstance(value, Tensor):
        return value.index_select(1, rows) if value.ndim > 1 and value.shape[1] == count else value
    if isinstance(value, dict):
        return {name: _select_rows(one, rows, count) for name, one in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_select_rows(one, rows, count) for one in value)
    return value
