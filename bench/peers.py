"""Other systems' attention as contenders: PyTorch's own, FlashInfer's, and FlashAttention-3's over pages.

A peer that is not installed is left out. FlashInfer is looked for as a package; FlashAttention-3 is the library that
vLLM's wheel carries as `_vllm_fa3_C.abi3.so`, at the path in RADIXGEN_FLASH_ATTENTION_3.

| contender | what it is |
| --- | --- |
| pytorch | scaled_dot_product_attention over a private copy of every path, all of one length |
| pytorch_flex | FlexAttention, compiled, with a block mask made from the plan that has a unit for each node |
| flashinfer_decode | BatchDecodeWithPagedKVCacheWrapper; with tensor cores from 4 query heads a key head on |
| flashinfer_batch | BatchAttention, one persistent kernel for prefill and decode |
| flashinfer_cascade | MultiLevelCascadeAttentionWrapper, one level for each of the tree's; rows all equally deep |
| flashinfer_cascade_fa2 | the same with the kernel that splits long keys, as its default on Hopper does not |
| fa3_paged | FlashAttention-3 with a block table, as vLLM calls it |

Pages. Paths share pages of 16 where every node above another is a multiple of 16 long. Elsewhere a contender runs
twice: over a private copy of every path, up to PRIVATE_BYTES, and, as NAME_pageN, over shared pages of the largest N
that divides those nodes. The levels of a cascade need no such thing: each node begins a page.

All planning is done before the call, and its time kept as `plan_ms`. FlashInfer's wrappers are planned for this one
batch, without the room that `use_cuda_graph` leaves for others: a graph that is never planned anew needs none.
"""

import importlib.util
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bench.trees import Tree, lay_out
from radixgen.core import Plan
from radixgen.core.plan import Int32Array
from radixgen.core.settings import flash_attention_3
from radixgen.scheduler.forest import Forest
from radixgen.scheduler.planner import plan

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Call = Callable[[], Tensor]
"""Attends once; gives outputs [rows, q_heads, head_dim]."""
Contender = tuple[str, Call, dict[str, Any]]
"""A name, its call, and what else is known of it."""

Contend = Callable[[Tree, Tensor, Tensor, Tensor], Iterator[Contender]]
"""A peer: what it does with a tree, queries, keys and values."""

PAGE_SIZE = 16
PRIVATE_BYTES = 24 << 30
"""Private copies of the paths are made up to this size."""
WORKSPACE_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Paged:
    """Keys and values in pages, and segments of them.

    Segment i has `lengths[i]` keys, in the pages `indices[indptr[i]:indptr[i + 1]]`, all full but the last.
    """

    k: Tensor
    """[num_pages, page_size, kv_heads, head_dim]; `v` alike"""
    v: Tensor
    indptr: Int32Array
    indices: Int32Array
    lengths: Int32Array
    private: bool = False

    @property
    def page_size(self) -> int:
        return self.k.shape[1]

    @property
    def last_page_len(self) -> Int32Array:
        return (self.lengths - 1) % self.page_size + 1

    def facts(self) -> dict[str, Any]:
        held = f"private, {2 * self.k.nbytes / 1e9:.1f} GB" if self.private else "shared"
        return {"pages": held, "page_size": self.page_size}


@dataclass(frozen=True, slots=True)
class Level:
    """The nodes at one depth: query rows [qo_indptr[i], qo_indptr[i + 1]) attend over segment i."""

    qo_indptr: Int32Array
    segments: Paged


def peers(tree: Tree, q: Tensor, k: Tensor, v: Tensor, without: Collection[str] = ()) -> Iterator[Contender]:
    """Each peer that is here and can serve this tree, but for those in `without`. A failed one's call raises its error.

    q: [rows, q_heads, head_dim]; k, v: [slots, kv_heads, head_dim], each node's keys in one extent, in order of nodes.
    """
    if q.device.type != "cuda":
        return
    for name in names_here():
        if name in without:
            continue
        try:
            yield from PEERS[name](tree, q, k, v)
        except Exception as error:
            yield f"{name}_setup", _raising(error), {}


