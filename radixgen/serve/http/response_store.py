"""Responses that a server keeps, for clients that continue or fetch them by id."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from radixgen.core import InvalidRequest, Limits
from radixgen.serve.http.errors import HTTPError
from radixgen.serve.http.fair_cache import FairCache
from radixgen.serve.http.responses_protocol import ResponseBody
from radixgen.serve.http.session_sizes import bytes_of

_KEEP_SECONDS = 86_400.0
Item = dict[str, Any]


class ResponseKey(NamedTuple):
    """Identity of a response: the API key to which it belongs, and its id."""

    key_id: str
    response_id: str


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A finished response, and all items of its conversation.

    earlier: items of the responses before it.
    given: its own input.
    num_bytes: size of all of it in memory.
    """

    body: ResponseBody
    earlier: tuple[Item, ...]
    given: tuple[Item, ...]
    generated: tuple[Item, ...]
    num_bytes: int

    @classmethod
    def create(cls, body: ResponseBody, before: "StoredResponse | None", given: Seq[Item]) -> "StoredResponse":
        """Response with this input, after `before`."""
        generated = tuple(msgspec.to_builtins(body.output))
        size = bytes_of([*given, *generated]) + bytes_of(msgspec.to_builtins(body))
        earlier = () if before is None else before.items
        return cls(body, earlier, tuple(given), generated, size + (0 if before is None else before.num_bytes))

    @property
    def items(self) -> tuple[Item, ...]:
        """All items up to the end of the response."""
        return (*self.earlier, *self.given, *self.generated)


class ResponseStore:
    """Responses by id, bounded by `Limits.max_responses` and `max_response_bytes`; each is kept for a day.

    A response belongs to its API key. If the store is full, the key with the most loses its oldest response.
    """

    def __init__(self, limits: Limits) -> None:
        self._responses: FairCache[ResponseKey, StoredResponse] = FairCache(
            limits.max_responses, limits.max_response_bytes, _KEEP_SECONDS, self._forget_items
        )
        self._holders: dict[tuple[str, str], ResponseKey] = {}
        """Responses by API key and by the ids of their own items"""

    def __len__(self) -> int:
        return len(self._responses)

    @property
    def num_bytes(self) -> int:
        """Size of all responses in memory."""
        return self._responses.num_bytes

    def put(self, key_id: str, response: StoredResponse) -> None:
        """Keep a response."""
        key = ResponseKey(key_id, response.body.id)
        with self._responses.locked():
            self._responses.put(key, response, response.num_bytes)
            if self._responses.get(key) is response:
                self._holders.update(((key_id, item["id"]), key) for item in _own(response) if "id" in item)

    def get(self, key_id: str, response_id: str, field: str = "response_id") -> StoredResponse:
        """Response of an API key. Raises `HTTPError`: 404 if there is none."""
        key = ResponseKey(key_id, response_id)
        response = self._responses.get(key)
        if response is None:
            raise no_response(response_id, field)
        self._responses.touch(key)
        return response

    def remove(self, key_id: str, response_id: str) -> None:
        """Forget a response; those that continue it stay. Raises `HTTPError`: 404 if there is none."""
        self.get(key_id, response_id)
        self._responses.remove(ResponseKey(key_id, response_id))

    def resolved(self, key_id: str, items: Seq[Item]) -> list[Item]:
        """Items, with those that `item_reference` names in their place. Raises `InvalidRequest`."""
        return [self._resolve(key_id, item, f"input[{index}]") for index, item in enumerate(items)]

    def _resolve(self, key_id: str, item: Item, field: str) -> Item:
        if item["type"] != "item_reference":
            return item
        key = self._holders.get((key_id, str(item.get("id"))))
        holder = None if key is None else self._responses.get(key)
        own = () if holder is None else _own(holder)
        match = next((known for known in own if known.get("id") == item.get("id")), None)
        if match is None:
            raise InvalidRequest(f"{field}.id", item.get("id"), "must be the id of an item of a stored response")
        return match

    def _forget_items(self, key: ResponseKey, response: StoredResponse) -> None:
        for item in _own(response):
            if self._holders.get((key.key_id, item.get("id", ""))) == key:
                del self._holders[key.key_id, item["id"]]


def no_response(response_id: str, field: str) -> HTTPError:
    """Error for an id without a response."""
    limit = "must be the id of a stored response"
    return HTTPError(
        404,
        f"{field}={response_id!r}: {limit}",
        field=field,
        value=response_id,
        limit=limit,
        code="previous_response_not_found" if field == "previous_response_id" else None,
    )


def _own(response: StoredResponse) -> tuple[Item, ...]:
    return (*response.given, *response.generated)
