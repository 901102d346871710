"""Names of parametrized cases, the same in every process: pytest-xdist compares them."""

import re


def name_of(value: object) -> str:
    """The text of `value` without addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))
