"""Matrix products of few rows on Hopper, in Gluon: `y [M, N] = x [M, K] @ w [N, K].T`, bound by reading the weights.

One launch divides the work evenly. Whole tiles are written directly; if tiles are split along K, float32 parts
`[SPLIT, M, N]` are written, and the consumer adds them up in the order of K. Without atomics, runs agree bit for bit.
Weights do not depend on the previous kernel: with programmatic dependent launch they are loaded while it still drains.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@gluon.jit
def _place(segment, j, length, turn, tiles_m, SPLIT: gl.constexpr):
    """Return (tile_n, tile_m, block of K) of unit j of a segment. Programs start at different blocks."""
    tile = segment // SPLIT
    tile_n = tile // tiles_m
    j += tile_n * turn % length
    j = gl.where(j >= length, j - length, j)
    return tile_n, tile % tiles_m, segment % SPLIT * length + j


@gluon.jit
def _write(y, acc, y_stride, tile_n, tile_m, M, BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr, LAYOUT: gl.constexpr):
    """Write a tile `acc [BLOCK_N, BLOCK_M]` of y.T into y, clipped to M rows and the columns of y."""
    n = (tile_n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, LAYOUT)))[:, None]
    m = (tile_m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, LAYOUT)))[None, :]
    gl.store(y + m * y_stride + n, acc.to(y.dtype.element_ty), mask=(m < M) & (n < y_stride))


@gluon.jit(do_not_specialize=["M", "tiles_m", "turn"])
def linear_kernel(
    w_blocks, x_blocks, y, M, tiles_m, length, segments, turn, y_stride,
    BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, LAG: gl.constexpr,
    SPLIT: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Compute parts `[SPLIT, M, N]` of y, whose rows are `y_stride` apart.

    `w_blocks`: descriptor of blocks `[1, BLOCK_N, BLOCK_K]` over `[1, N, K]`; `x_blocks`: of `[BLOCK_M, BLOCK_K]` over
    `[M, K]`, `tiles_m` blocks of rows. A segment is `length` blocks of K of one tile; a tile has SPLIT segments. Tile
    `n` begins `n * turn` blocks into its segments, so that programs read different columns of x. The kernel computes
    y.T, so that few rows are the narrow side of the instruction. LAG: matrix products left in flight while the ring
    slot of an earlier one is refilled. DEPTH: inputs that one instruction multiplies.
    """
    DEPTH: gl.constexpr = 256 // w_blocks.dtype.primitive_bitwidth
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_M, DEPTH])
    w_slots = gl.allocate_shared_memory(w_blocks.dtype, [STAGES] + w_blocks.block_type.shape, w_blocks.layout)
    x_slots = gl.allocate_shared_memory(x_blocks.dtype, [STAGES, BLOCK_M, BLOCK_K], x_blocks.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    bytes_: gl.constexpr = w_blocks.block_type.nbytes + x_blocks.block_type.nbytes
    W_ROWS: gl.constexpr = w_blocks.block_type.shape[1]

    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    first = pid * segments // programs
    last = (pid + 1) * segments // programs
    units = (last - first) * length

    # Fill the ring with weights, which do not depend on earlier kernels.
    segment = first
    j = 0
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)
        mbarrier.expect(bars.index(i), bytes_, pred=i < units)
        tile_n, tile_m, k = _place(segment, j, length, turn, tiles_m, SPLIT)
        tma.async_copy_global_to_shared(
            w_blocks, [0, tile_n * W_ROWS, k * BLOCK_K], bars.index(i), w_slots.index(i), i < units
        )
        j += 1
        segment += gl.where(j == length, 1, 0)
        j = gl.where(j == length, 0, j)
    gdc_wait()
    gdc_launch_dependents()
    segment = first
    j = 0
    for i in gl.static_range(STAGES):
        tile_n, tile_m, k = _place(segment, j, length, turn, tiles_m, SPLIT)
        tma.async_copy_global_to_shared(
            x_blocks, [tile_m * BLOCK_M, k * BLOCK_K], bars.index(i), x_slots.index(i), i < units
        )
        j += 1
        segment += gl.where(j == length, 1, 0)
        j = gl.where(j == length, 0, j)

    # The current unit is in `slot`; (segment, j) is the next unit to load.
    slot = 0
    phase = 0
    unit = 0
    acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, LAYOUT)
    for now in range(first, last):
        for step in range(length):
            mbarrier.wait(bars.index(slot), phase)
            w_now = w_slots.index(slot).reshape([BLOCK_N, BLOCK_K])
            x_now = x_slots.index(slot)
            acc = warpgroup_mma(w_now, x_now.permute([1, 0]), acc, use_acc=step > 0, is_async=True)
            acc = warpgroup_mma_wait(LAG, deps=[acc])
            gl.thread_barrier()
            if LAG == 0:
                free = slot
            else:
                free = gl.where(slot == 0, STAGES - 1, slot - 1)
            fits = (unit >= LAG) & (unit + STAGES - LAG < units)
            bar = bars.index(free)
            tile_n, tile_m, k = _place(segment, j, length, turn, tiles_m, SPLIT)
            mbarrier.expect(bar, bytes_, pred=fits)
            tma.async_copy_global_to_shared(w_blocks, [0, tile_n * W_ROWS, k * BLOCK_K], bar, w_slots.index(free), fits)
            tma.async_copy_global_to_shared(x_blocks, [tile_m * BLOCK_M, k * BLOCK_K], bar, x_slots.index(free), fits)
            j += fits.to(gl.int32)
            segment += gl.where(j == length, 1, 0)
            j = gl.where(j == length, 0, j)
            unit += 1
            slot += 1
            phase = gl.where(slot == STAGES, phase ^ 1, phase)
            slot = gl.where(slot == STAGES, 0, slot)
        acc = warpgroup_mma_wait(0, deps=[acc])

        tile_n = now // SPLIT // tiles_m
        tile_m = now // SPLIT % tiles_m
        parts = y + now % SPLIT * M * y_stride
        _write(parts, acc, y_stride, tile_n, tile_m, M, BLOCK_N, BLOCK_M, LAYOUT)
