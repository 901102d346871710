"""How large the suite is: ten minutes, or with `RADIXGEN_TEST_ALL=1` a night's."""

import os
from typing import TypeVar

import pytest

ALL = bool(os.environ.get("RADIXGEN_TEST_ALL"))
Size = TypeVar("Size")

nightly = pytest.mark.skipif(not ALL, reason="nightly: RADIXGEN_TEST_ALL=1, as `make test-all` sets it")


def size(quick: Size, everything: Size) -> Size:
    """`quick`, or at nightly size `everything`."""
    return everything if ALL else quick
