"""What is stored and where: the radix tree, the pool of slots, the tensors behind the slots.

    tree     tokens -> nodes -> extents: match, insert, split, advance, lock, evict
    pool     extents of slots: allocate, grow, release behind a fence
    blocks   what is computed, as blocks of a fixed length: what a router in front of several engines is told
    follow   matches that stay right while the tree changes
    ghosts   what was evicted lately; sharing says why a prompt was not shared to its end
    policy   node -> sortable key: which leaf is evicted first
    storage  slots -> K and V of every layer

Tree and pool hold integers and NumPy arrays only; they know no model and no device.
"""

from radixgen.cache.blocks import BlockEvent, BlockProjection, Cleared, Removed, Stored, hash_blocks
from radixgen.cache.follow import FollowedMatch, Match
from radixgen.cache.ghosts import Ghosts
from radixgen.cache.policy import EvictionPolicy, first_in, least_recently_used
from radixgen.cache.pool import Extent, ExtentPool
from radixgen.cache.sharing import sharing_end
from radixgen.cache.tokens import TokenArray, as_tokens, common_prefix_len
from radixgen.cache.tree import Columns, Listener, Lock, Node, RadixTree

__all__ = [
    "BlockEvent",
    "BlockProjection",
    "Cleared",
    "Columns",
    "EvictionPolicy",
    "Extent",
    "ExtentPool",
    "FollowedMatch",
    "Ghosts",
    "Listener",
    "Lock",
    "Match",
    "Node",
    "RadixTree",
    "Removed",
    "Stored",
    "TokenArray",
    "as_tokens",
    "common_prefix_len",
    "first_in",
    "hash_blocks",
    "least_recently_used",
    "sharing_end",
]
