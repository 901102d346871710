"""Text from outside: whether all of it can be written as UTF-8."""

from collections.abc import Mapping

from radixgen.core.errors import InvalidRequest


def check_text(field: str, text: str) -> None:
    """Raise `InvalidRequest` where `text` holds half of a surrogate pair, as text that was cut within a character does:
    no tokenizer and no encoding takes it.
    """
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise InvalidRequest(field, text, f"holds half of a surrogate pair, {half} at {error.start}") from None


def check_texts(field: str, value: object) -> None:
    """As `check_text`, for every text in `value`, the keys of mappings included."""
    seen: set[int] = set()
    todo = [value]
    while todo:
        one = todo.pop()
        if isinstance(one, str):
            check_text(field, one)
        elif isinstance(one, Mapping | list | tuple) and id(one) not in seen:
            seen.add(id(one))
            todo += [*one, *one.values()] if isinstance(one, Mapping) else one
