"""Triton kernel that copies KV between the pools of all layers and one record per token."""

import triton
import triton.language as tl


@triton.jit
def kv_records_kernel(table, slots, records, SIZE: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr):
    """Copy one part of one token, program `(token, part)`.

    `table` int64 `[parts, 5]` as `KVRecords` makes it; `slots` int64 `[tokens]`; `records` int32 `[tokens, SIZE]`.
    """
    token = tl.program_id(0).to(tl.int64)
    entry = table + 5 * tl.program_id(1)
    pool = tl.load(entry).to(tl.pointer_type(tl.int32))
    slot_stride = tl.load(entry + 1)
    word_stride = tl.load(entry + 2)
    words = tl.load(entry + 3)
    pool += tl.load(slots + token) * slot_stride
    record = records + token * SIZE + tl.load(entry + 4)
    for first in range(0, words, BLOCK):
        word = first + tl.arange(0, BLOCK)
        inside = word < words
        if PACK:
            tl.store(record + word, tl.load(pool + word * word_stride, mask=inside), mask=inside)
        else:
            tl.store(pool + word * word_stride, tl.load(record + word, mask=inside), mask=inside)
