"""Kernels that choose blocks of keys, and that attend to chosen blocks: see `radixgen.kernels.triton_blocks`.

The choice takes three launches, so that both long and widely shared units use the whole chip: the log-sum-exp of each
query's block scores in each chunk of 64 blocks; each block's weight, with the scores computed again; and the choice
itself, one program per unit. Tables are as in `radixgen.kernels.block_work`.
"""

import triton
import triton.language as tl

from radixgen.kernels import block_levels
from radixgen.kernels.quantized_kernels import normalize
from radixgen.kernels.triton_kernels import LN_2, LOG2_E, _accumulate, _gather, _scale_of, _scores, _store, _unit

CHUNK_FIELDS = tl.constexpr(10)
CHOICE_FIELDS = tl.constexpr(8)
TILE_FIELDS = tl.constexpr(8)
LEVEL_SHIFT, LOWEST = tl.constexpr(block_levels.LEVEL_SHIFT), tl.constexpr(block_levels.LOWEST)
BEST = tl.constexpr(block_levels.LEVELS)
"""Level of each head's best block."""


@triton.jit
def _bounds_of(
    bounds, blocks, first, count, head, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Load least and greatest keys `[CHUNK, PADDED_DIM]` of blocks `first` to `first + count` of the list."""
    place = tl.arange(0, CHUNK)
    dim = tl.arange(0, PADDED_DIM)
    block = tl.load(blocks + first + place, mask=place < count, other=0).to(tl.int64)
    source = bounds + (block * KV_HEADS + head)[:, None] * (2 * HEAD_DIM) + dim[None, :]
    inside = (place < count)[:, None] & (dim < HEAD_DIM)[None, :]
    return tl.load(source, mask=inside, other=0.0), tl.load(source + HEAD_DIM, mask=inside, other=0.0)


@triton.jit
def _block_scores(
    q, least, greatest, first_row, num_rows, begin, count, head, scale, softcap, KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    CHUNK: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Return block scores of a tile of rows as exponents of 2 `[BLOCK_ROWS, CHUNK]`, and which of the rows exist.

    The tile's first row is number `begin` of the query-head rows of `first_row` and those after it.
    """
    packed = begin + tl.arange(0, BLOCK_ROWS)
    real = packed < num_rows * GROUP
    dim = tl.arange(0, PADDED_DIM)
    place = ((first_row + packed // GROUP).to(tl.int64) * KV_HEADS + head) * GROUP + packed % GROUP
    inside = real[:, None] & (dim < HEAD_DIM)[None, :]
    queries = tl.load(q + (place * HEAD_DIM)[:, None] + dim[None, :], mask=inside, other=0.0)
    below, above = tl.minimum(queries, 0.0), tl.maximum(queries, 0.0)
    scores = tl.dot(below.to(least.dtype), tl.trans(least), input_precision="ieee")
    scores = tl.dot(above.to(least.dtype), tl.trans(greatest), scores, input_precision="ieee")
    if SOFTCAP:
        scores = softcap - 2.0 * softcap / (tl.exp2(scores * (2.0 * LOG2_E * scale / softcap)) + 1.0)
        scores = scores * LOG2_E
    else:
        scores = scores * (scale * LOG2_E)
    return tl.where((tl.arange(0, CHUNK) < count)[None, :], scores, float("-inf")), real


@triton.jit
def _chunk(
    bounds, blocks, chunks, task, tasks, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Load the fields of a task's chunk that all its rows need, and bounds of its blocks. Beyond the last task, nothing
    is loaded.
    """
    real = task < tasks
    chunk = chunks + tl.where(real, task // KV_HEADS * CHUNK_FIELDS, 0)
    first_row, num_rows, first = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2)
    count = tl.where(real, tl.load(chunk + 3), 0)
    head = task % KV_HEADS
    least, greatest = _bounds_of(bounds, blocks, first, count, head, KV_HEADS, HEAD_DIM, PADDED_DIM, CHUNK)
    return chunk, head, first_row, num_rows, count, least, greatest


@triton.jit
def sum_scores(
    q, bounds, blocks, chunks, counts, chunk_lse, scale, softcap, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write the log-sum-exp (base 2) of each query's block scores in each chunk of blocks.

    q `[rows, KV_HEADS * GROUP, HEAD_DIM]`; bounds `[blocks, KV_HEADS, 2, HEAD_DIM]`: least and greatest keys, which no
    launch of a step changes.
    """
    tasks = tl.load(counts + 3) * KV_HEADS
    task = tl.program_id(0)
    chunk, head, first_row, num_rows, count, least, greatest = _chunk(
        bounds, blocks, chunks, task, tasks, KV_HEADS, HEAD_DIM, PADDED_DIM, CHUNK
    )
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    while task < tasks:
        num_chunks = tl.load(chunk + 6)
        target = chunk_lse + tl.load(chunk + 4) + head * tl.load(chunk + 9) + tl.load(chunk + 5)
        for begin in range(0, num_rows * GROUP, BLOCK_ROWS):
            scores, real = _block_scores(
                q, least, greatest, first_row, num_rows, begin, count, head, scale, softcap, KV_HEADS, GROUP, HEAD_DIM,
                PADDED_DIM, BLOCK_ROWS, CHUNK, SOFTCAP,
            )  # fmt: skip
            top = tl.max(scores, 1)
            lse = top + tl.log2(tl.sum(tl.exp2(scores - top[:, None]), 1))
            tl.store(target + (begin + tl.arange(0, BLOCK_ROWS)) * num_chunks, lse, mask=real)
        task += tl.num_programs(0)
        chunk, head, first_row, num_rows, count, least, greatest = _chunk(
            bounds, blocks, chunks, task, tasks, KV_HEADS, HEAD_DIM, PADDED_DIM, CHUNK
        )


@triton.jit
def weigh_blocks(
    q, bounds, blocks, chunks, counts, chunk_lse, weights, scale, softcap, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, CHUNK: tl.constexpr,
    MOST_CHUNKS: tl.constexpr, SOFTCAP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write each block's share of attention, summed over the queries of one part of a unit's rows. Arguments are as in
    `sum_scores`.
    """
    tasks = tl.load(counts + 3) * KV_HEADS
    task = tl.program_id(0)
    chunk, head, first_row, num_rows, count, least, greatest = _chunk(
        bounds, blocks, chunks, task, tasks, KV_HEADS, HEAD_DIM, PADDED_DIM, CHUNK
    )
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    while task < tasks:
        num_chunks = tl.load(chunk + 6)
        source = chunk_lse + tl.load(chunk + 4) + head * tl.load(chunk + 9)
        turn = tl.arange(0, MOST_CHUNKS)
        weight = tl.zeros([CHUNK], tl.float32)
        for begin in range(0, num_rows * GROUP, BLOCK_ROWS):
            scores, real = _block_scores(
                q, least, greatest, first_row, num_rows, begin, count, head, scale, softcap, KV_HEADS, GROUP, HEAD_DIM,
                PADDED_DIM, BLOCK_ROWS, CHUNK, SOFTCAP,
            )  # fmt: skip
            place = (begin + tl.arange(0, BLOCK_ROWS))[:, None] * num_chunks + turn[None, :]
            lses = tl.load(source + place, mask=real[:, None] & (turn < num_chunks)[None, :], other=float("-inf"))
            top = tl.where(real, tl.max(lses, 1), 0.0)
            lse = top + tl.log2(tl.where(real, tl.sum(tl.exp2(lses - top[:, None]), 1), 1.0))
            weight += tl.sum(tl.where(real[:, None], tl.exp2(scores - lse[:, None]), 0.0), 0)
        place = tl.arange(0, CHUNK)
        target = weights + tl.load(chunk + 7) + head * tl.load(chunk + 8)
        tl.store(target + place, weight, mask=place < count)
        task += tl.num_programs(0)
        chunk, head, first_row, num_rows, count, least, greatest = _chunk(
            bounds, blocks, chunks, task, tasks, KV_HEADS, HEAD_DIM, PADDED_DIM, CHUNK
        )


@triton.jit
def _count(chosen):
    """Count `[heads, blocks]`; heads first, which needs no exchange between threads."""
    return tl.sum(tl.sum(chosen.to(tl.int32), 0), 0)


@triton.jit
def _least_level(level, most):
    """Return the least level that at most `most` of the levels `[heads, blocks]` reach."""
    low, high = 0, BEST
    for _ in range(8):
        middle = (low + high) // 2
        fits = _count(level >= middle) <= most
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, tl.minimum(middle + 1, high))
    return high


@triton.jit
def choose_blocks(
    weights, blocks, choices, counts, lists, KV_HEADS: tl.constexpr, HEADS: tl.constexpr, BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Write the blocks that each KV head reads: as `radixgen.kernels.torch_blocks.choose_blocks`, one program for each
    unit and head.

    A level that exactly enough blocks reach is found by bisection, so that there is no sort.
    """
    tasks = tl.load(counts + 4) * KV_HEADS
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        choice = choices + task // KV_HEADS * CHOICE_FIELDS
        mine = task % KV_HEADS
        first, count, total, room = tl.load(choice), tl.load(choice + 1), tl.load(choice + 2), tl.load(choice + 3)
        parts, source, target = tl.load(choice + 4), tl.load(choice + 5), tl.load(choice + 6)
        head = tl.arange(0, HEADS)
        place = tl.arange(0, BLOCKS)
        listed = (head < KV_HEADS)[:, None] & (place < count)[None, :]
        weight = tl.zeros([HEADS, BLOCKS], tl.float32)
        for part in range(parts):
            entry = source + (part * KV_HEADS + head)[:, None] * count + place[None, :]
            weight += tl.load(weights + entry, mask=listed, other=0.0)
        level = (weight.to(tl.int32, bitcast=True) >> LEVEL_SHIFT) - LOWEST
        level = tl.minimum(tl.maximum(level, 0), BEST - 1)
        order = tl.where(listed, level * BLOCKS + (BLOCKS - 1 - place)[None, :], -1)
        level = tl.where(order == tl.max(order, 1)[:, None], BEST, level)
        level = tl.where(listed, level, -1)

        bar = _least_level(level, total)
        left = total - _count(level >= bar)
        before = _count((level == bar - 1) & listed & (head < mine)[:, None])
        own = tl.sum(tl.where((head == mine)[:, None], level, 0), 0)
        reach = tl.sum((own >= bar).to(tl.int32), 0)
        tied = (own == bar - 1) & (place < count)
        more = tl.minimum(tl.maximum(left - before, 0), tl.sum(tied.to(tl.int32), 0))
        if reach + more > room:
            bar = _least_level(own[None, :], room)
            reach = tl.sum((own >= bar).to(tl.int32), 0)
            tied = (own == bar - 1) & (place < count)
            more = room - reach
        chosen = (own >= bar) | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= more))
        turn = tl.cumsum(chosen.to(tl.int32), 0) - 1
        block = tl.load(blocks + first + place, mask=place < count, other=0)
        tl.store(lists + target + KV_HEADS + mine * room + turn, block, mask=chosen)
        tl.store(lists + target + mine, reach + more)


@triton.jit
def attend_blocks(
    q, k, v, k_scales, v_scales, num_slots, k_blocks, v_blocks, partial_out, partial_lse, tiles, counts, lists, scale,
    softcap, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, PADDED_V_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    SLOTS: tl.constexpr, STAGES: tl.constexpr, BULK: tl.constexpr, SOFTCAP: tl.constexpr, QUANTIZED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Attend with each tile of rows to one share of the blocks that each KV head chose, `SLOTS` keys each. Results are
    always partial. Other arguments are as in `radixgen.kernels.triton_kernels.attend`.
    """
    tasks = tl.load(counts + 5) * KV_HEADS
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    PAIR: tl.constexpr = 2 if QUANTIZED else 1
    PER: tl.constexpr = SLOTS // BLOCK_KEYS
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        tile = tiles + task // KV_HEADS * TILE_FIELDS
        head = task % KV_HEADS
        first_row, num_rows, source = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
        room, share, shares = tl.load(tile + 3), tl.load(tile + 4), tl.load(tile + 5)
        size = tl.load(lists + source + head)
        begin, end = size * share // shares * PER, size * (share + 1) // shares * PER
        entries = lists + source + KV_HEADS + head * room

        packed = tl.arange(0, BLOCK_ROWS)
        row = packed // GROUP
        real = row < num_rows
        q_head = head * GROUP + packed % GROUP
        dim = tl.arange(0, PADDED_DIM)
        q_place = ((first_row + row).to(tl.int64) * (KV_HEADS * GROUP) + q_head) * HEAD_DIM
        inside = real[:, None] & (dim < HEAD_DIM)[None, :]
        queries = tl.load(q + q_place[:, None] + dim[None, :], mask=inside, other=0.0)
        queries_odd, values_odd = 0, 0
        factor = scale
        if QUANTIZED:
            queries, queries_odd, peak = normalize(queries, BLOCK_ROWS, PADDED_DIM)
            factor = scale * peak[:, None]
            values_odd = tl.zeros([BLOCK_ROWS, PADDED_V_DIM // 2], tl.float32)
        top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_ROWS], tl.float32)
        values = tl.zeros([BLOCK_ROWS, PADDED_V_DIM // PAIR], tl.float32)
        unit = _unit(factor, SOFTCAP)
        for turn in tl.range(begin, end, num_stages=STAGES):
            slot = tl.load(entries + turn // PER) * SLOTS + turn % PER * BLOCK_KEYS
            slots = slot + tl.arange(0, BLOCK_KEYS)
            if BULK:
                key = k_blocks.load([slot, head * (HEAD_DIM // PAIR)])
            else:
                key = _gather(k, slots, slots >= 0, HEAD_DIM // PAIR, PADDED_DIM // PAIR, KV_HEADS, head)
            key_scale = _scale_of(k_scales, slots, None, num_slots, head, QUANTIZED)
            scores = _scores(queries, queries_odd, key, key_scale, factor, softcap, SOFTCAP, QUANTIZED)
            if BULK:
                value = v_blocks.load([slot, head * (V_HEAD_DIM // PAIR)])
            else:
                value = _gather(v, slots, slots >= 0, V_HEAD_DIM // PAIR, PADDED_V_DIM // PAIR, KV_HEADS, head)
            value_scale = _scale_of(v_scales, slots, None, num_slots, head, QUANTIZED)
            top, total, values, values_odd = _accumulate(
                scores, unit, value, value_scale, top, total, values, values_odd, queries.dtype, QUANTIZED
            )
        if QUANTIZED:
            values = tl.reshape(tl.join(values, values_odd), [BLOCK_ROWS, PADDED_V_DIM])
        empty = total == 0.0
        values = values * (1.0 / tl.where(empty, 1.0, total))[:, None]
        row_lse = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * LN_2)
        place = (tl.load(tile + 6) + row) * (KV_HEADS * GROUP) + q_head
        _store(values, row_lse, partial_out, partial_lse, place, real, V_HEAD_DIM, PADDED_V_DIM)
