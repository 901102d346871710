"""Frees slots of running sequences whose reading policy says so."""

from radixgen.cache import RadixTree, thin
from radixgen.core.reading import PositionPolicy
from radixgen.scheduler.sequence import Sequence


def free_unread(tree: RadixTree, sequence: Sequence) -> None:
    """Free the slots of tokens that no row from the last computed one on reads, if the policy frees them.

    That row may be read again for its logits, so what it reads is kept. So is everything while the prompt is scored.
    """
    request, reading = sequence.request, sequence.request.reading
    if sequence.cursor is None or not isinstance(reading, PositionPolicy) or not reading.frees_slots or request.scoring:
        return
    leaf = sequence.cursor.held
    last = leaf.computed_end - 1
    block = last // reading.block
    if last < request.first_read or block == sequence.freed_block:
        return
    sequence.freed_block = block
    thin(tree, leaf, reading.visible(block))
