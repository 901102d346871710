"""Validation of text from outside as UTF-8."""

from collections.abc import Mapping

from radixgen.core.errors import InvalidRequest


def check_text(field: str, text: str) -> None:
    """Raise `InvalidRequest` if `text` contains a lone surrogate, as text cut within a character does.

    No tokenizer and no encoding accepts such text.
    """
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise InvalidRequest(field, text, f"holds half of a surrogate pair, {half} at {error.start}") from None


def check_texts(field: str, value: object) -> None:
    """As `check_text`, for every string in `value`, including the keys of mappings."""
    seen: set[int] = set()
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, str):
            check_text(field, item)
        elif isinstance(item, Mapping | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            todo += [*item, *item.values()] if isinstance(item, Mapping) else item
