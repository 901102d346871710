"""Fields of KV cache events, as vLLM names and orders them."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from radixgen.cache import BlockEvent, BlocksAdded, BlocksDropped, BlocksReset

MEDIUM, HOST_MEDIUM = "GPU", "CPU"
"""vLLM's names for the memory that attention reads, and for that of the host"""


def fields_of(event: BlockEvent, block_size: int, medium: str) -> dict[str, Any]:
    """Fields of a vLLM event, in vLLM's order, without trailing fields that have default values."""
    if isinstance(event, BlocksReset):
        return {"type": "AllBlocksCleared"}
    if isinstance(event, BlocksDropped):
        return {"type": "BlockRemoved", "block_hashes": event.hashes, "medium": medium}
    fields = {
        "type": "BlockStored",
        "block_hashes": event.hashes,
        "parent_block_hash": event.parent,
        "token_ids": event.tokens.tolist(),
        "block_size": block_size,
        "lora_id": None,
        "medium": medium,
        "lora_name": None,
    }
    if event.namespace and event.parent is None:  # as vLLM: the salt is in the first block only
        own = event.namespace.encode("utf-8", "replace").decode()
        fields["extra_keys"] = [[own]] + [None] * (len(event.hashes) - 1)
    return fields


def joined_events(events: Iterable[BlockEvent]) -> Iterator[BlockEvent]:
    """Merge neighbouring events: stored blocks that continue each other, and removed blocks."""
    group: list[Any] = []
    for event in events:
        if isinstance(event, BlocksDropped) and not event.hashes:
            continue
        if group and not _continues(group[-1], event):
            yield _join(group)
            group = []
        group.append(event)
    if group:
        yield _join(group)


def _continues(before: BlockEvent, event: BlockEvent) -> bool:
    if isinstance(before, BlocksAdded) and isinstance(event, BlocksAdded):
        return event.parent == before.hashes[-1]
    return isinstance(before, BlocksDropped) and isinstance(event, BlocksDropped)


def _join(group: list[Any]) -> BlockEvent:
    first: BlockEvent = group[0]
    if len(group) == 1 or isinstance(first, BlocksReset):
        return first
    hashes = [block for event in group for block in event.hashes]
    if isinstance(first, BlocksDropped):
        return BlocksDropped(hashes)
    return first._replace(hashes=hashes, tokens=np.concatenate([event.tokens for event in group]))
