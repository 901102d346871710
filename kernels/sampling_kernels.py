"""Sampling kernels in Triton: the logits of a draw are read once, in blocks of the vocabulary, and more often only with
filters.

Each block stores its largest logit and the sum of its weights relative to that. A draw then finds its block by these,
and its token within the block. Filters are a minimum logit, the *floor*, which is found without sorting: each pass over
a row sums the weights above several thresholds between two bounds, and two adjacent thresholds become the next bounds.

Every sum has a fixed order that depends only on the width of the vocabulary, so that a draw depends only on its own
row, and runs are reproducible.

Symbols: `draws` tokens are drawn from `logits` `[rows, width]`, whose rows are `row_stride` apart, divided into
`blocks` of BLOCK tokens; BLOCKS is `blocks` rounded up to a power of two. `settings` float64 `[6, draws]`, see
`radixgen.kernels.draw_settings`; `floors` float32 `[draws]`; `tops`, `masses` float32 and `best` int32
`[draws, blocks]`, see `weigh_blocks`. `first`: token of the first column, more than 0 where `logits` are a part of the
vocabulary.
"""

import triton
import triton.language as tl

from radixgen.kernels import draw_settings

# Rows of `settings`
ROW = tl.constexpr(draw_settings.ROW)
UNIT = tl.constexpr(draw_settings.UNIT)
TOP_K = tl.constexpr(draw_settings.TOP_K)
TOP_P = tl.constexpr(draw_settings.TOP_P)
MIN_P = tl.constexpr(draw_settings.MIN_P)
UNIFORM = tl.constexpr(draw_settings.UNIFORM)


@triton.jit
def _setting(settings, field, draws, draw):
    return tl.load(settings + field * draws + draw)


@triton.jit
def _scores(logits, row_stride, settings, width, draws, draw, token):
    """Load a draw's logits of these tokens as float32; -inf beyond the vocabulary."""
    row = logits + _setting(settings, ROW, draws, draw).to(tl.int64) * row_stride
    return tl.load(row + token, mask=token < width, other=float("-inf")).to(tl.float32)


@triton.jit
def _weights(scores, top, unit):
    """Return powers of two of float32 logits, 1 for the largest, `top`; all 0 if that is -inf."""
    return tl.exp2((scores - tl.where(top == float("-inf"), 0.0, top)) * unit)


@triton.jit(do_not_specialize=("draws", "first"))
def weigh_blocks(
    logits, row_stride, settings, floors, tops, masses, best, width, first, draws, blocks,
    BLOCK: tl.constexpr, FILTERED: tl.constexpr,
):  # fmt: skip
    """Compute for each block of each draw: its largest logit into `tops`, NaN if it holds NaN or +inf; the first token
    with that logit into `best`; and the sum of its weights into `masses`. FILTERED: only `masses`, of logits that reach
    the draw's floor.
    """
    block, draw = tl.program_id(0), tl.program_id(1)
    place = draw * blocks + block
    unit = _setting(settings, UNIT, draws, draw).to(tl.float32)
    token = block * BLOCK + tl.arange(0, BLOCK)
    scores = _scores(logits, row_stride, settings, width, draws, draw, token)
    if FILTERED:
        top = tl.load(tops + place)
        scores = tl.where(scores >= tl.load(floors + draw), scores, float("-inf"))
    else:
        top = tl.max(scores, 0)
        tl.store(best + place, tl.min(tl.where(scores == top, first + token, 2147483647), 0))
        broken = tl.max(((scores != scores) | (scores == float("inf"))).to(tl.int32), 0)
        tl.store(tops + place, tl.where(broken > 0, float("nan"), top))
    tl.store(masses + place, tl.sum(_weights(scores, top, unit), 0))


