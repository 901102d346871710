"""How much memory a conversation holds."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from sys import getsizeof
from typing import TypeVar

from radixgen.chat_history import Exchange, State

T = TypeVar("T")

_TOKEN_BYTES = getsizeof(1 << 16)


def bytes_of(value: object) -> int:
    """Of what JSON can hold."""
    total, todo = 0, [value]
    while todo:
        one = todo.pop()
        total += getsizeof(one)
        if isinstance(one, Mapping):
            todo += [*one.keys(), *one.values()]
        elif isinstance(one, list):
            todo += one
    return total


def new_bytes(before: State, after: State) -> int:
    """Bytes of `after` that are not those of `before`, the state of the turn before it."""
    messages = _new(before.messages, after.messages)
    exchanges = _new(before.exchanges, after.exchanges)
    lists = getsizeof(after.messages) + getsizeof(after.exchanges)
    return lists + sum(map(bytes_of, messages)) + sum(map(_bytes_of_exchange, exchanges))


def _new(before: Sequence[T], after: Sequence[T]) -> list[T]:
    return [new for old, new in zip_longest(before, after) if new is not None and new is not old]


def _bytes_of_exchange(one: Exchange) -> int:
    ids = sum(getsizeof(ids) + _TOKEN_BYTES * len(ids) for ids in (one.prompt_ids, one.answer_ids))
    return getsizeof(one.prompt) + getsizeof(one.answer) + ids