def names_here() -> list[str]:
    """The peers whose packages or libraries are installed."""
    library = flash_attention_3()
    missing = set()
    if importlib.util.find_spec("flashinfer") is None:
        missing.add("flashinfer")
    if library is None or not library.is_file():
        missing.add("fa3")
    return [name for name in PEERS if name.split("_")[0] not in missing]


def _raising(error: Exception) -> Call:
    """Without the traceback, whose frames would keep their tensors."""
    bare = error.with_traceback(None)

    def call() -> Tensor:
        raise bare

    return call


def _over_rows(name: str, prepare: Callable[[Tensor, Paged], tuple[Call, dict[str, Any]]]) -> Contend:
    """A contender whose segments are the rows' whole paths, once for each way to hold them in pages."""

    def contend(tree: Tree, q: Tensor, k: Tensor, v: Tensor) -> Iterator[Contender]:
        for suffix, rows in paged_rows(tree, k, v):
            try:
                call, facts = prepare(q, rows)
            except Exception as error:
                call, facts = _raising(error), {}
            yield name + suffix, call, rows.facts() | facts

    return contend


def paths(forest: Forest, nodes: Sequence[int]) -> list[list[int]]:
    """From its root down, the nodes above each given one, and itself."""
    found = []
    for node in nodes:
        path = []
        while node >= 0:
            path.append(int(node))
            node = int(forest.parents[node])
        found.append(path[::-1])
    return found


