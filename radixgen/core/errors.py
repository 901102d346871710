"""The named exceptions that callers may catch.

`RadixgenError` is the root. `InvalidRequest` and its children are the caller's to mend; each message
names the field, the value and the limit. `assert` is kept for radixgen's own invariants.
"""

from reprlib import Repr


class RadixgenError(Exception):
    """Root of every error that radixgen raises on purpose."""


class InvalidRequest(RadixgenError, ValueError):
    """A request that cannot be served as written; nothing else is disturbed."""

    def __init__(self, field: str, value: object, limit: str) -> None:
        super().__init__(f"{field}={short_repr(value)}: {limit}")
        self.field, self.value, self.limit = field, value, limit


def short_repr(value: object) -> str:
    """A value in at most 80 characters; its type where it cannot be printed, as an integer of 5,000 digits. No more of
    it is written than is shown: shared parts can make a small object endless.
    """
    brief = Repr()
    brief.maxlevel, brief.maxstring, brief.maxother = 3, 80, 80
    try:
        text = brief.repr(value)
    except Exception:
        return f"<{type(value).__name__}>"
    return text if len(text) <= 80 else text[:77] + "..."


def check_integer(field: str, value: object, low: int, high: int) -> None:
    """Raise `InvalidRequest` unless `value` is an integer, and no boolean, from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(field, value, f"must be an integer from {low} to {high}")
    if not low <= value <= high:
        raise InvalidRequest(field, value, f"must be from {low} to {high}")


class PromptTooLong(InvalidRequest):
    """Prompt plus `max_tokens` exceeds the context or the whole KV pool."""


class ContextOverflow(PromptTooLong):
    """A conversation has grown beyond the context or the KV pool: `value` tokens where `limit` says how many fit."""


class UnknownRequest(InvalidRequest):
    """No live request has this id."""


class DuplicateRequest(InvalidRequest):
    """A live request already has this id."""


class LimitReached(RadixgenError):
    """The engine holds as much as it may of something: try again later. Nothing was changed."""

    def __init__(self, field: str, value: int, limit: str) -> None:
        super().__init__(f"{field}={value}: {limit}")
        self.field, self.value, self.limit = field, value, limit


class QueueFull(LimitReached):
    """As many requests wait, or as many tokens, as may."""


class RequestFailed(RadixgenError):
    """A request ended with `error`, where its caller asked for nothing but its result."""


class GrammarFailed(RadixgenError):
    """A sequence cannot go on in its grammar: no token of the model fits, or a step would cost too much."""


class UnsupportedModel(RadixgenError):
    """A model that cannot run on tree attention; the message names it and says why."""


class ModelNotFound(RadixgenError):
    """No model at this path or under this name."""


class OutOfSlots(RadixgenError):
    """The KV pool has fewer free slots than were asked for."""


class EngineClosed(RadixgenError):
    """The engine was used after `close()`."""


class EngineDead(EngineClosed):
    """The engine failed as a whole; every open request has ended."""
