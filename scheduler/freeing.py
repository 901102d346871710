"""Frees slots of running sequences whose reading policy says so."""

import numpy as np
from numpy.typing import NDArray

from radixgen.cache import Node, RadixTree, thin
from radixgen.core.reading import PositionPolicy, Press
from radixgen.scheduler.batch import Batch, PressingRows
from radixgen.scheduler.sequence import Sequence


def free_unread(tree: RadixTree, sequence: Sequence) -> None:
    """Free the slots of tokens that no row from the last computed one on reads, if the policy frees them.

    That row may be read again for its logits, so what it reads is kept. So is everything while the prompt is scored.
    """
    request, reading = sequence.request, sequence.request.reading
    if sequence.cursor is None or not isinstance(reading, PositionPolicy) or not reading.frees or request.scoring:
        return
    leaf = sequence.cursor.held
    last = leaf.computed_end - 1
    block = last // reading.block
    if last < request.first_read or block == sequence.freed_block:
        return
    sequence.freed_block = block
    ranges = reading.visible(block)
    thin(tree, leaf, int(ranges[-1, 0]), ranges)


def awaits_press(sequence: Sequence) -> bool:
    """Return whether the prompt of a running sequence is still to be pressed, by this sequence or by another one with
    the same prompt.
    """
    if sequence.pressed or not isinstance(sequence.request.reading, Press):
        return False
    last = _last_prompt_node(sequence)
    above = last.parent
    sequence.pressed = last.start == sequence.request.first_read and (
        above is None or above.parent is None or above.extent_positions is not None
    )
    return not sequence.pressed


def add_pressing_rows(sequence: Sequence, policy: Press, budget: int, batch: Batch) -> int:
    """Let the last rows of a prompt, all of which has slots, score its keys: those of the window that this step
    computes, and as many of the others as `budget` allows, which are read again. Returns the rows added.
    """
    rows: list[int] = []
    added, stop = 0, sequence.request.prompt.size
    node: Node | None = _last_prompt_node(sequence)
    while node is not None and len(rows) < policy.window and stop > node.start:
        stop -= 1
        row = batch.row_of(node, stop - node.start)
        if row is None:
            if added == budget:
                break
            row = batch.add_read(sequence.request, node, stop - node.start)
            added += 1
        rows.append(row)
        if stop == node.start:
            node = node.parent
    if rows:
        slots = _last_prompt_node(sequence).path_slots(0, sequence.request.prompt.size)
        batch.pressing[sequence.namespace] = PressingRows(sequence, policy, rows[::-1], slots)
        sequence.scheduled_in = batch.step
    return added


def press(tree: RadixTree, part: PressingRows, scores: NDArray[np.floating]) -> None:
    """Free the slots of a prompt but for those that its policy keeps, given the scores of its keys `[scored]`."""
    size = part.slots.size
    thin(tree, _last_prompt_node(part.sequence), size - 1, part.policy.kept(scores, size))


def _last_prompt_node(sequence: Sequence) -> Node:
    """Return the node of the last prompt token of a running sequence."""
    assert sequence.cursor is not None
    node, last = sequence.cursor.held, sequence.request.prompt.size - 1
    while node.start > last and node.parent is not None:
        node = node.parent
    return node
