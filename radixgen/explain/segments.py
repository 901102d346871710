"""What `reuse="segments"` would save in a log: its prompts one after the other, with nothing evicted."""

from collections.abc import Iterable

from radixgen.cache import ExtentPool, RadixTree, TokenArray, blended_namespace
from radixgen.core import SegmentReuse
from radixgen.scheduler.run_reuse import RunTaker


def moved_tokens(prompts: Iterable[TokenArray], reuse: SegmentReuse) -> tuple[int, int]:
    """Return how many tokens of `prompts` would be copied from runs that are no prefix, and the number of prompts with
    such runs.

    Each prompt finds all that are before it. Costs a search per prompt.
    """
    rows = list(prompts)
    tree = RadixTree(ExtentPool(max(sum(row.size for row in rows), 1)))
    taker = RunTaker(tree, reuse)
    moved = inexact = 0
    for row in rows:
        taken = taker.take(row, "", row.size - 1) if row.size else None
        if taken is not None:
            moved, inexact = moved + taken.num_moved, inexact + 1
            taken.release(tree)
        _compute(tree, row, "" if taken is None else blended_namespace(""))
    return moved, inexact


def _compute(tree: RadixTree, row: TokenArray, namespace: str) -> None:
    """Let the tree hold all of a prompt as computed."""
    lock = tree.insert(row, namespace)
    for part in lock.held.unscheduled_path():
        tree.schedule(part, part.known - part.scheduled)
    tree.commit(lock.held)
    tree.unlock(lock)
