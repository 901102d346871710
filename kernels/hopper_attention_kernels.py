"""Tree attention of wide tiles (65 to 128 query-head rows) on Hopper, in Gluon, over the tables of
`radixgen.kernels.work`.

A program has three warp groups. One copies queries, blocks of runs (by the bulk copy engine) and gathered keys (one by
one) into one ring of shared memory. The other two attend, with 64 query-head rows each, and never see a slot: to them
an item is a number of whole blocks, then a number of masked ones. Their matrix products overlap with their exponentials
(FlashAttention-3, arXiv 2407.08608, section 3.2).

With 8-bit keys there are four: two copy, half of each block each, and convert keys and values to the data type of the
queries on the way, through registers.

Place j of the ring holds the keys of block j of the runs and the values of block j - 1, which are multiplied at the
same time, so that n blocks take n + 1 places. A place of gathered keys holds keys and values of the same block.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from radixgen.kernels.hopper_conversion_kernels import convert_first, convert_gathered, convert_runs
from radixgen.kernels.triton_kernels import ITEM_FIELDS, LN_2, LOG2_E


@gluon.jit
def _task(queue, turn):
    """Return the program's task in round `turn`; -1 after the last, for two rounds."""
    return gl.load(queue + gl.program_id(0) + turn * gl.num_programs(0))


