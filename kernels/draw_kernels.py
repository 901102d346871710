"""Drawing tokens on a GPU: the logits of a draw are read once, in blocks of the vocabulary, and once more where filters
hide tokens.

Each block keeps its largest logit and the sum of its weights against that; a draw then finds its block by these, and
its token inside of it. Filters are a least logit, the *floor*, which is searched for without sorting: each pass over a
row weighs what lies above 15 thresholds between two bounds, and the next bounds are two of these.

Every sum has a fixed order that depends on the width of the vocabulary alone, so that a draw depends on nothing but its
own row, and two runs agree.
"""

import triton
import triton.language as tl

ROW = tl.constexpr(0)
UNIT = tl.constexpr(1)
TOP_K = tl.constexpr(2)
TOP_P = tl.constexpr(3)
MIN_P = tl.constexpr(4)
UNIFORM = tl.constexpr(5)


@triton.jit
def _setting(settings, field, draws, draw):
    return tl.load(settings + field * draws + draw)


@triton.jit
def _row(logits, row_stride, settings, draws, draw):
    return logits + _setting(settings, ROW, draws, draw).to(tl.int64) * row_stride


@triton.jit
def _weights(scores, top, unit):
    """Of float32 logits against the largest of them; where that is -inf, all are 0."""
    return tl.exp2((scores - tl.where(top == float("-inf"), 0.0, top)) * unit)


@triton.jit(do_not_specialize=("draws",))
def weigh_blocks(
    logits, row_stride, settings, floors, tops, masses, best, width, draws, blocks,
    BLOCK: tl.constexpr, FILTERED: tl.constexpr,
):  # fmt: skip
    """The largest logit of each block of each draw, NaN where the block holds NaN or +inf; the first token that has it;
    and the weights of the block's tokens together, of those from the draw's floor on where it is FILTERED.

    Of `[draws, blocks]` tops, masses float32 and best int32.
    """
    block, draw = tl.program_id(0), tl.program_id(1)
    place = draw * blocks + block
    unit = _setting(settings, UNIT, draws, draw).to(tl.float32)
    token = block * BLOCK + tl.arange(0, BLOCK)
    scores = tl.load(_row(logits, row_stride, settings, draws, draw) + token, mask=token < width, other=float("-inf"))
    if FILTERED:
        top = tl.load(tops + place)
        scores = tl.where(scores >= tl.load(floors + draw), scores, float("-inf"))
    else:
        top = tl.max(scores, 0)
        tl.store(best + place, tl.min(tl.where(scores == top, token, 2147483647), 0))
        broken = tl.max(((scores != scores) | (scores == float("inf"))).to(tl.int32), 0)
        tl.store(tops + place, tl.where(broken > 0, float("nan"), top))
    tl.store(masses + place, tl.sum(_weights(scores, top, unit), 0))


@triton.jit(do_not_specialize=("draws",))
def find_floors(
    logits, row_stride, settings, floors, tops, width, draws, blocks,
    BLOCKS: tl.constexpr, CHUNK: tl.constexpr, WAYS: tl.constexpr, MOST_PASSES: tl.constexpr,
):  # fmt: skip
    """The least logit that top-k, then top-p of what it left, and min-p keep of each draw, `[draws]` float32."""
    draw = tl.program_id(0)
    row = _row(logits, row_stride, settings, draws, draw)
    unit = _setting(settings, UNIT, draws, draw).to(tl.float32)
    top_k = _setting(settings, TOP_K, draws, draw)
    top_p = _setting(settings, TOP_P, draws, draw)
    min_p = _setting(settings, MIN_P, draws, draw).to(tl.float32)
    block = tl.arange(0, BLOCKS)
    top = tl.max(tl.load(tops + draw * blocks + block, mask=block < blocks, other=float("-inf")), 0)
    floor = tl.full([], float("-inf"), tl.float32)
    sound = (top == top) & (top > float("-inf")) & (unit > 0.0)
    if sound & (top_k > 0) & (top_k < width):
        floor = _largest_floor(row, width, top, unit, floor, top_k.to(tl.float32), False, CHUNK, WAYS, MOST_PASSES)
    if sound & (top_p < 1.0):
        share = top_p.to(tl.float32)
        floor = _largest_floor(row, width, top, unit, floor, share, True, CHUNK, WAYS, MOST_PASSES)
    if sound:
        floor = tl.maximum(floor, top + min_p / unit)
    tl.store(floors + draw, floor)


