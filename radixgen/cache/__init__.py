"""What is stored and where: the radix tree, the pool of slots, the tensors behind the slots.

    tree     tokens -> nodes -> extents: match, insert, split, advance, lock, evict
    node     a run of tokens and its slots; columns: the planner's view of all nodes
    eviction which node goes first, by a policy; check: the tree's invariants, stamps: what each slot holds
    pool     extents of slots: allocate, grow, release behind a fence
    blocks   what is computed, as blocks of a fixed length: what a router in front of several engines is told
    follow   matches that stay right while the tree changes
    ghosts   what was evicted lately; sharing says why a prompt was not shared to its end
    storage  slots -> K and V of every layer

Tree and pool hold integers and NumPy arrays only; they know no model and no device.
"""

from radixgen.cache.blocks import BlockEvent, BlockProjection, BlocksAdded, BlocksDropped, BlocksReset, hash_blocks
from radixgen.cache.columns import Columns
from radixgen.cache.follow import FollowedMatch, Match
from radixgen.cache.ghosts import Ghosts
from radixgen.cache.node import Lock, Node
from radixgen.cache.policy import EvictionPolicy, first_in, least_recently_used
from radixgen.cache.pool import Extent, ExtentPool
from radixgen.cache.sharing import sharing_end
from radixgen.cache.tokens import TokenArray, as_tokens, common_prefix_len
from radixgen.cache.tree import Listener, RadixTree

__all__ = [
    "BlockEvent",
    "BlockProjection",
    "BlocksAdded",
    "BlocksDropped",
    "BlocksReset",
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
    "TokenArray",
    "as_tokens",
    "common_prefix_len",
    "first_in",
    "hash_blocks",
    "least_recently_used",
    "sharing_end",
]
