"""Copies of 8-bit keys and values to the ring of `radixgen.kernels.hopper_attention_kernels`, converted on the way.

Two warp groups copy, half of each block each: they load numbers into registers, wait for an empty place and write what
they have converted. `pools`, `shared` and places are those of that module.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier


@gluon.jit
def _convert(fours, scale, KEYS: gl.constexpr, DIM: gl.constexpr, DTYPE: gl.constexpr):
    """Return 8-bit numbers times their keys' scales, `[KEYS, DIM]` in DTYPE. They are given in fours `[KEYS, DIM / 4]`:
    int8 as int32, fp8 (e4m3) as uint32.
    """
    scale = scale[:, None]
    if fours.dtype == gl.int32:  # the bytes 0x47, 0, b + 128 and 0 make b + 32896 in float32
        a, b, c, d = gl.inline_asm_elementwise(
            """{
            .reg .b32 bytes, high;
            xor.b32 bytes, $4, 0x80808080;
            mov.b32 high, 0x47000000;
            prmt.b32 $0, bytes, high, 0x7604;
            prmt.b32 $1, bytes, high, 0x7614;
            prmt.b32 $2, bytes, high, 0x7624;
            prmt.b32 $3, bytes, high, 0x7634;
            }""",
            "=&r,=&r,=&r,=r,r", [fours], dtype=(gl.float32, gl.float32, gl.float32, gl.float32), is_pure=True, pack=1,
        )  # fmt: skip
        bias = -32896.0 * scale
        a, b, c, d = gl.fma(a, scale, bias), gl.fma(b, scale, bias), gl.fma(c, scale, bias), gl.fma(d, scale, bias)
    else:
        a, b, c, d = gl.inline_asm_elementwise(
            """{
            .reg .b16 low, high, a, b, c, d;
            .reg .b32 first, second;
            mov.b32 {low, high}, $4;
            cvt.rn.f16x2.e4m3x2 first, low;
            cvt.rn.f16x2.e4m3x2 second, high;
            mov.b32 {a, b}, first;
            mov.b32 {c, d}, second;
            cvt.f32.f16 $0, a;
            cvt.f32.f16 $1, b;
            cvt.f32.f16 $2, c;
            cvt.f32.f16 $3, d;
            }""",
            "=&r,=&r,=&r,=r,r", [fours], dtype=(gl.float32, gl.float32, gl.float32, gl.float32), is_pure=True, pack=1,
        )  # fmt: skip
        a, b, c, d = a * scale, b * scale, c * scale, d * scale
    numbers = gl.join(gl.join(a.to(DTYPE), c.to(DTYPE)), gl.join(b.to(DTYPE), d.to(DTYPE)))
    return gl.reshape(numbers, [KEYS, DIM])


@gluon.jit
def _load_numbers(pool, scales, slots, listed, num_slots, head, KV_HEADS: gl.constexpr, DIM: gl.constexpr):
    """Load 8-bit numbers of slots in fours `[keys, DIM / 4]`, and their scales `[keys]`; 0 for keys that are not
    `listed`.
    """
    four = gl.arange(0, DIM // 4, gl.SliceLayout(0, slots.type.layout.parent))
    place = ((slots.to(gl.int64) * KV_HEADS + head) * (DIM // 4))[:, None] + four[None, :]
    fours = gl.load(pool + place, mask=listed[:, None] & (four >= 0)[None, :], other=0)
    return fours, gl.load(scales + head.to(gl.int64) * num_slots + slots, mask=listed, other=0.0)


@gluon.jit
def _half(FIRST: gl.constexpr):
    """Return 64 places of a block from FIRST on, in the layout in which 8-bit numbers are loaded."""
    # Eight threads write 16 bytes each of two rows of shared memory at a time, which is free of bank conflicts.
    LOADED: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [gl.num_warps(), 1], [1, 0])
    return FIRST + gl.arange(0, 64, gl.SliceLayout(1, LOADED))


@gluon.jit
def _load_half(pool, scales, first, num_slots, head, KV_HEADS: gl.constexpr, DIM: gl.constexpr, HALF: gl.constexpr):
    """Load the 8-bit numbers and scales of the first or second HALF of the block that begins at slot `first`."""
    place = _half(64 * HALF)
    return _load_numbers(pool, scales, first + place, place >= 0, num_slots, head, KV_HEADS, DIM)


@gluon.jit
def _signal(barrier):
    """Signal that this warp group has written its part of a place."""
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(barrier, count=1)


@gluon.jit
def convert_first(
    pools, slot, head, shared, count,
    KV_HEADS: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """Fill the next place of the ring with this HALF of the block of 8-bit keys at `slot`, converted."""
    k, _, k_scales, _, num_slots, _, _ = pools
    _, _, k_ring, _, _, ready, _, empty, _, _ = shared
    at = count % STAGES
    keys, scale = _load_half(k, k_scales, slot, num_slots, head, KV_HEADS, DIM, HALF)
    mbarrier.wait(empty.index(at), (count // STAGES & 1) ^ 1)
    k_ring.index(at).slice(64 * HALF, 64).store(_convert(keys, scale, 64, DIM, k_ring.dtype))
    _signal(ready.index(at))


@gluon.jit
def convert_runs(
    pools, runs, run_begin, run_end, before, head, shared, count, blocks,
    KV_HEADS: gl.constexpr, DIM: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """Fill the places of an item's blocks but the first, which begins at slot `before`, with this HALF of each block.
    Keys are loaded while the values before them are converted, and values while keys are.
    """
    k, v, k_scales, v_scales, num_slots, _, _ = pools
    _, _, k_ring, v_ring, _, ready, _, empty, _, _ = shared
    stop = before + gl.load(runs + 2 * run_begin + 1)
    run, slot, stop = _next_block(runs, run_begin, run_end, before, stop, BLOCK)
    keys, key_scale = _load_half(k, k_scales, slot, num_slots, head, KV_HEADS, DIM, HALF)
    for _ in range(1, blocks):
        at = count % STAGES
        values, value_scale = _load_half(v, v_scales, before, num_slots, head, KV_HEADS, DIM, HALF)
        mbarrier.wait(empty.index(at), (count // STAGES & 1) ^ 1)
        k_ring.index(at).slice(64 * HALF, 64).store(_convert(keys, key_scale, 64, DIM, k_ring.dtype))
        before = slot
        run, slot, stop = _next_block(runs, run, run_end, slot, stop, BLOCK)
        keys, key_scale = _load_half(k, k_scales, slot, num_slots, head, KV_HEADS, DIM, HALF)
        v_ring.index(at).slice(64 * HALF, 64).store(_convert(values, value_scale, 64, DIM, v_ring.dtype))
        _signal(ready.index(at))
        count += 1
    at = count % STAGES
    values, value_scale = _load_half(v, v_scales, before, num_slots, head, KV_HEADS, DIM, HALF)
    mbarrier.wait(empty.index(at), (count // STAGES & 1) ^ 1)
    v_ring.index(at).slice(64 * HALF, 64).store(_convert(values, value_scale, 64, DIM, v_ring.dtype))
    _signal(ready.index(at))
    return count + 1


@gluon.jit
def _next_block(runs, run, run_end, slot, stop, BLOCK: gl.constexpr):
    """Return the run, first slot and run's end of the block after the one at `slot`; of any block after the last."""
    slot += BLOCK
    if slot >= stop:
        run = gl.minimum(run + 1, run_end - 1)
        slot = gl.load(runs + 2 * run)
        stop = slot + gl.load(runs + 2 * run + 1)
    return run, slot, stop