@triton.jit
def _largest_floor(
    row, width, top, unit, floor, wanted, WEIGHED: tl.constexpr, CHUNK: tl.constexpr, WAYS: tl.constexpr,
    MOST_PASSES: tl.constexpr,
):  # fmt: skip
    """The largest logit, of those from `floor` on, such that what lies from it on is enough: `wanted` tokens, or where
    it is WEIGHED the share `wanted` of the weight from `floor` on.
    """
    place = tl.arange(0, CHUNK)
    way = tl.arange(0, WAYS)
    lowest = top
    if WEIGHED:
        total = 0.0
    else:
        total = 1.0
    for first in range(0, width, CHUNK):
        scores = tl.load(row + first + place, mask=first + place < width, other=float("-inf"))
        kept = (scores >= floor) & (scores > float("-inf"))
        lowest = tl.minimum(lowest, tl.min(tl.where(kept, scores, top), 0))
        if WEIGHED:
            total += tl.sum(tl.where(kept, _weights(scores, top, unit), 0.0), 0)
    target = wanted * total
    low, high = lowest, top + tl.abs(top) * 2.4e-7 + 1e-30
    passes = 0
    while (low < high) & (passes < MOST_PASSES):
        thresholds = low + (high - low) * (way.to(tl.float32) / WAYS)
        above = tl.zeros([CHUNK, WAYS], tl.float32)
        least = tl.full([CHUNK], float("inf"), tl.float32)
        most = tl.full([CHUNK], float("-inf"), tl.float32)
        for first in range(0, width, CHUNK):
            scores = tl.load(row + first + place, mask=first + place < width, other=float("-inf"))
            if WEIGHED:
                weights = _weights(scores, top, unit)
            else:
                weights = tl.full([CHUNK], 1.0, tl.float32)
            above += tl.where(scores[:, None] >= thresholds[None, :], weights[:, None], 0.0)
            within = (scores >= low) & (scores < high)
            least = tl.minimum(least, tl.where(within, scores, float("inf")))
            most = tl.maximum(most, tl.where(within, scores, float("-inf")))
        smallest, largest = tl.min(least, 0), tl.max(most, 0)
        enough = (tl.sum(above, 0) >= target) | (way == 0)
        chosen = tl.max(tl.where(enough, way, 0), 0)
        # The bounds: `low` is a logit or a threshold that is not too high, everything from `high` on is.
        next_high = tl.min(tl.where(way > chosen, thresholds, high), 0)
        next_low = tl.maximum(tl.max(tl.where(way <= chosen, thresholds, low), 0), smallest)
        alone = smallest >= largest
        low = tl.where(alone, smallest, next_low)
        high = tl.where(alone, smallest, next_high)
        passes += 1
    return low


@triton.jit(do_not_specialize=("draws",))
def choose(
    logits, row_stride, settings, floors, tops, masses, best, tokens, width, draws, blocks,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr, FILTERED: tl.constexpr,
):  # fmt: skip
    """The token of each draw, int64 `[draws]`: its block by the weights of blocks, then its place in there."""
    draw = tl.program_id(0)
    unit = _setting(settings, UNIT, draws, draw).to(tl.float32)
    block = tl.arange(0, BLOCKS)
    inside = block < blocks
    own_tops = tl.load(tops + draw * blocks + block, mask=inside, other=float("-inf"))
    broken = tl.max((own_tops != own_tops).to(tl.int32), 0) > 0
    top = tl.max(own_tops, 0)
    first = tl.load(best + draw * blocks + block, mask=inside, other=0)
    found = tl.min(tl.where(own_tops == top, first, 2147483647), 0)
    if (unit > 0.0) & (broken == 0) & (top > float("-inf")):
        mass = tl.load(masses + draw * blocks + block, mask=inside, other=0.0)
        mass = (mass * _weights(own_tops, top, unit)).to(tl.float64)
        ends = tl.cumsum(mass, 0)
        target = _setting(settings, UNIFORM, draws, draw) * tl.max(ends, 0)
        last = tl.max(tl.where(mass > 0.0, block, 0), 0)
        chosen = tl.min(tl.where((mass > 0.0) & (ends > target), block, last), 0)
        before = tl.max(tl.where(block < chosen, ends, 0.0), 0)
        token = chosen * BLOCK + tl.arange(0, BLOCK)
        row = _row(logits, row_stride, settings, draws, draw)
        scores = tl.load(row + token, mask=token < width, other=float("-inf"))
        if FILTERED:
            scores = tl.where(scores >= tl.load(floors + draw), scores, float("-inf"))
        weights = _weights(scores, top, unit)
        reached = before + tl.cumsum(weights.to(tl.float64), 0)
        final = tl.max(tl.where(weights > 0.0, token, 0), 0)
        found = tl.min(tl.where((weights > 0.0) & (reached > target), token, final), 0)
    tl.store(tokens + draw, tl.where(broken | (top == float("-inf")), -1, found).to(tl.int64))
