"""Exceptions that callers may catch.

`RadixgenError` is the root. `InvalidRequest` and its subclasses are the caller's errors; each message names the field,
the value and the limit. `assert` is reserved for radixgen's own invariants.
"""

from reprlib import Repr


class RadixgenError(Exception):
    """Base class of all errors that radixgen raises on purpose."""


class InvalidRequest(RadixgenError, ValueError):
    """A request that cannot be served as written. Other requests are unaffected."""

    def __init__(self, field: str, value: object, limit: str) -> None:
        super().__init__(f"{field}={short_repr(value)}: {limit}")
        self.field, self.value, self.limit = field, value, limit


def short_repr(value: object) -> str:
    """Represent a value in at most 80 characters, or by its type if it cannot be printed, as an integer of 5,000
    digits.

    Only what is shown is formatted: a small object that refers to its parts repeatedly can have an enormous `repr`.
    """
    brief = Repr()
    brief.maxlevel, brief.maxstring, brief.maxother = 3, 80, 80
    try:
        text = brief.repr(value)
    except Exception:
        return f"<{type(value).__name__}>"
    return text if len(text) <= 80 else text[:77] + "..."


def check_integer(field: str, value: object, low: int, high: int) -> None:
    """Raise `InvalidRequest` unless `value` is an integer from `low` to `high`. Booleans are rejected."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(field, value, f"must be an integer from {low} to {high}")
    if not low <= value <= high:
        raise InvalidRequest(field, value, f"must be from {low} to {high}")


def check_boolean(field: str, value: object) -> None:
    """Raise `InvalidRequest` unless `value` is a boolean."""
    if not isinstance(value, bool):
        raise InvalidRequest(field, value, "must be true or false")


class PromptTooLong(InvalidRequest):
    """Prompt plus `max_tokens` exceeds the context or the KV pool."""


class ContextOverflow(PromptTooLong):
    """A conversation has outgrown the context or the KV pool. `value` is its length in tokens; `limit` names the
    maximum.
    """


class UnknownRequest(InvalidRequest):
    """No live request has this id."""


class DuplicateRequest(InvalidRequest):
    """A live request already has this id."""


class LimitReached(RadixgenError):
    """The engine is at one of its limits. Nothing was changed; try again later."""

    def __init__(self, field: str, value: int, limit: str) -> None:
        super().__init__(f"{field}={value}: {limit}")
        self.field, self.value, self.limit = field, value, limit


class QueueFull(LimitReached):
    """The queue of waiting requests is full, by number of requests or of prompt tokens."""


class RequestFailed(RadixgenError):
    """A request ended with `error` in a call that returns nothing but its result."""


class GrammarFailed(RadixgenError):
    """A sequence cannot continue within its grammar: no token of the model fits, or its masks take too long."""


class UnsupportedModel(RadixgenError):
    """A model that cannot run with tree attention. The message names the model and the reason."""


class ModelNotFound(RadixgenError):
    """No model exists at this path or under this name."""


class OutOfSlots(RadixgenError):
    """The KV pool has too few free slots for an allocation."""


class EngineClosed(RadixgenError):
    """The engine was used after `close()`."""


class EngineDead(EngineClosed):
    """The engine failed as a whole. All of its open requests have ended."""