@gluon.jit
def convert_gathered(
    pools, key_slots, key_rows, begin, end, head, shared, count, gathers,
    KV_HEADS: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """Fill the next place of the ring with this HALF of gathered 8-bit keys [begin, end), and their values."""
    k, v, k_scales, v_scales, num_slots, _, _ = pools
    _, _, k_ring, v_ring, rows_ring, _, gathered, empty, _, _ = shared
    at = count % STAGES
    FIRST: gl.constexpr = 64 * HALF
    place = begin + _half(FIRST)
    listed = place < end
    slots = gl.load(key_slots + place, mask=listed, other=0)
    rows = gl.load(key_rows + place, mask=listed, other=0)
    keys, key_scale = _load_numbers(k, k_scales, slots, listed, num_slots, head, KV_HEADS, DIM)
    values, value_scale = _load_numbers(v, v_scales, slots, listed, num_slots, head, KV_HEADS, DIM)
    mbarrier.wait(empty.index(at), (count // STAGES & 1) ^ 1)
    rows_ring.index(at).slice(FIRST, 64).store(rows)
    k_ring.index(at).slice(FIRST, 64).store(_convert(keys, key_scale, 64, DIM, k_ring.dtype))
    v_ring.index(at).slice(FIRST, 64).store(_convert(values, value_scale, 64, DIM, v_ring.dtype))
    _signal(gathered.index(gathers % STAGES))
