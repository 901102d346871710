"""Kernel of `radixgen.kernels.all_reduce`. Its arithmetic is plain Triton, so that the interpreter runs it."""

import triton
import triton.language as tl


@triton.jit
def all_reduce_kernel(
    data,
    parts,
    count,
    rooms,
    flags,
    rounds,
    stop,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROOM: tl.constexpr,
    PARTS: tl.constexpr,
    LOOKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sum over all ranks into `data [count]` of each; every program handles a block at a time. A rank's summand is the
    rounded sum of `parts [PARTS, count]`, which may be `data` itself.

    A program synchronizes only with the programs of the same number on other ranks. In each round it copies its block
    into a room of its own, raises its flag at every peer, waits for theirs, and adds up the blocks in the order of
    ranks. Two rooms suffice: a peer that raises its flag for the next round has read the room of this one.

    `rooms`, `flags`: addresses by rank, of `[programs, 2, ROOM]` elements as in `data` and of `[programs, SIZE]` int64.
    `rounds`: int64 `[programs]`, the number of rounds so far. `stop`: int32, nonzero once peers must not be waited for.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    element: tl.constexpr = data.dtype.element_ty
    wide: tl.constexpr = tl.float32 if element.is_floating() else element
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    own_room = tl.multiple_of(tl.load(rooms + RANK).to(data.dtype), 16)
    own_flags = tl.load(flags + RANK).to(rounds.dtype) + program * SIZE
    number = tl.load(rounds + program)
    start = program.to(tl.int64) * BLOCK
    while start < count:
        number += 1
        place = (program * 2 + (number % 2).to(tl.int32)) * ROOM + lane
        mask = start + lane < count
        block = tl.load(parts + start + lane, mask=mask)
        for part in tl.static_range(1, PARTS):
            block += tl.load(parts + part * count + start + lane, mask=mask)
        block = block.to(element)
        tl.store(own_room + place, block, mask=mask)
        tl.debug_barrier()
        for peer in tl.static_range(SIZE):
            if peer != RANK:
                its_flags = tl.load(flags + peer).to(rounds.dtype) + program * SIZE
                tl.atomic_xchg(its_flags + RANK, number, sem="release", scope="sys")
        met = start < count
        for peer in tl.static_range(SIZE):
            if peer != RANK:
                met = met & (_await(own_flags + peer, number, stop, LOOKS) >= number)
        tl.debug_barrier()
        total = tl.zeros([BLOCK], wide)
        for peer in tl.static_range(SIZE):
            if peer == RANK:
                total += block.to(wide)
            else:
                room = tl.multiple_of(tl.load(rooms + peer).to(data.dtype), 16)
                total += tl.load(room + place, mask=mask, cache_modifier=".cg").to(wide)
        tl.store(data + start + lane, total.to(element), mask=mask)
        start = tl.where(met, start + tl.num_programs(0).to(tl.int64) * BLOCK, count)
    tl.store(rounds + program, number)


@triton.jit
def _await(flag, number, stop, LOOKS: tl.constexpr):
    """Wait until a flag is at least `number` or `stop` is set, and return the flag. Earlier writes of the peer are then
    visible.

    `stop` is in host memory. If all programs read it, that takes most of a millisecond, during which the peers wait and
    begin to read theirs. So it is read only once per `LOOKS` polls of the flag, which take far longer.
    """
    seen, looks, stopped = tl.load(flag, volatile=True), 0, 0
    while (seen < number) & (stopped == 0):
        seen = tl.load(flag, volatile=True)
        looks = (looks + 1) % LOOKS
        if looks == 0:
            stopped = tl.load(stop, volatile=True)
    return tl.atomic_add(flag, 0, sem="acquire", scope="sys")