def paged_nodes(forest: Forest, k: Tensor, v: Tensor, page_size: int) -> Paged:
    """A segment for each node, each from a page's beginning on: the pool itself where that is so, else a copy."""
    counts = -(-forest.lengths // page_size)
    indptr = _indptr(counts)
    if not (forest.lengths % page_size).any():
        pages_k, pages_v = (pool.view(-1, page_size, *pool.shape[1:]) for pool in (k, v))
    else:
        slots = [_padded(*extent, page_size) for extent in zip(forest.extent_starts, forest.lengths, strict=True)]
        pages_k, pages_v = _gathered(slots, k, page_size), _gathered(slots, v, page_size)
    return Paged(pages_k, pages_v, indptr, np.arange(indptr[-1], dtype=np.int32), forest.lengths)


def paged_rows(tree: Tree, k: Tensor, v: Tensor) -> Iterator[tuple[str, Paged]]:
    """The paths of the tree's rows as segments, in each way that the module's docstring tells; a suffix names it."""
    forest, nodes, _ = lay_out(tree)
    above = np.unique(forest.parents[forest.parents >= 0])
    page_size = math.gcd(PAGE_SIZE, *forest.lengths[above].tolist())
    rows = paths(forest, nodes.tolist())
    if page_size < PAGE_SIZE:
        private = private_rows(forest, rows, k, v)
        if private is not None:
            yield "", private
        del private
    suffix = "" if page_size == PAGE_SIZE else f"_page{page_size}"
    yield suffix, joined(paged_nodes(forest, k, v, page_size), rows)


def joined(nodes: Paged, rows: Sequence[Sequence[int]]) -> Paged:
    """One segment for each row, of the segments it names; all but its last must fill their pages."""
    pages = np.diff(nodes.indptr)
    indices = np.concatenate([nodes.indices[nodes.indptr[n] : nodes.indptr[n + 1]] for row in rows for n in row])
    counts = np.array([pages[row].sum() for row in rows])
    lengths = np.array([nodes.lengths[row].sum() for row in rows], np.int32)
    return replace(nodes, indptr=_indptr(counts), indices=indices, lengths=lengths)


def private_rows(forest: Forest, rows: Sequence[Sequence[int]], k: Tensor, v: Tensor) -> Paged | None:
    """A copy of each row's path in pages of its own, or None where that is too large."""
    lengths = np.array([forest.lengths[row].sum() for row in rows], np.int32)
    indptr = _indptr(-(-lengths // PAGE_SIZE))
    if 2 * int(indptr[-1]) * PAGE_SIZE * k[0].nbytes > PRIVATE_BYTES:
        return None
    slots = [_tail_padded(path_slots(forest, row), PAGE_SIZE) for row in rows]
    pages_k, pages_v = _gathered(slots, k, PAGE_SIZE), _gathered(slots, v, PAGE_SIZE)
    return Paged(pages_k, pages_v, indptr, np.arange(indptr[-1], dtype=np.int32), lengths, private=True)


def paged_levels(tree: Tree, k: Tensor, v: Tensor) -> list[Level]:
    """One level for each of the tree's, the root's first; none where rows differ in depth or jump between nodes."""
    forest, nodes, _ = lay_out(tree)
    rows = paths(forest, nodes.tolist())
    if len({len(row) for row in rows}) > 1:
        return []
    segments = paged_nodes(forest, k, v, PAGE_SIZE)
    levels = []
    for column in np.array(rows).T:
        begins = np.flatnonzero(np.diff(column, prepend=-1))
        if np.unique(column).size < begins.size:
            return []
        qo_indptr = np.append(begins, column.size).astype(np.int32)
        levels.append(Level(qo_indptr, joined(segments, column[begins, None].tolist())))
    return levels


def path_slots(forest: Forest, row: Sequence[int]) -> Int32Array:
    """Where the keys of a path lie in the pool, first key first."""
    starts, lengths = forest.extent_starts[list(row)], forest.lengths[list(row)]
    return np.concatenate([np.arange(s, s + n, dtype=np.int32) for s, n in zip(starts, lengths, strict=True)])


def _padded(start: int, length: int, page_size: int) -> Int32Array:
    return _tail_padded(np.arange(start, start + length, dtype=np.int32), page_size)


def _tail_padded(slots: Int32Array, page_size: int) -> Int32Array:
    return np.pad(slots, (0, -slots.size % page_size), mode="edge")


def _gathered(slots: Sequence[Int32Array], pool: Tensor, page_size: int) -> Tensor:
    index = torch.from_numpy(np.concatenate(slots)).to(pool.device)
    return pool.index_select(0, index).view(-1, page_size, *pool.shape[1:])


def _indptr(counts: np.ndarray) -> Int32Array:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def pytorch(tree: Tree, q: Tensor, k: Tensor, v: Tensor) -> Iterator[Contender]:
    """Every row's path copied out, all paths of one length: what a caller without a tree would hold."""
    forest, nodes, _ = lay_out(tree)
    ends = (forest.starts + forest.lengths)[nodes]
    size = 2 * nodes.size * int(ends.max()) * k[0].nbytes
    if ends.min() != ends.max() or size > PRIVATE_BYTES:
        return
    slots = np.concatenate([path_slots(forest, row) for row in paths(forest, nodes.tolist())])
    index = torch.from_numpy(slots).to(q.device)
    shape = (nodes.size, int(ends[0]), *k.shape[1:])
    keys, values = (pool[index].view(shape).transpose(1, 2).contiguous() for pool in (k, v))
    queries = q.unsqueeze(2)
    attend = torch.nn.functional.scaled_dot_product_attention
    yield "pytorch", lambda: attend(queries, keys, values, enable_gqa=True).squeeze(2), {"GB": size / 1e9}


def pytorch_flex(tree: Tree, q: Tensor, k: Tensor, v: Tensor, *, compiled: bool = True) -> Iterator[Contender]:
    """Rows come in the plan's order: `back` puts them in the tree's. Uncompiled, all scores are computed."""
    from torch.nn.attention.flex_attention import flex_attention

    made = plan(*lay_out(tree), mode="naive")
    order = torch.from_numpy(made.row_order).to(q.device)
    begin = time.perf_counter()
    mask = block_mask(made, k.shape[0], q.device)
    seconds = time.perf_counter() - begin
    attend = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
    queries, keys, values = (tensor.transpose(0, 1)[None].contiguous() for tensor in (q[order], k, v))

    def call() -> Tensor:
        out: Tensor = attend(queries, keys, values, block_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)

    facts = {"plan_ms": 1e3 * seconds, "blocks_skipped": mask.sparsity(), "back": torch.argsort(order)}
    yield "pytorch_flex", call, facts


def block_mask(made: Plan, slots: int, device: torch.device) -> "BlockMask":
    """Which rows see which slots, by a plan in which each slot is in one segment; the rows in the plan's order."""
    from torch.nn.attention.flex_attention import create_block_mask

    count, lengths = len(made.segment_lengths), made.segment_lengths
    segment = np.full(slots, count, np.int32)
    position = np.zeros(slots, np.int32)
    owner = np.repeat(np.arange(count, dtype=np.int32), lengths)
    within = np.arange(owner.size) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    place = made.segment_starts[owner] + within
    segment[place], position[place] = owner, made.segment_positions[owner] + within
    row = np.arange(made.num_rows)[:, None]
    seen = np.zeros((made.num_rows, count + 1), np.bool_)
    seen[:, :count] = (made.segment_rows[:, 0] <= row) & (row < made.segment_rows[:, 1])
    sees, segment_of, key_at, row_at = (
        torch.from_numpy(table).to(device) for table in (seen, segment, position, made.row_positions)
    )

    def visible(_batch: Tensor, _head: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        return sees[row, segment_of[slot]] & (key_at[slot] <= row_at[row])

    return create_block_mask(visible, None, None, made.num_rows, slots, device=device)


def flashinfer_decode(q: Tensor, rows: Paged) -> tuple[Call, dict[str, Any]]:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    (q_heads, head_dim), kv_heads = q.shape[1:], rows.k.shape[2]
    tensor_cores = q_heads >= 4 * kv_heads
    wrapper = BatchDecodeWithPagedKVCacheWrapper(_workspace(q), use_tensor_cores=tensor_cores)
    plan_ms = _planned(
        lambda: wrapper.plan(
            *map(torch.from_numpy, (rows.indptr, rows.indices, rows.last_page_len)),
            q_heads, kv_heads, head_dim, rows.page_size, q_data_type=q.dtype, kv_data_type=q.dtype,
        )
    )  # fmt: skip
    cache = (rows.k, rows.v)
    return lambda: wrapper.run(q, cache), {"plan_ms": plan_ms, "tensor_cores": tensor_cores}


def flashinfer_batch(q: Tensor, rows: Paged) -> tuple[Call, dict[str, Any]]:
    from flashinfer import BatchAttention

    (q_heads, head_dim), kv_heads = q.shape[1:], rows.k.shape[2]
    wrapper = BatchAttention(device=str(q.device))
    qo_indptr = torch.arange(q.shape[0] + 1, dtype=torch.int32)
    indices = torch.from_numpy(rows.indices).to(q.device)
    indptr, lengths = torch.from_numpy(rows.indptr), torch.from_numpy(rows.lengths)
    plan_ms = _planned(
        lambda: wrapper.plan(
            qo_indptr, indptr, indices, lengths, q_heads, kv_heads, head_dim, head_dim, rows.page_size,
            q_data_type=q.dtype, kv_data_type=q.dtype,
        )
    )  # fmt: skip
    cache = (rows.k, rows.v)
    return lambda: wrapper.run(q, cache)[0], {"plan_ms": plan_ms}


def flashinfer_cascades(tree: Tree, q: Tensor, k: Tensor, v: Tensor) -> Iterator[Contender]:
    """FlashInfer's cascade as it comes, and with the kernel that splits long keys."""
    levels = paged_levels(tree, k, v)
    if not levels:
        return
    for name, backend in (("flashinfer_cascade", None), ("flashinfer_cascade_fa2", "fa2")):
        try:
            call, facts = flashinfer_cascade(q, levels, backend)
        except Exception as error:
            call, facts = _raising(error), {}
        yield name, call, {"levels": len(levels)} | facts


def flashinfer_cascade(q: Tensor, levels: Sequence[Level], backend: str | None) -> tuple[Call, dict[str, Any]]:
    from flashinfer import MultiLevelCascadeAttentionWrapper

    segments = [level.segments for level in levels]
    (q_heads, head_dim), kv_heads = q.shape[1:], segments[0].k.shape[2]
    wrapper = MultiLevelCascadeAttentionWrapper(len(levels), _workspace(q))
    if backend is not None:
        for level in wrapper._batch_prefill_wrappers:
            level._backend = backend
    plan_ms = _planned(
        lambda: wrapper.plan(
            [torch.from_numpy(level.qo_indptr) for level in levels],
            [torch.from_numpy(s.indptr) for s in segments],
            [torch.from_numpy(s.indices) for s in segments],
            [torch.from_numpy(s.last_page_len) for s in segments],
            q_heads, kv_heads, head_dim, PAGE_SIZE, q_data_type=q.dtype, kv_data_type=q.dtype,
        )
    )  # fmt: skip
    cache = (segments[0].k, segments[0].v)
    used = wrapper._batch_prefill_wrappers[0]._backend
    return lambda: wrapper.run(q, cache), {"plan_ms": plan_ms, "backend": used}


def fa3_paged(q: Tensor, rows: Paged) -> tuple[Call, dict[str, Any]]:
    """The number of splits is the library's to choose; what it schedules by is computed beforehand."""
    torch.ops.load_library(str(flash_attention_3()))
    flash = torch.ops._vllm_fa3_C
    (q_heads, head_dim), kv_heads = q.shape[1:], rows.k.shape[2]
    cu_seqlens_q = torch.arange(q.shape[0] + 1, dtype=torch.int32, device=q.device)
    lengths = torch.from_numpy(rows.lengths).to(q.device)
    longest = int(rows.lengths.max())
    table = torch.from_numpy(block_table(rows)).to(q.device)

    def schedule() -> Tensor:
        found: Tensor = flash.get_scheduler_metadata(
            batch_size=q.shape[0], max_seqlen_q=1, max_seqlen_k=longest, num_heads=q_heads, num_heads_k=kv_heads,
            headdim=head_dim, headdim_v=head_dim, qkv_dtype=q.dtype, seqused_k=lengths, cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=None, cu_seqlens_k_new=None, seqused_q=None, leftpad_k=None, page_size=rows.page_size,
            max_seqlen_k_new=0, is_causal=False, window_size_left=-1, window_size_right=-1, has_softcap=False,
            num_splits=0, pack_gqa=None, sm_margin=0,
        )  # fmt: skip
        return found

    plan_ms = _planned(schedule)
    metadata = schedule()

    def call() -> Tensor:
        out: Tensor = flash.fwd(
            q=q, k=rows.k, v=rows.v, k_new=None, v_new=None, q_v=None, out=None, cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=None, cu_seqlens_k_new=None, seqused_q=None, seqused_k=lengths, max_seqlen_q=1,
            max_seqlen_k=longest, page_table=table, kv_batch_idx=None, leftpad_k=None, rotary_cos=None,
            rotary_sin=None, seqlens_rotary=None, q_descale=None, k_descale=None, v_descale=None,
            softmax_scale=head_dim**-0.5, is_causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0,
            is_rotary_interleaved=True, scheduler_metadata=metadata, num_splits=0, pack_gqa=None, sm_margin=0,
            s_aux=None, cp_world_size=1, cp_rank=0, cp_tot_seqused_k=None,
        )[0]  # fmt: skip
        return out

    return call, {"plan_ms": plan_ms}


PEERS: dict[str, Contend] = {
    "pytorch": pytorch,
    "pytorch_flex": pytorch_flex,
    "flashinfer_decode": _over_rows("flashinfer_decode", flashinfer_decode),
    "flashinfer_batch": _over_rows("flashinfer_batch", flashinfer_batch),
    "flashinfer_cascade": flashinfer_cascades,
    "fa3_paged": _over_rows("fa3_paged", fa3_paged),
}


def block_table(rows: Paged) -> Int32Array:
    """[segments, most pages of one]: each segment's pages, then zeros."""
    counts = np.diff(rows.indptr)
    table = np.zeros((counts.size, int(counts.max())), np.int32)
    table[np.arange(table.shape[1]) < counts[:, None]] = rows.indices
    return table


def _workspace(q: Tensor) -> Tensor:
    """FlashInfer wants it zeroed."""
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)


def _planned(make: Callable[[], object]) -> float:
    """Plans twice, and gives the milliseconds of the second: the first also loads what it needs."""
    make()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    make()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin)