@gluon.jit
def _item(items, task, age, KV_HEADS: gl.constexpr):
    """Return first row, rows, runs from, to, gathered keys from, to (including growth), first partial result, blocks of
    runs.

    For task -1, those of the first item.
    """
    item = items + (gl.maximum(task, 0) // KV_HEADS) * ITEM_FIELDS
    key_end = gl.load(item + 5) + age * gl.load(item + 7)
    return (
        gl.load(item), gl.load(item + 1), gl.load(item + 2), gl.load(item + 3), gl.load(item + 4), key_end,
        gl.load(item + 6), gl.load(item + 8),
    )  # fmt: skip


@gluon.jit
def _copy_queries(
    q, tile, first_row, num_rows, head,
    FIRST: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr,
):  # fmt: skip
    """Copy 64 packed rows from FIRST on into `tile [64, DIM]`; missing rows become 0."""
    COPIED: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    packed = FIRST + gl.arange(0, 64, gl.SliceLayout(1, COPIED))
    row = packed // GROUP
    dim = gl.arange(0, DIM, gl.SliceLayout(0, COPIED))
    place = ((first_row + row) * (KV_HEADS * GROUP) + head * GROUP + packed % GROUP).to(gl.int64) * DIM
    async_copy.async_copy_global_to_shared(
        tile, q + place[:, None] + dim[None, :], mask=((row < num_rows)[:, None]) & (dim >= 0)[None, :]
    )


@gluon.jit
def _copy_block(
    pools, key_slot, value_slot, head, shared, count, KEYS: gl.constexpr, VALUES: gl.constexpr,
    DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the next place of the ring: with KEYS from `key_slot` on, and with VALUES from `value_slot` on."""
    _, _, _, _, _, k_blocks, v_blocks = pools
    _, _, k_ring, v_ring, _, ready, _, empty, _, _ = shared
    at = count % STAGES
    mbarrier.wait(empty.index(at), (count // STAGES & 1) ^ 1)
    mbarrier.expect(ready.index(at), KEYS * k_blocks.block_type.nbytes + VALUES * v_blocks.block_type.nbytes)
    column = head * DIM
    if VALUES:
        tma.async_copy_global_to_shared(v_blocks, [value_slot, column], ready.index(at), v_ring.index(at))
    if KEYS:
        tma.async_copy_global_to_shared(k_blocks, [key_slot, column], ready.index(at), k_ring.index(at))


@gluon.jit
def _copy_runs(
    pools, runs, run_begin, run_end, before, head, shared, count,
    DIM: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the places of an item's blocks but the first, which begins at slot `before`."""
    for run in range(run_begin, run_end):
        start = gl.load(runs + 2 * run)
        stop = start + gl.load(runs + 2 * run + 1)
        if run == run_begin:
            start += BLOCK
        for slot in range(start, stop, BLOCK):
            _copy_block(pools, slot, before, head, shared, count, True, True, DIM, STAGES)
            before = slot
            count += 1
    _copy_block(pools, before, before, head, shared, count, False, True, DIM, STAGES)
    return count + 1


@gluon.jit
def _copy_keys(
    k, v, key_slots, key_rows, k_tile, v_tile, rows_tile, begin, end, head,
    KV_HEADS: gl.constexpr, DIM: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Copy gathered keys [begin, end), at most BLOCK, their values, and the interval of rows that see them; 0, so no
    row, after the last.
    """
    COPIED: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    place = begin + gl.arange(0, BLOCK, FLAT)
    async_copy.async_copy_global_to_shared(rows_tile, key_rows + place, mask=place < end)
    dim = gl.arange(0, DIM, gl.SliceLayout(0, COPIED))
    for part in gl.static_range(BLOCK // 32):
        place = begin + part * 32 + gl.arange(0, 32, gl.SliceLayout(1, COPIED))
        slot = gl.load(key_slots + place, mask=place < end, other=0)
        offset = ((slot.to(gl.int64) * KV_HEADS + head) * DIM)[:, None] + dim[None, :]
        listed = (place < end)[:, None] & (dim >= 0)[None, :]
        async_copy.async_copy_global_to_shared(k_tile.slice(part * 32, 32), k + offset, mask=listed)
        async_copy.async_copy_global_to_shared(v_tile.slice(part * 32, 32), v + offset, mask=listed)


@gluon.jit
def _gather(
    pools, key_slots, key_rows, begin, end, head, shared, count, gathers,
    KV_HEADS: gl.constexpr, DIM: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, QUANTIZED: gl.constexpr,
    HALF: gl.constexpr,
):  # fmt: skip
    """Fill the next place of the ring with gathered keys [begin, end), at most BLOCK."""
    k, v, _, _, _, _, _ = pools
    _, _, k_ring, v_ring, rows_ring, ready, gathered, empty, _, _ = shared
    at = count % STAGES
    if QUANTIZED:
        convert_gathered(
            pools, key_slots, key_rows, begin, end, head, shared, count, gathers, KV_HEADS, DIM, STAGES, HALF
        )
    else:
        mbarrier.wait(empty.index(at), (count // STAGES & 1) ^ 1)
        _copy_keys(
            k, v, key_slots, key_rows, k_ring.index(at), v_ring.index(at), rows_ring.index(at), begin, end, head,
            KV_HEADS, DIM, BLOCK,
        )  # fmt: skip
        async_copy.mbarrier_arrive(gathered.index(gathers % STAGES), increment_count=False)
    mbarrier.arrive(ready.index(at), count=1)  # nobody waits for it: its phases count the uses of its place


@gluon.jit
def _produce(
    q, pools, tables, shared,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    QUANTIZED: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """Copy what every item needs, in the order in which it is attended to, as places become empty. If QUANTIZED, this
    warp group copies and converts the first or second HALF of each block, and copies that half of the queries.

    Waits for empty places only: copies signal their arrival to the barriers of their places.
    """
    queue, items, runs, key_slots, key_rows, age = tables
    q_first, q_second, _, _, _, _, _, _, q_ready, q_empty = shared
    turn = 0
    count = 0
    gathers = 0
    task, coming = _task(queue, 0), _task(queue, 1)
    first_row, num_rows, run_begin, run_end, key_begin, key_end, _, blocks = _item(items, task, age, KV_HEADS)
    while task >= 0:
        after = _task(queue, turn + 2)
        (
            next_first_row, next_num_rows, next_run_begin, next_run_end, next_key_begin, next_key_end, _, next_blocks,
        ) = _item(items, coming, age, KV_HEADS)  # fmt: skip
        head = task % KV_HEADS
        # The first keys are copied before the queries, whose place is in use until the last item has read all its keys.
        if blocks > 0:
            before = gl.load(runs + 2 * run_begin)
            if QUANTIZED:
                convert_first(pools, before, head, shared, count, KV_HEADS, DIM, STAGES, HALF)
            else:
                _copy_block(pools, before, before, head, shared, count, True, False, DIM, STAGES)
            count += 1
        else:
            before = 0
        for half in gl.static_range(2):
            if not QUANTIZED or half == HALF:
                mbarrier.wait(q_empty.index(half), (turn & 1) ^ 1)
                tile = q_second if half else q_first
                _copy_queries(q, tile, first_row, num_rows, head, 64 * half, KV_HEADS, GROUP, DIM)
                async_copy.mbarrier_arrive(q_ready.index(half), increment_count=False)
        if blocks > 0:
            if QUANTIZED:
                count = convert_runs(
                    pools, runs, run_begin, run_end, before, head, shared, count, blocks, KV_HEADS, DIM, BLOCK, STAGES,
                    HALF,
                )  # fmt: skip
            else:
                count = _copy_runs(
                    pools, runs, run_begin, run_end, before, head, shared, count, DIM, BLOCK, STAGES
                )  # fmt: skip
        for begin in range(key_begin, key_end, BLOCK):
            _gather(
                pools, key_slots, key_rows, begin, key_end, head, shared, count, gathers, KV_HEADS, DIM, BLOCK, STAGES,
                QUANTIZED, HALF,
            )  # fmt: skip
            count += 1
            gathers += 1
        turn += 1
        task, coming, blocks = coming, after, next_blocks
        first_row, num_rows, run_begin, run_end = next_first_row, next_num_rows, next_run_begin, next_run_end
        key_begin, key_end = next_key_begin, next_key_end


@gluon.jit
def _added(weights, COLUMNS: gl.constexpr):
    """Return sums `[rows, 8]` over every eighth key: each thread adds its own, and the eight are added at the end."""
    return gl.sum(gl.reshape(weights, [64, COLUMNS // 8, 8]), 1)


@gluon.jit
def _shrunk(total, shrink):
    """Return `total [rows, 8]` times `shrink [rows]`."""
    ROW: gl.constexpr = gl.SliceLayout(1, total.type.layout)
    return total * gl.convert_layout(shrink, ROW)[:, None]


@gluon.jit
def _consume(
    outputs, tables, scale, shared,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    SINKS: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """Attend with 64 packed rows of every item, the first or second HALF, in one warp group."""
    FIRST: gl.constexpr = 64 * HALF
    out, lse, partial_out, partial_lse, sinks = outputs
    queue, items, _, _, _, age = tables
    q_first, q_second, k_ring, v_ring, rows_ring, ready, gathered, empty, q_ready, q_empty = shared
    q_tile = q_second if HALF else q_first
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    HELD: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    SCORES_ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    dtype: gl.constexpr = k_ring.dtype
    unit = scale * LOG2_E
    turn = 0
    count = 0
    gathers = 0
    nothing = gl.zeros([64, BLOCK], gl.float32, SCORES)
    row = (FIRST + gl.arange(0, 64, SCORES_ROW)) // GROUP
    task, coming = _task(queue, 0), _task(queue, 1)
    first_row, num_rows, _, _, key_begin, key_end, partial, blocks = _item(items, task, age, KV_HEADS)
    while task >= 0:
        head = task % KV_HEADS
        top = gl.full([64], float("-inf"), gl.float32, SCORES_ROW)
        total = _added(nothing, BLOCK)
        values = gl.zeros([64, DIM], gl.float32, OUT)
        mbarrier.wait(q_ready.index(HALF), turn & 1)
        fence_async_shared()
        # Load two queue entries and one item ahead, so that no item waits for its own fields; after the fence, which
        # would wait for the loads.
        after_coming = _task(queue, turn + 2)
        (
            next_first_row, next_num_rows, _, _, next_key_begin, next_key_end, next_partial, next_blocks,
        ) = _item(items, coming, age, KV_HEADS)  # fmt: skip

        if blocks > 0:
            at = count % STAGES
            mbarrier.wait(ready.index(at), count // STAGES & 1)
            scores = warpgroup_mma(q_tile, k_ring.index(at).permute((1, 0)), nothing, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=(scores,))
            mbarrier.arrive(empty.index(at), count=1)
            top = gl.max(scores, 1) * unit
            weights = gl.exp2(scores * unit - top[:, None])
            total = _added(weights, BLOCK)
            held = gl.convert_layout(weights.to(dtype), HELD)
            count += 1
            at = count % STAGES
            mbarrier.wait(ready.index(at), count // STAGES & 1)
            for _ in range(1, blocks):
                scores = warpgroup_mma(q_tile, k_ring.index(at).permute((1, 0)), nothing, use_acc=False, is_async=True)
                values = warpgroup_mma(held, v_ring.index(at), values, is_async=True)
                scores = warpgroup_mma_wait(1, deps=(scores,))
                new_top = gl.maximum(top, gl.max(scores, 1) * unit)
                shrink = gl.exp2(top - new_top)
                weights = gl.exp2(scores * unit - new_top[:, None])
                total = _shrunk(total, shrink) + _added(weights, BLOCK)
                top = new_top
                # Inputs of the next products. This branch keeps ptxas from moving exponentials or the wait.
                after = (count + 1) % STAGES
                mbarrier.wait(ready.index(after), (count + 1) // STAGES & 1)
                values, weights = warpgroup_mma_wait(0, deps=(values, weights))
                mbarrier.arrive(empty.index(at), count=1)
                held = gl.convert_layout(weights.to(dtype), HELD)
                values = values * gl.convert_layout(shrink, OUT_ROW)[:, None]
                count += 1
                at = after
            mbarrier.arrive(q_empty.index(HALF), count=1, pred=key_begin >= key_end)
            values = warpgroup_mma(held, v_ring.index(at), values, is_async=True)
            values = warpgroup_mma_wait(0, deps=(values,))
            mbarrier.arrive(empty.index(at), count=1)
            count += 1

        for _ in range(key_begin, key_end, BLOCK):
            at = count % STAGES
            mbarrier.wait(gathered.index(gathers % STAGES), gathers // STAGES & 1)
            fence_async_shared()
            scores = warpgroup_mma(q_tile, k_ring.index(at).permute((1, 0)), nothing, use_acc=False, is_async=True)
            rows = rows_ring.index(at).load(gl.SliceLayout(0, SCORES))
            seen = ((rows & 0xFF)[None, :] <= row[:, None]) & (row[:, None] < (rows >> 8)[None, :])
            scores = warpgroup_mma_wait(0, deps=(scores,))
            scores = gl.where(seen, scores, float("-inf"))
            new_top = gl.maximum(top, gl.max(scores, 1) * unit)
            base = gl.where(new_top == float("-inf"), 0.0, new_top)
            shrink = gl.exp2(top - base)
            weights = gl.exp2(scores * unit - base[:, None])
            total = _shrunk(total, shrink) + _added(weights, BLOCK)
            top = new_top
            values = values * gl.convert_layout(shrink, OUT_ROW)[:, None]
            values = warpgroup_mma(gl.convert_layout(weights.to(dtype), HELD), v_ring.index(at), values, is_async=True)
            values = warpgroup_mma_wait(0, deps=(values,))
            mbarrier.arrive(empty.index(at), count=1)
            count += 1
            gathers += 1
        mbarrier.arrive(q_empty.index(HALF), count=1, pred=(blocks == 0) | (key_begin < key_end))

        whole = gl.convert_layout(gl.sum(total, 1), OUT_ROW)
        peak = gl.convert_layout(top, OUT_ROW)
        none = whole == 0.0
        whole = gl.where(none, 1.0, whole)
        values = values * (1.0 / whole)[:, None]
        row_lse = gl.where(none, float("-inf"), (peak + gl.log2(whole)) * LN_2)
        packed_out = FIRST + gl.arange(0, 64, OUT_ROW)
        row_out = packed_out // GROUP
        real = row_out < num_rows
        q_head = head * GROUP + packed_out % GROUP
        dim = gl.arange(0, DIM, gl.SliceLayout(0, OUT))
        if partial < 0:
            if SINKS:
                sink = gl.load(sinks + q_head)
                values = values * (1.0 / (1.0 + gl.exp2((sink - row_lse) * LOG2_E)))[:, None]
            target = (first_row + row_out) * (KV_HEADS * GROUP) + q_head
            pointer = out + target.to(gl.int64)[:, None] * DIM + dim[None, :]
            gl.store(pointer, values.to(out.dtype.element_ty), mask=real[:, None])
            gl.store(lse + target, row_lse, mask=real)
        else:
            target = (partial + row_out) * (KV_HEADS * GROUP) + q_head
            gl.store(partial_out + target.to(gl.int64)[:, None] * DIM + dim[None, :], values, mask=real[:, None])
            gl.store(partial_lse + target, row_lse, mask=real)
        turn += 1
        task, coming, blocks, partial = coming, after_coming, next_blocks, next_partial
        first_row, num_rows, key_begin, key_end = next_first_row, next_num_rows, next_key_begin, next_key_end


@gluon.jit
def attend_wide(
    q, k, v, k_scales, v_scales, num_slots, k_blocks, v_blocks, out, lse, partial_out, partial_lse, sinks,
    row_positions, laid_out_positions, queue, items, runs, key_slots, key_rows, scale,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    SINKS: gl.constexpr, QUANTIZED: gl.constexpr, PDL: gl.constexpr, CONSUMER_REGS: gl.constexpr,
    PRODUCER_REGS: gl.constexpr,
):  # fmt: skip
    """Compute every work item (unit x KV head) in this program's queue of wide tiles.

    Arguments as in `radixgen.kernels.triton_kernels.attend`, with heads of DIM for keys and values, and BLOCK keys per
    block.
    """
    dtype: gl.constexpr = q.dtype.element_ty
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, DIM], TILE)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, DIM], TILE)
    q_first = gl.allocate_shared_memory(dtype, [64, DIM], TILE)
    q_second = gl.allocate_shared_memory(dtype, [64, DIM], TILE)
    rows_ring = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    gathered = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for place in gl.static_range(STAGES):
        mbarrier.init(ready.index(place), count=2 if QUANTIZED else 1)
        mbarrier.init(gathered.index(place), count=2 if QUANTIZED else 128)  # copying threads
        mbarrier.init(empty.index(place), count=2)
    for half in gl.static_range(2):
        mbarrier.init(q_ready.index(half), count=128)
        mbarrier.init(q_empty.index(half), count=1)
    laid_out_at = gl.load(laid_out_positions)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    age = gl.load(row_positions).to(gl.int32) - laid_out_at
    pools = (k, v, k_scales, v_scales, num_slots, k_blocks, v_blocks)
    shared = (q_first, q_second, k_ring, v_ring, rows_ring, ready, gathered, empty, q_ready, q_empty)
    outputs = (out, lse, partial_out, partial_lse, sinks)
    tables = (queue, items, runs, key_slots, key_rows, age)
    if QUANTIZED:
        gl.warp_specialize(
            [
                (_consume, (outputs, tables, scale, shared, KV_HEADS, GROUP, DIM, BLOCK, STAGES, SINKS, 0)),
                (_consume, (outputs, tables, scale, shared, KV_HEADS, GROUP, DIM, BLOCK, STAGES, SINKS, 1)),
                (_produce, (q, pools, tables, shared, KV_HEADS, GROUP, DIM, BLOCK, STAGES, True, 0)),
                (_produce, (q, pools, tables, shared, KV_HEADS, GROUP, DIM, BLOCK, STAGES, True, 1)),
            ],
            [4, 4, 4],
            [CONSUMER_REGS, PRODUCER_REGS, PRODUCER_REGS],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (outputs, tables, scale, shared, KV_HEADS, GROUP, DIM, BLOCK, STAGES, SINKS, 0)),
                (_consume, (outputs, tables, scale, shared, KV_HEADS, GROUP, DIM, BLOCK, STAGES, SINKS, 1)),
                (_produce, (q, pools, tables, shared, KV_HEADS, GROUP, DIM, BLOCK, STAGES, False, 0)),
            ],
            [4, 4],
            [CONSUMER_REGS, PRODUCER_REGS],
        )
