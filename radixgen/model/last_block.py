"""Skip rows without logits in the last block of a model: of those, only K and V are needed."""

from contextlib import suppress
from typing import Any

from torch import Tensor, nn


class KVWriteDone(Exception):
    """Raised in a block's attention once K and V are stored, to skip the rest of the block."""


class LastBlock(nn.Module):
    """Wrapper of a model's last block, with the attributes of the block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.rows: Tensor | None = None
        """Rows of the next passes that give logits, int64 `[n]`, ascending; None for all."""
        self.storing = False
        """Whether attention must store the K and V of all rows and then raise `KVWriteDone`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, hidden: Tensor, *arguments: Any, **options: Any) -> Any:
        """As the block, for hidden states `[1, rows, width]`."""
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
    """Wrap the last block, which contains `attention`, in a `LastBlock`. Returns None if it is not the last of a list
    of blocks.
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
    """Select `rows` in every tensor of `value` whose second dimension has `count` rows."""
    if isinstance(value, Tensor):
        return value.index_select(1, rows) if value.ndim > 1 and value.shape[1] == count else value
    if isinstance(value, dict):
        return {name: _select_rows(item, rows, count) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_select_rows(item, rows, count) for item in value)
    return value
