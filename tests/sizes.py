"""Test sizes: quick by default, nightly with `RADIXGEN_TEST_ALL=1`."""

import os
from collections.abc import Sequence
from itertools import combinations, product
from typing import Any, TypeVar

import pytest
import torch

ALL = os.environ.get("RADIXGEN_TEST_ALL") == "1"
EVERYTHING = ALL or torch.cuda.is_available()
"""Whether kernels are tried in all combinations and on larger trees: Triton's interpreter is slow."""
Size = TypeVar("Size")

nightly = pytest.mark.skipif(not ALL, reason="nightly: RADIXGEN_TEST_ALL=1, as `make test-all` sets it")


def size(quick: Size, everything: Size) -> Size:
    """`quick`, or at nightly size `everything`."""
    return everything if ALL else quick


def pairs(*axes: Sequence[Any], everything: bool = ALL) -> list[tuple[Any, ...]]:
    """A small set of combinations that covers every pair of values (greedy); or `everything`. At least two axes."""
    assert len(axes) > 1
    rows = list(product(*(range(len(axis)) for axis in axes)))
    if not everything:
        held = {row: set(combinations(enumerate(row), 2)) for row in rows}
        missing, rows = set().union(*held.values()), []
        while missing:
            rows.append(max(held, key=lambda row: len(held[row] & missing)))
            missing -= held[rows[-1]]
    return [tuple(axis[index] for axis, index in zip(axes, row, strict=True)) for row in rows]
