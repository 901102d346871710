"""An extension of griffe for `make docs`: paragraphs of docstrings that describe parameters or fields become lists.

Our docstrings say `name: what it is`, a line each, with indented continuation lines; Markdown would join them.
"""

import re
from typing import Any

import griffe

_ITEM = re.compile(r"(\w+(?:, \w+)*): (.+)", re.DOTALL)


class ParameterLists(griffe.Extension):
    """Rewrites the docstrings of functions and classes."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Names are the function's parameters."""
        _rewrite(func, {parameter.name for parameter in func.parameters})

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Names are the class's fields."""
        _rewrite(cls, set(cls.members))


def _rewrite(owner: griffe.Function | griffe.Class, names: set[str]) -> None:
    if owner.docstring is not None:
        text = owner.docstring.value.strip()
        owner.docstring.value = "\n\n".join(_as_list(paragraph, names) for paragraph in text.split("\n\n"))


def _as_list(paragraph: str, names: set[str]) -> str:
    """The paragraph with an item for each line that begins with one of the names and a colon."""
    lines: list[str] = []
    found = False
    for line in paragraph.split("\n"):
        match = _ITEM.fullmatch(line)
        if match and names.issuperset(match[1].split(", ")):
            lines += [] if found else [""]
            lines.append(f"- **{match[1]}**: {match[2]}")
            found = True
        else:
            lines.append(f"  {line.strip()}" if found else line)
    return "\n".join(lines)
