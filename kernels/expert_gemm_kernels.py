"""Products of rows with the weights of selected experts, in Triton, for few rows per expert: bound by reading the
weights.

A program computes one expert and one block of outputs. It finds the expert's pairs in the list of selections itself,
which is short, so that no launch has to sort them. The kernel computes `y.T`: the few rows become the narrow (N)
operand of the MMA and the weights the wide (M) one, read directly from shared memory.
"""

import triton
import triton.language as tl


@triton.jit
def _pairs_of(experts, pairs, expert, owner, begin, BLOCK_M: tl.constexpr, SCAN: tl.constexpr):
    """Return the pairs `begin` to `begin + BLOCK_M` of `expert`, 0 beyond the last one; their total number; and how
    many of them precede `owner`.
    """
    wanted = begin + tl.arange(0, BLOCK_M)
    selected = tl.zeros([BLOCK_M], tl.int32)
    count = 0
    earlier = 0
    for first in range(0, pairs, SCAN):
        pair = first + tl.arange(0, SCAN)
        mine = (tl.load(experts + pair, mask=pair < pairs, other=-1) == expert).to(tl.int32)
        rank = tl.where(mine > 0, count + tl.cumsum(mine, 0) - 1, -1)
        selected += tl.sum(tl.where(rank[None, :] == wanted[:, None], pair[None, :], 0), 1)
        count += tl.sum(mine)
        earlier += tl.sum(tl.where(pair < owner, mine, 0))
    return selected, count, earlier


@triton.jit(do_not_specialize=["pairs"])
def expert_linear_kernel(
    x, w_blocks, experts, y, pairs,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, SHARE: tl.constexpr, TRANSPOSED: tl.constexpr,
    EACH_EXPERT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """`y [pairs, OUTPUTS]`: row `i // SHARE` of `x [*, INPUTS]` times the weights of `experts[i]`, for each pair i.

    `w_blocks`: descriptor of blocks `[BLOCK_N, BLOCK_K]` over `[experts * OUTPUTS, INPUTS]`, or if TRANSPOSED of blocks
    `[BLOCK_K, BLOCK_N]` over `[experts * INPUTS, OUTPUTS]`. The grid is blocks of outputs by experts; with fewer pairs
    than experts, by pairs, of which the first of each expert does the work.
    """
    n = tl.program_id(0) * BLOCK_N
    owner = tl.program_id(1)
    expert = owner if EACH_EXPERT else tl.load(experts + owner).to(tl.int32)
    pair, count, earlier = _pairs_of(experts, pairs, expert, owner, 0, BLOCK_M, SCAN)
    if not EACH_EXPERT:
        count = tl.where(earlier > 0, 0, count)
    output = n + tl.arange(0, BLOCK_N)
    for begin in range(0, count, BLOCK_M):
        given = x + (pair // SHARE).to(tl.int64)[None, :] * INPUTS + tl.arange(0, BLOCK_K)[:, None]
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for k in tl.range(0, INPUTS, BLOCK_K, num_stages=STAGES):
            if TRANSPOSED:
                weights = tl.trans(w_blocks.load([expert * INPUTS + k, n]))
            else:
                weights = w_blocks.load([expert * OUTPUTS + n, k])
            total = tl.dot(weights, tl.load(given + k), total)
        real = begin + tl.arange(0, BLOCK_M) < count
        place = pair.to(tl.int64)[None, :] * OUTPUTS + output[:, None]
        tl.store(y + place, total.to(y.dtype.element_ty), mask=real[None, :] & (output < OUTPUTS)[:, None])
        if begin + BLOCK_M < count:
            pair, _, _ = _pairs_of(experts, pairs, expert, owner, begin + BLOCK_M, BLOCK_M, SCAN)
