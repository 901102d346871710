"""Tree attention for NVIDIA GPUs, in Triton: one launch over all levels of the tree per class of tiles, and one that
merges partial results.

A unit of the plan is a tile of depth-first rows, with all query heads of one KV head packed into its rows (GQA). Its
keys come in two forms, both in one running softmax (FlashAttention, arXiv 2205.14135):

- *runs*: whole blocks of keys that every row of the tile sees, copied in bulk by a tensor descriptor, without a mask;
- *gathered keys*: all others, each with its slot and the interval of the tile's rows that sees it (and, for a window,
  its position), so that a subtree's private keys, a span's diagonal and incomplete blocks share blocks across extents.

The plan is read from int32 tables (`radixgen.kernels.work`): a captured launch works for any plan that fits them.

`PDL` is for chips with programmatic dependent launch (sm_90): tables, which depend only on the plan, are read first,
and the results of earlier launches after `gdc_wait`.
"""

import triton
import triton.language as tl

from radixgen.kernels.quantized_kernels import LEAST_SCALE, log2, normalize, unpack

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

ITEM_FIELDS = tl.constexpr(9)
PIECE_FIELDS = tl.constexpr(8)


@triton.jit
def expand_keys(
    pieces, counts, laid_out_positions, key_slots, key_positions, key_rows, BLOCK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Write the gathered keys of every piece: slot, position, and `low | high << 8` of the tile's rows that see it.

    Of a piece's rows [low, high), at most ROWS in the tile, the first `early` are positioned before the key, so that
    [low + early, high) see it: rows of one node are ordered by position, and come before its children's. A piece with a
    stride lists keys of future steps, which their row will see.
    """
    row = tl.arange(0, ROWS)
    for index in range(tl.program_id(0), tl.load(counts), tl.num_programs(0)):
        piece = pieces + index * PIECE_FIELDS
        slot = tl.load(piece)
        position = tl.load(piece + 1)
        length = tl.load(piece + 2)
        first_row = tl.load(piece + 3)
        low = tl.load(piece + 4)
        high = tl.load(piece + 5)
        target = tl.load(piece + 6)
        stride = tl.load(piece + 7)
        own = tl.load(laid_out_positions + first_row + row, mask=(low <= row) & (row < high), other=2147483647)
        for first in range(0, length, BLOCK):
            place = first + tl.arange(0, BLOCK)
            inside = place < length
            early = tl.sum((own[None, :] < position + place[:, None]).to(tl.int32), 1)
            rows = tl.where(stride > 0, low, low + early) | high << 8
            entry = target + place * tl.maximum(stride, 1)
            tl.store(key_slots + entry, slot + place, mask=inside)
            tl.store(key_positions + entry, position + place, mask=inside)
            tl.store(key_rows + entry, rows, mask=inside)


@triton.jit
def _scores(q, q_odd, k, key_scale, scale, softcap, SOFTCAP: tl.constexpr, QUANTIZED: tl.constexpr):
    """Return float32 scores `[rows, keys]`, to be multiplied by `_unit` to get exponents of 2. If QUANTIZED, `q` and
    `q_odd` are the even and the odd numbers of queries.
    """
    if QUANTIZED:
        even, odd = unpack(k, q.dtype)
        scores = tl.dot(q, tl.trans(even), input_precision="ieee")
        scores = tl.dot(q_odd, tl.trans(odd), scores, input_precision="ieee")
        scores = scores * key_scale[None, :]
    else:
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1), also where the exponential overflows
        scores = softcap - 2.0 * softcap / (tl.exp2(scores * (2.0 * LOG2_E * scale / softcap)) + 1.0)
    return scores


@triton.jit
def _unit(scale, SOFTCAP: tl.constexpr):
    """Return the remaining factor of the scores, positive. It is applied after the maximum is known, at no cost."""
    if SOFTCAP:
        return LOG2_E + 0.0 * scale
    return scale * LOG2_E


@triton.jit
def _accumulate(scores, unit, v, value_scale, top, total, out, out_odd, DTYPE: tl.constexpr, QUANTIZED: tl.constexpr):
    """Add one block to the running softmax: `top` and `total` `[rows]`, `out` `[rows, v_head_dim]`, all float32.
    Values are multiplied in DTYPE.

    If QUANTIZED, `out` and `out_odd` are the even and the odd numbers of `out`, and the weights contain the scales of
    values. These are added to the exponents, so that weights are at most 1 whatever the scales.
    """
    if QUANTIZED:
        log_scale = log2(tl.maximum(value_scale, LEAST_SCALE))
        exponents = scores * unit + log_scale[None, :]
        new_top = tl.maximum(top, tl.max(exponents, 1))
    else:
        new_top = tl.maximum(top, tl.max(scores, 1) * unit)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    shrink = tl.exp2(top - base)
    out = out * shrink[:, None]
    if QUANTIZED:
        weights = tl.exp2(exponents - base[:, None])
        total = total * shrink + tl.sum(weights * tl.exp2(-log_scale)[None, :], 1)
        even, odd = unpack(v, DTYPE)
        out = tl.dot(weights.to(DTYPE), even, out, input_precision="ieee")
        out_odd = tl.dot(weights.to(DTYPE), odd, out_odd * shrink[:, None], input_precision="ieee")
    else:
        weights = tl.exp2(scores * unit - base[:, None])
        total = total * shrink + tl.sum(weights, 1)
        out = tl.dot(weights.to(DTYPE), v, out, input_precision="ieee")
    return new_top, total, out, out_odd


@triton.jit
def _gather(base, slot, listed, DIM: tl.constexpr, PADDED: tl.constexpr, KV_HEADS: tl.constexpr, head):
    """Gather `[keys, PADDED]` from a pool `[slots, KV_HEADS, DIM]`; 0 for keys that are not `listed` and beyond DIM."""
    dim = tl.arange(0, PADDED)
    place = (slot.to(tl.int64) * KV_HEADS + head) * DIM
    inside = listed[:, None] & (dim < DIM)[None, :]
    return tl.load(base + place[:, None] + dim[None, :], mask=inside, other=0.0)


@triton.jit
def _scale_of(scales, slot, listed, num_slots, head, QUANTIZED: tl.constexpr):
    """Load the scales `[keys]` of slots from `[KV_HEADS, num_slots]`; 0 for keys that are not `listed`, if given. The
    result is unused without QUANTIZED.
    """
    scale = slot
    if QUANTIZED:
        place = scales + head.to(tl.int64) * num_slots + slot
        if listed is None:
            scale = tl.load(place)
        else:
            scale = tl.load(place, mask=listed, other=0.0)
    return scale


@triton.jit
def _store(values, row_lse, out, lse, place, real, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Store values `[rows, PADDED]` and their LSE in `out[place]` and `lse[place]`, for `real` rows."""
    dim = tl.arange(0, PADDED)
    inside = real[:, None] & (dim < DIM)[None, :]
    target = out + place.to(tl.int64)[:, None] * DIM + dim[None, :]
    tl.store(target, values.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + place, row_lse, mask=real)


@triton.jit
def _attend_tile(
    first_row, num_rows, run_begin, run_end, key_begin, key_end, partial, head,
    q, k, v, k_scales, v_scales, num_slots, k_blocks, v_blocks, out, lse, partial_out, partial_lse, sinks,
    row_positions, runs, key_slots, key_positions, key_rows, scale, softcap, window,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, PADDED_V_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    GATHER_KEYS: tl.constexpr, STAGES: tl.constexpr, GATHER_STAGES: tl.constexpr, BULK: tl.constexpr,
    WINDOW: tl.constexpr, CHUNKED: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """Compute one work item: a tile's rows, of one KV head, against all keys of its unit."""
    packed = tl.arange(0, BLOCK_ROWS)
    row = packed // GROUP
    real = row < num_rows
    q_head = head * GROUP + packed % GROUP
    dim = tl.arange(0, PADDED_DIM)
    q_place = ((first_row + row).to(tl.int64) * (KV_HEADS * GROUP) + q_head) * HEAD_DIM
    queries = tl.load(q + q_place[:, None] + dim[None, :], mask=real[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    queries_odd, values_odd = 0, 0  # of quantized keys and values, which come in pairs
    PAIR: tl.constexpr = 2 if QUANTIZED else 1
    if QUANTIZED:
        queries, queries_odd, peak = normalize(queries, BLOCK_ROWS, PADDED_DIM)
        scale = scale * peak[:, None]
        values_odd = tl.zeros([BLOCK_ROWS, PADDED_V_DIM // 2], tl.float32)
    if WINDOW:
        own_position = tl.load(row_positions + first_row + row, mask=real, other=0).to(tl.int32)
        first_seen = own_position // window * window if CHUNKED else own_position - window + 1

    top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    values = tl.zeros([BLOCK_ROWS, PADDED_V_DIM // PAIR], tl.float32)
    unit = _unit(scale, SOFTCAP)

    if BULK:
        for run in range(run_begin, run_end):
            start = tl.load(runs + 2 * run)
            stop = start + tl.load(runs + 2 * run + 1)
            for slot in tl.range(start, stop, BLOCK_KEYS, num_stages=STAGES):
                slots = slot + tl.arange(0, BLOCK_KEYS)
                key = k_blocks.load([slot, head * (HEAD_DIM // PAIR)])
                key_scale = _scale_of(k_scales, slots, None, num_slots, head, QUANTIZED)
                scores = _scores(queries, queries_odd, key, key_scale, scale, softcap, SOFTCAP, QUANTIZED)
                value = v_blocks.load([slot, head * (V_HEAD_DIM // PAIR)])
                value_scale = _scale_of(v_scales, slots, None, num_slots, head, QUANTIZED)
                top, total, values, values_odd = _accumulate(
                    scores, unit, value, value_scale, top, total, values, values_odd, queries.dtype, QUANTIZED
                )

    for begin in tl.range(key_begin, key_end, GATHER_KEYS, num_stages=GATHER_STAGES):
        place = begin + tl.arange(0, GATHER_KEYS)
        listed = place < key_end
        slot = tl.load(key_slots + place, mask=listed, other=0)
        rows = tl.load(key_rows + place, mask=listed, other=0)
        seen = ((rows & 0xFF)[None, :] <= row[:, None]) & (row[:, None] < (rows >> 8)[None, :])
        if WINDOW:
            position = tl.load(key_positions + place, mask=listed, other=0)
            seen = seen & (position[None, :] >= first_seen[:, None])
        key = _gather(k, slot, listed, HEAD_DIM // PAIR, PADDED_DIM // PAIR, KV_HEADS, head)
        key_scale = _scale_of(k_scales, slot, listed, num_slots, head, QUANTIZED)
        scores = _scores(queries, queries_odd, key, key_scale, scale, softcap, SOFTCAP, QUANTIZED)
        scores = tl.where(seen, scores, float("-inf"))
        value = _gather(v, slot, listed, V_HEAD_DIM // PAIR, PADDED_V_DIM // PAIR, KV_HEADS, head)
        value_scale = _scale_of(v_scales, slot, listed, num_slots, head, QUANTIZED)
        top, total, values, values_odd = _accumulate(
            scores, unit, value, value_scale, top, total, values, values_odd, queries.dtype, QUANTIZED
        )

    if QUANTIZED:
        values = tl.reshape(tl.join(values, values_odd), [BLOCK_ROWS, PADDED_V_DIM])
    empty = total == 0.0
    values = values * (1.0 / tl.where(empty, 1.0, total))[:, None]
    row_lse = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * LN_2)
    if partial < 0:
        if SINKS:
            values = values * tl.sigmoid(row_lse - tl.load(sinks + q_head))[:, None]
        final = (first_row + row) * (KV_HEADS * GROUP) + q_head
        _store(values, row_lse, out, lse, final, real, V_HEAD_DIM, PADDED_V_DIM)
    else:
        part = (partial + row) * (KV_HEADS * GROUP) + q_head
        _store(values, row_lse, partial_out, partial_lse, part, real, V_HEAD_DIM, PADDED_V_DIM)


@triton.jit
def attend(
    q, k, v, k_scales, v_scales, num_slots, k_blocks, v_blocks, out, lse, partial_out, partial_lse, sinks,
    row_positions, laid_out_positions, bounds, tickets, items, runs, key_slots, key_positions, key_rows, scale, softcap,
    window, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, PADDED_V_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    GATHER_KEYS: tl.constexpr, STAGES: tl.constexpr, GATHER_STAGES: tl.constexpr, BULK: tl.constexpr,
    WINDOW: tl.constexpr, CHUNKED: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, QUANTIZED: tl.constexpr,
    KIND: tl.constexpr, THREADS: tl.constexpr, FIRST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute the work items (unit x KV head) of tile class KIND. Each program begins with one item, then takes the
    next free one, so that programs finish at about the same time whenever they begin.

    q `[rows, KV_HEADS * GROUP, HEAD_DIM]`; k `[slots, KV_HEADS, HEAD_DIM]`; v `[slots, KV_HEADS, V_HEAD_DIM]`, and both
    again as descriptors of blocks `[BLOCK_KEYS, dim]` over `[slots, KV_HEADS * dim]`. If QUANTIZED, k and v are half as
    many pairs of 8-bit numbers, as `unpack` takes them, with scales `[KV_HEADS, num_slots]`. For each step since the
    plan was laid out, an item has one more key per growing row.

    The launches of one layer write different rows, so all but the FIRST begin while it is still running, and wait for
    it only before they end.
    """
    programs = tl.num_programs(0)
    begin = tl.load(bounds + KIND) * KV_HEADS
    tasks = tl.load(bounds + KIND + 1) * KV_HEADS - begin
    shared = tasks > programs
    task = tl.program_id(0)
    first_row, num_rows, run_begin, run_end, key_begin, key_end, partial, grows = _item(
        items, begin + tl.minimum(task, tasks - 1), KV_HEADS
    )
    laid_out_at = tl.load(laid_out_positions)
    if PDL:
        if FIRST:
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    ticket = _take(tickets + KIND, shared, THREADS)
    age = tl.load(row_positions).to(tl.int32) - laid_out_at
    while task < tasks:
        # Load two tickets and one item ahead, so that no item waits for its own fields. If nothing is shared, any value
        # that ends the loop would do, but Triton 3.6 fails on a loop that does not read `task` (with one KV head).
        coming = tl.where(shared, programs + _look(ticket, THREADS), task + tasks)
        ticket = _take(tickets + KIND, shared, THREADS)
        (
            next_first_row, next_num_rows, next_run_begin, next_run_end, next_key_begin, next_key_end, next_partial,
            next_grows,
        ) = _item(items, begin + tl.minimum(coming, tasks - 1), KV_HEADS)  # fmt: skip
        _attend_tile(
            first_row, num_rows, run_begin, run_end, key_begin, key_end + age * grows, partial,
            (begin + task) % KV_HEADS, q, k, v, k_scales, v_scales, num_slots, k_blocks, v_blocks, out, lse,
            partial_out, partial_lse, sinks, row_positions, runs, key_slots, key_positions, key_rows, scale, softcap,
            window, KV_HEADS, GROUP, HEAD_DIM, V_HEAD_DIM, PADDED_DIM, PADDED_V_DIM, BLOCK_ROWS, BLOCK_KEYS,
            GATHER_KEYS, STAGES, GATHER_STAGES, BULK, WINDOW, CHUNKED, SOFTCAP, SINKS, QUANTIZED,
        )  # fmt: skip
        task, grows = coming, next_grows
        first_row, num_rows, run_begin, run_end = next_first_row, next_num_rows, next_run_begin, next_run_end
        key_begin, key_end, partial = next_key_begin, next_key_end, next_partial
    if shared and _look(ticket, THREADS) == tasks + programs - 1:
        # The last ticket of this launch: each program takes one per item, and one more without an item.
        tl.store(tickets + KIND, 0)
    if PDL and not FIRST:
        tl.extra.cuda.gdc_wait()


@triton.jit
def _take(tickets, wanted, THREADS: tl.constexpr):
    """Take the next ticket, held by the first thread. A scalar would be waited for here; a vector is waited for when it
    is used.
    """
    thread = tl.arange(0, THREADS)
    ones = tl.full([THREADS], 1, tl.int32)
    return tl.atomic_add(tickets + thread * 0, ones, mask=thread < wanted.to(tl.int32), sem="relaxed")


@triton.jit
def _look(ticket, THREADS: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, THREADS) == 0, ticket, 0))


@triton.jit
def _item(items, task, KV_HEADS: tl.constexpr):
    """Load the fields of a task's item."""
    item = items + task // KV_HEADS * ITEM_FIELDS
    return (
        tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3), tl.load(item + 4), tl.load(item + 5),
        tl.load(item + 6), tl.load(item + 7),
    )  # fmt: skip


@triton.jit
def merge(
    partial_out, partial_lse, out, lse, sinks, counts, rows, offsets, partials,
    Q_HEADS: tl.constexpr, V_HEAD_DIM: tl.constexpr, PADDED_V_DIM: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr, SINKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Merge the partial results of each row, in the order of its list, against their common maximum. Padding rows of a
    captured step become 0.

    One program per row and block of heads. (Hydragen, arXiv 2402.05099, section 3.2.)
    """
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    real = head < Q_HEADS
    for index in range(tl.program_id(0), tl.load(counts + 1), tl.num_programs(0)):
        begin = tl.load(offsets + index)
        end = tl.load(offsets + index + 1)
        final = tl.load(rows + index) * Q_HEADS + head
        place, inside = _places(partials, begin, end, head, Q_HEADS, BLOCK_PARTIALS)
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        given_lse, given_out = _partials(partial_out, partial_lse, place, inside, V_HEAD_DIM, PADDED_V_DIM)
        top = tl.max(given_lse, 1)
        for first in range(begin + BLOCK_PARTIALS, end, BLOCK_PARTIALS):
            place, inside = _places(partials, first, end, head, Q_HEADS, BLOCK_PARTIALS)
            top = tl.maximum(top, tl.max(tl.load(partial_lse + place, mask=inside, other=float("-inf")), 1))
        base = tl.where(top == float("-inf"), 0.0, top)
        weight = tl.exp(given_lse - base[:, None])
        total = tl.sum(weight, 1)
        values = tl.sum(weight[:, :, None] * given_out, 1)
        for first in range(begin + BLOCK_PARTIALS, end, BLOCK_PARTIALS):
            place, inside = _places(partials, first, end, head, Q_HEADS, BLOCK_PARTIALS)
            more_lse, more_out = _partials(partial_out, partial_lse, place, inside, V_HEAD_DIM, PADDED_V_DIM)
            weight = tl.exp(more_lse - base[:, None])
            total += tl.sum(weight, 1)
            values += tl.sum(weight[:, :, None] * more_out, 1)
        empty = total == 0.0
        values = values / tl.where(empty, 1.0, total)[:, None]
        row_lse = tl.where(empty, float("-inf"), base + tl.log(tl.where(empty, 1.0, total)))
        if SINKS:
            values = values * tl.sigmoid(row_lse - tl.load(sinks + head, mask=real, other=0.0))[:, None]
        _store(values, row_lse, out, lse, final, real, V_HEAD_DIM, PADDED_V_DIM)
    if PDL:
        # A launch without rows to merge must not end before the previous launch.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    if row >= tl.load(counts + 2):
        none = tl.zeros([BLOCK_HEADS, PADDED_V_DIM], tl.float32)
        nothing = tl.full([BLOCK_HEADS], float("-inf"), tl.float32)
        _store(none, nothing, out, lse, row * Q_HEADS + head, real, V_HEAD_DIM, PADDED_V_DIM)


@triton.jit
def _places(partials, first, end, head, Q_HEADS: tl.constexpr, BLOCK_PARTIALS: tl.constexpr):
    """Return the places of a list's partial results from `first` on, `[heads, BLOCK_PARTIALS]`, and which of them
    exist.
    """
    turn = first + tl.arange(0, BLOCK_PARTIALS)
    listed = turn < end
    place = tl.load(partials + turn, mask=listed, other=0).to(tl.int64)[None, :] * Q_HEADS + head[:, None]
    return place, listed[None, :] & (head < Q_HEADS)[:, None]


@triton.jit
def _partials(partial_out, partial_lse, place, inside, V_HEAD_DIM: tl.constexpr, PADDED_V_DIM: tl.constexpr):
    """Load LSE `[heads, partials]` and values `[heads, partials, PADDED_V_DIM]` at these places; -inf and 0 outside."""
    v_dim = tl.arange(0, PADDED_V_DIM)
    source = partial_out + place[:, :, None] * V_HEAD_DIM + v_dim[None, None, :]
    given = tl.load(source, mask=inside[:, :, None] & (v_dim < V_HEAD_DIM)[None, None, :], other=0.0)
    return tl.load(partial_lse + place, mask=inside, other=float("-inf")), given


@triton.jit
def write_kv(
    key, value, slots, k, v, k_scales, v_scales, num_slots, key_row, key_head, value_row, value_head,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, PADDED_HEADS: tl.constexpr,
    PADDED_DIM: tl.constexpr, PADDED_V_DIM: tl.constexpr, QUANTIZED: tl.constexpr, LARGEST: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Write row `i` of key `[rows, KV_HEADS, HEAD_DIM]` and of value to slot `slots[i]` of k and v; -1 is skipped. If
    QUANTIZED, write 8-bit numbers up to LARGEST, and scales `[KV_HEADS, num_slots]`.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        if tl.num_programs(0) <= 64:  # many programs would leave no room for those of the next launch
            tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        _write_slot(
            key + row * key_row, key_head, slot, k, k_scales, num_slots, KV_HEADS, HEAD_DIM, PADDED_HEADS, PADDED_DIM,
            QUANTIZED, LARGEST,
        )  # fmt: skip
        _write_slot(
            value + row * value_row, value_head, slot, v, v_scales, num_slots, KV_HEADS, V_HEAD_DIM, PADDED_HEADS,
            PADDED_V_DIM, QUANTIZED, LARGEST,
        )  # fmt: skip


@triton.jit
def _write_slot(
    source, head_stride, slot, pool, scales, num_slots, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    PADDED_HEADS: tl.constexpr, PADDED_DIM: tl.constexpr, QUANTIZED: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Write one token's `[KV_HEADS, DIM]` to a slot of a pool."""
    head = tl.arange(0, PADDED_HEADS)
    dim = tl.arange(0, PADDED_DIM)
    inside = (head < KV_HEADS)[:, None] & (dim < DIM)[None, :]
    numbers = tl.load(source + head[:, None] * head_stride + dim[None, :], mask=inside, other=0.0)
    if QUANTIZED:
        numbers = numbers.to(tl.float32)
        scale = tl.max(tl.abs(numbers), 1) * (1.0 / LARGEST)
        tl.store(scales + head.to(tl.int64) * num_slots + slot, scale, mask=head < KV_HEADS)
        numbers = tl.div_rn(numbers, tl.where(scale == 0.0, 1.0, scale)[:, None])
        if pool.dtype.element_ty == tl.int8:
            numbers = (numbers + 12582912.0) - 12582912.0  # 1.5 * 2^23: rounds to an integer, half to even
    place = slot * (KV_HEADS * DIM) + head[:, None] * DIM + dim[None, :]
    tl.store(pool + place, numbers.to(pool.dtype.element_ty), mask=inside)
