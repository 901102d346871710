"""KV cache: the radix tree, the pool of slots, and the tensors behind the slots.

    tree              tokens -> nodes -> extents: match, insert, split, advance, lock, evict
    node              a run of tokens and its slots
    slots             how nodes get and return slots
    boundary          moving tokens from a node to its parent
    columns           the planner's view of all nodes
    listener          interface for observers
    eviction          order of eviction
    policy            eviction policies
    check             the tree's invariants
    stamps            the prefix in each slot, for debugging
    pool              extents of slots: allocate, grow, release behind a fence
    block_projection  computed tokens as fixed-size blocks, for routers in front of several engines
    demotion          paths that are evicted before all others
    match             matches kept up to date while the tree changes
    recent_evictions  recently evicted continuations
    runs              tokens of a prompt that are cached at other positions
    thinning          slots that are freed while their tokens stay
    sharing           why a prompt was not shared to its end
    tokens            arrays of token ids
    host_tier         a second tree, in host memory
    host_saves        copies to it, and writes to disk
    host_fetches      copies from it, and reads from disk
    host_copies       interface for what copies
    fetch_costs       which part of a prefix is fetched, and which is computed
    disk_tier         KV on disk: which chunks are there, and the threads that read and write them
    kv_files          the chunk files
    loading           slots filled by copies
    storage           slots -> K and V of every layer

Tree and pool hold integers and NumPy arrays only, and know neither models nor devices.
"""

from radixgen.cache.block_projection import (
    BlockEvent,
    BlockProjection,
    BlocksAdded,
    BlocksDropped,
    BlocksReset,
    hash_blocks,
)
from radixgen.cache.columns import Columns
from radixgen.cache.demotion import demote
from radixgen.cache.disk_tier import DiskTier, HostRecords
from radixgen.cache.host_copies import Copy, KVCopies
from radixgen.cache.host_fetches import Fetch
from radixgen.cache.host_tier import HostTier
from radixgen.cache.kv_files import CHUNK_TOKENS, KVFiles
from radixgen.cache.listener import Listener
from radixgen.cache.match import FollowedMatch, Match
from radixgen.cache.node import BLENDED, PRIVATE, Lock, Node
from radixgen.cache.policy import EvictionPolicy, first_in, least_recently_used
from radixgen.cache.pool import Extent, ExtentPool
from radixgen.cache.recent_evictions import RecentEvictions
from radixgen.cache.run_index import KVMover, KVMoves, Run, RunIndex, blended_namespace
from radixgen.cache.sharing import sharing_end
from radixgen.cache.thinning import thin
from radixgen.cache.tokens import (
    MAX_MARK,
    MAX_MARKED_TOKEN,
    TokenArray,
    as_tokens,
    common_prefix_len,
    exact_len,
    marked,
    marks,
    token_ids,
)
from radixgen.cache.tree import RadixTree

__all__ = [
    "BLENDED",
    "CHUNK_TOKENS",
    "MAX_MARK",
    "MAX_MARKED_TOKEN",
    "PRIVATE",
    "BlockEvent",
    "BlockProjection",
    "BlocksAdded",
    "BlocksDropped",
    "BlocksReset",
    "Columns",
    "Copy",
    "DiskTier",
    "EvictionPolicy",
    "Extent",
    "ExtentPool",
    "Fetch",
    "FollowedMatch",
    "HostRecords",
    "HostTier",
    "KVCopies",
    "KVFiles",
    "KVMover",
    "KVMoves",
    "Listener",
    "Lock",
    "Match",
    "Node",
    "RadixTree",
    "RecentEvictions",
    "Run",
    "RunIndex",
    "TokenArray",
    "as_tokens",
    "blended_namespace",
    "common_prefix_len",
    "demote",
    "exact_len",
    "first_in",
    "hash_blocks",
    "least_recently_used",
    "marked",
    "marks",
    "sharing_end",
    "thin",
    "token_ids",
]
