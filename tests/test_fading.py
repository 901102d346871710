"""`Fading`: which positions a row reads, against its definition."""

import pytest

from radixgen.core import InvalidRequest
from radixgen.reading import Fading

POLICIES = [
    Fading(sinks=3, window=5, levels=3, ratio=2, block=4),
    Fading(sinks=0, window=7, levels=2, ratio=3, block=1),
    Fading(sinks=9, window=1, levels=5, ratio=2, block=3),
    Fading(sinks=40, window=6, levels=1, ratio=5, block=10),
]


def reads(policy: Fading, row: int) -> set[int]:
    """Positions that the row reads, one by one."""
    own = row // policy.block * policy.block
    seen = set()
    for key in range(row + 1):
        level = next((i for i in range(policy.levels + 1) if own - key <= policy.window * policy.ratio**i), None)
        if key < policy.sinks or (level is not None and key % policy.ratio**level == 0):
            seen.add(key)
    return seen


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_row_reads_what_the_definition_says(policy: Fading) -> None:
    for row in range(150):
        ranges = policy.visible(row // policy.block).tolist()
        assert all(start < stop for start, stop in ranges)
        assert all(left[1] <= right[0] for left, right in zip(ranges, ranges[1:], strict=False))
        keys = {key for start, stop in ranges for key in range(start, min(stop, row + 1))}
        assert keys == reads(policy, row), row


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_what_is_not_read_once_is_never_read_again(policy: Fading) -> None:
    for row in range(150):
        later = reads(policy, row + policy.block)
        assert {key for key in later if key <= row} <= reads(policy, row), row


def test_tokens_beyond_the_window_grow_with_the_logarithm() -> None:
    policy = Fading(sinks=4, window=64, levels=20, ratio=2, block=16)
    counts = [int((policy.visible(block) @ [-1, 1]).sum()) for block in (2**6, 2**8, 2**10, 2**12)]
    assert [b - a for a, b in zip(counts, counts[1:], strict=False)] == [64, 64, 64]


@pytest.mark.parametrize(
    ("field", "value"),
    [("sinks", -1), ("window", 0), ("levels", 0), ("levels", 32), ("ratio", 1), ("block", 0), ("prompt", 1)],
)
def test_bad_values_are_named(field: str, value: int) -> None:
    with pytest.raises(InvalidRequest, match=f"reading.{field}"):
        Fading(**{field: value})
