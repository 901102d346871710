"""Memory size of a conversation."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from sys import getsizeof
from typing import TypeVar

from radixgen.chat.history import Exchange, State

T = TypeVar("T")

_TOKEN_BYTES = getsizeof(1 << 16)


def bytes_of(value: object) -> int:
    """Size of a JSON value, in bytes."""
    total, todo = 0, [value]
    while todo:
        item = todo.pop()
        total += getsizeof(item)
        if isinstance(item, Mapping):
            todo += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            todo += item
    return total


def new_bytes(before: State, after: State) -> int:
    """Size of the part of a state that the previous state does not share, in bytes."""
    messages = _new(before.messages, after.messages)
    exchanges = _new(before.exchanges, after.exchanges)
    lists = getsizeof(after.messages) + getsizeof(after.exchanges)
    return lists + sum(map(bytes_of, messages)) + sum(map(_bytes_of_exchange, exchanges))


def _new(before: Sequence[T], after: Sequence[T]) -> list[T]:
    return [new for old, new in zip_longest(before, after) if new is not None and new is not old]


def _bytes_of_exchange(exchange: Exchange) -> int:
    ids = sum(getsizeof(ids) + _TOKEN_BYTES * len(ids) for ids in (exchange.prompt_ids, exchange.answer_ids))
    return getsizeof(exchange.prompt) + getsizeof(exchange.answer) + ids