@triton.jit(do_not_specialize=("draws",))
def narrow_floors(
    logits, row_stride, settings, floors, tops, masses, bounds, before, results, width, draws, blocks,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr, WAYS: tl.constexpr, WEIGHED: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """One pass of the search for floors, in one block of one draw: sums of the weights above each of WAYS thresholds.

    The floor is the largest logit such that the tokens from it on suffice: TOP_K tokens, or if WEIGHED the share TOP_P
    of the weight in `masses`. It is searched for between two bounds, of which the lower one suffices, by the results of
    the pass before. `before` and `results`, float32 `[draws, blocks, WAYS + 2]`: results of the pass before and of this
    one, the sums above the thresholds, then the smallest and largest logit between the bounds. `bounds`, float32
    `[2, 4, draws]`, of the pass before and of this one, which writes them: lower, upper, required weight, unused.
    """
    block, draw = tl.program_id(0), tl.program_id(1)
    unit = _setting(settings, UNIT, draws, draw).to(tl.float32)
    if FIRST:
        top = _top(tops, draw, blocks, BLOCKS)
        low, high, target = _first_bounds(
            settings, floors, tops, masses, top, unit, width, draws, blocks, draw, BLOCKS, WEIGHED
        )
    else:
        low, high, target = _next_bounds(bounds, before, draws, blocks, draw, BLOCKS, WAYS)
        top = _top(tops, draw, blocks, BLOCKS)
    if block == 0:
        own = bounds + 4 * draws + draw
        tl.store(own, low)
        tl.store(own + draws, high)
        tl.store(own + 2 * draws, target)
    if low < high:
        token = block * BLOCK + tl.arange(0, BLOCK)
        scores = _scores(logits, row_stride, settings, width, draws, draw, token)
        if WEIGHED:
            weights = _weights(scores, top, unit)
        else:
            weights = tl.full([BLOCK], 1.0, tl.float32)
        within = (scores >= low) & (scores < high)
        place = results + (draw * blocks + block) * (WAYS + 2)
        for way in tl.static_range(WAYS):
            tl.store(place + way, tl.sum(tl.where(scores >= _threshold(low, high, way / WAYS), weights, 0.0), 0))
        tl.store(place + WAYS, tl.min(tl.where(within, scores, float("inf")), 0))
        tl.store(place + WAYS + 1, tl.max(tl.where(within, scores, float("-inf")), 0))


@triton.jit(do_not_specialize=("draws",))
def settle_floors(
    settings, floors, tops, bounds, before, draws, blocks,
    BLOCKS: tl.constexpr, WAYS: tl.constexpr, SEARCHED: tl.constexpr,
):  # fmt: skip
    """Raise the floor of each draw, `[draws]` float32: if SEARCHED, to the lower bound after the last pass, but at most
    to the most likely token's logit; otherwise to what min-p keeps.
    """
    draw = tl.program_id(0)
    floor = tl.load(floors + draw)
    top = _top(tops, draw, blocks, BLOCKS)
    if SEARCHED:
        low, _, _ = _next_bounds(bounds, before, draws, blocks, draw, BLOCKS, WAYS)
        floor = tl.maximum(floor, tl.minimum(low, top))
    else:
        unit = _setting(settings, UNIT, draws, draw).to(tl.float32)
        if (unit > 0.0) & (top > float("-inf")):
            floor = tl.maximum(floor, top + _setting(settings, MIN_P, draws, draw).to(tl.float32) / unit)
    tl.store(floors + draw, floor)


@triton.jit
def _top(tops, draw, blocks, BLOCKS: tl.constexpr):
    block = tl.arange(0, BLOCKS)
    return tl.max(tl.load(tops + draw * blocks + block, mask=block < blocks, other=float("-inf")), 0)


@triton.jit
def _threshold(low, high, share):
    """Return a threshold between the bounds, `low` for share 0; rounded once, so that all kernels compute the same."""
    return tl.fma(high - low, share, low)


@triton.jit
def _first_bounds(
    settings, floors, tops, masses, top, unit, width, draws, blocks, draw, BLOCKS: tl.constexpr, WEIGHED: tl.constexpr
):  # fmt: skip
    """Return bounds that include everything finite if the draw has the filter, or nothing otherwise, and the required
    weight.
    """
    block = tl.arange(0, BLOCKS)
    inside = block < blocks
    if WEIGHED:
        own_tops = tl.load(tops + draw * blocks + block, mask=inside, other=float("-inf"))
        mass = tl.load(masses + draw * blocks + block, mask=inside, other=0.0) * _weights(own_tops, top, unit)
        share = _setting(settings, TOP_P, draws, draw).to(tl.float32)
        wanted, target = share < 1.0, share * tl.sum(mass, 0)
    else:
        target = _setting(settings, TOP_K, draws, draw).to(tl.float32)
        wanted = (target > 0.0) & (target < width)
    wanted = wanted & (top > float("-inf")) & (unit > 0.0)
    low = tl.maximum(tl.load(floors + draw), -1.0e38)
    high = tl.minimum(top + tl.abs(top) * 2.4e-7 + 1e-30, 2.0e38)
    return tl.where(wanted, low, float("-inf")), tl.where(wanted, high, float("-inf")), target


@triton.jit
def _next_bounds(bounds, before, draws, blocks, draw, BLOCKS: tl.constexpr, WAYS: tl.constexpr):
    """Return the last threshold of the pass before that suffices, and the next one; equal bounds if all logits between
    them are equal.
    """
    low = tl.load(bounds + draw)
    high = tl.load(bounds + draws + draw)
    target = tl.load(bounds + 2 * draws + draw)
    if low < high:
        block = tl.arange(0, BLOCKS)
        way = tl.arange(0, WAYS)
        inside = block < blocks
        place = before + (draw * blocks + block) * (WAYS + 2)
        sums = tl.load(place[:, None] + way[None, :], mask=inside[:, None], other=0.0)
        smallest = tl.min(tl.load(place + WAYS, mask=inside, other=float("inf")), 0)
        largest = tl.max(tl.load(place + WAYS + 1, mask=inside, other=float("-inf")), 0)
        chosen = tl.max(tl.where((tl.sum(sums, 0) >= target) | (way == 0), way, 0), 0)
        thresholds = _threshold(low, high, way.to(tl.float32) / WAYS)
        upper = tl.min(tl.where(way > chosen, thresholds, high), 0)
        lower = tl.maximum(tl.max(tl.where(way <= chosen, thresholds, low), 0), smallest)
        alone = smallest >= largest
        low = tl.where(alone, smallest, lower)
        high = tl.where(alone, smallest, upper)
    return low, high, target


@triton.jit(do_not_specialize=("draws", "first", "first_block"))
def choose(
    logits, row_stride, settings, floors, tops, masses, best, tokens, width, first, draws, blocks, first_block,
    own_blocks, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, FILTERED: tl.constexpr,
):  # fmt: skip
    """Write the token of each draw, int64 `[draws]`: first its block by the blocks' weights, then its place within the
    block. `logits` have `own_blocks` of the blocks, from `first_block` on: tokens of other blocks become 0, and so do
    those that need no logits, unless `first_block` is 0.
    """
    draw = tl.program_id(0)
    unit = _setting(settings, UNIT, draws, draw).to(tl.float32)
    block = tl.arange(0, BLOCKS)
    inside = block < blocks
    own_tops = tl.load(tops + draw * blocks + block, mask=inside, other=float("-inf"))
    broken = tl.max((own_tops != own_tops).to(tl.int32), 0) > 0
    top = tl.max(own_tops, 0)
    likeliest = tl.load(best + draw * blocks + block, mask=inside, other=0)
    chosen_token = tl.min(tl.where(own_tops == top, likeliest, 2147483647), 0)
    chosen_token = tl.where(broken | (top == float("-inf")), -1, chosen_token)
    chosen_token = tl.where(first_block == 0, chosen_token, 0)
    if (unit > 0.0) & (broken == 0) & (top > float("-inf")):
        mass = tl.load(masses + draw * blocks + block, mask=inside, other=0.0)
        mass = (mass * _weights(own_tops, top, unit)).to(tl.float64)
        ends = tl.cumsum(mass, 0)
        target = _setting(settings, UNIFORM, draws, draw) * tl.max(ends, 0)
        last = tl.max(tl.where(mass > 0.0, block, 0), 0)
        chosen = tl.min(tl.where((mass > 0.0) & (ends > target), block, last), 0)
        before = tl.max(tl.where(block < chosen, ends, 0.0), 0)
        is_own = (chosen >= first_block) & (chosen < first_block + own_blocks)
        token = tl.where(is_own, chosen - first_block, 0) * BLOCK + tl.arange(0, BLOCK)
        scores = _scores(logits, row_stride, settings, width, draws, draw, token)
        if FILTERED:
            scores = tl.where(scores >= tl.load(floors + draw), scores, float("-inf"))
        weights = _weights(scores, top, unit)
        reached = before + tl.cumsum(weights.to(tl.float64), 0)
        final = tl.max(tl.where(weights > 0.0, token, 0), 0)
        drawn = tl.min(tl.where((weights > 0.0) & (reached > target), token, final), 0)
        chosen_token = tl.where(is_own, first + drawn, 0)
    tl.store(tokens + draw, chosen_token.to(tl.int64))
