"""The trees of the attention workloads, by name: what a step of each would attend over."""

from collections.abc import Iterator, Sequence

import numpy as np

from radixgen.core.plan import Int32Array
from radixgen.scheduler.forest import Forest

FASTTREE = {
    "F1": "1,2,64 / 8,256,32",
    "F2": "1,4,256 / 8,256,32",
    "F3": "1,4,8,256 / 8,256,256,32",
    "F4": "1,256 / 256,32",
    "F5": "1,1024 / 2048,32",
    "F6": "1,16,64 / 1024,256,32",
    "F7": "1,4,16,512 / 1024,256,128,32",
    "F8": "1,4,16,64,256,1024 / 256,8,256,64,32,256",
    "F9": "1,10 / 4000,400",
    "F10": "1,2,4,8,16,32,64,128,1024 / 16,16,16,16,16,16,16,16,16",
    "F11": "1,2,4,8,16,32,64,128,1024 / 256,128,64,16,16,16,16,16,16",
    "F12": "1,8,16,32,64,128,1024 / 256,128,64,16,16,16,16",
    "F13": "1,8,16,32,64,256,1024 / 256,128,64,16,16,16,16",
    "F14": "1,16,32,64,128,1024 / 256,128,64,16,16,16",
    "F15": "1,16,32,64,256,1024 / 256,128,64,16,16,16",
}
"""FastTree's 15 (MLSys 2025): nodes per level / tokens per node, root first, one request a leaf."""

Tree = tuple[list[int], list[int], list[int]]
"""Parents (-1 at a root, before their children), keys of each node, and the node in which each row stands."""


def levels(notation: str) -> Tree:
    """`nodes per level / tokens per node`; each level's nodes are shared out evenly among those above."""
    counts, tokens = ([int(part) for part in side.split(",")] for side in notation.split("/"))
    parents, lengths = [-1] * counts[0], [tokens[0]] * counts[0]
    for level in range(1, len(counts)):
        above = len(parents) - counts[level - 1]
        parents += [above + node * counts[level - 1] // counts[level] for node in range(counts[level])]
        lengths += [tokens[level]] * counts[level]
    return parents, lengths, list(range(len(parents) - counts[-1], len(parents)))


def shared_prefix(rows: int, prefix: int, suffix: int) -> Tree:
    """One prefix, and below it a suffix for each row; without a suffix the rows stand at the prefix's end."""
    if suffix:
        return levels(f"1,{rows} / {prefix},{suffix}")
    return [-1], [prefix], [0] * rows


def chain(depth: int, tokens: int) -> Tree:
    """A spine of `depth` nodes, with a leaf at each."""
    parents = list(range(-1, depth - 1)) + list(range(depth))
    return parents, [tokens] * (2 * depth), list(range(depth, 2 * depth))


def zipf(rows: int, longest: int) -> Tree:
    """Unshared paths whose lengths follow Zipf's law, from `longest` down to 1."""
    lengths = [max(1, longest // rank) for rank in range(1, rows + 1)]
    return [-1] * rows, lengths, list(range(rows))


def w1() -> Iterator[tuple[str, Tree]]:
    """Hydragen's micro-benchmark; heads 8/1."""
    for rows, prefix in ((512, 1024), (1024, 2048), (2048, 4096), (4096, 8192)):
        for suffix in (0, 128, 512):
            yield f"{rows} rows, {prefix} + {suffix}", shared_prefix(rows, prefix, suffix)


def w5() -> Iterator[tuple[str, Tree]]:
    """FastTree's trees."""
    for name, notation in FASTTREE.items():
        yield name, levels(notation)


def w7() -> Iterator[tuple[str, Tree]]:
    """CoDec's; heads 32/8."""
    for length in (128, 512, 2048):
        yield f"binary, root 4096, others {length}", levels(f"1,2,4,8 / 4096,{length},{length},{length}")
    for root in (2048, 122_880):
        for rows in (4, 16, 64):
            yield f"root {root}, {rows} leaves of 2048", levels(f"1,{rows} / {root},2048")
    for depth in (2, 4, 6):
        counts = ",".join(str(2**level) for level in range(depth))
        yield f"binary, depth {depth}, 1024", levels(f"{counts} / {','.join(['1024'] * depth)}")


def w8() -> Iterator[tuple[str, Tree]]:
    """DeFT's; heads 32/8: few-shot prompts, thoughts, drafts to verify."""
    for width in (20, 30, 50):
        yield f"few-shot, {width} wide", levels(f"1,{width} / 4000,200")
    thoughts = {"sorting": (10, 11, 1104, 378), "merge": (10, 4, 1247, 970), "set": (10, 10, 1611, 68)}
    for name, (width, depth, root, tokens) in (thoughts | {"keyword": (10, 7, 1419, 80)}).items():
        counts = ",".join(["1"] + [str(width)] * (depth - 1))
        yield f"thoughts, {name}", levels(f"{counts} / {','.join([str(root)] + [str(tokens)] * (depth - 1))}")
    yield "draft of 64", levels("1,10,28,23,2 / 3500,1,1,1,1")
    yield "draft of 256", levels("1,6,30,150,69 / 3500,1,1,1,1")


def w9() -> Iterator[tuple[str, Tree]]:
    """One prefix: heads 32/32, and 32/8 from `prefix 512` on."""
    for prefix in (1024, 8192, 32768):
        for suffix in (128, 2048):
            for rows in (8, 64, 256):
                yield f"{rows} rows, {prefix} + {suffix}", shared_prefix(rows, prefix, suffix)


def w12() -> Iterator[tuple[str, Tree]]:
    """Controls: nothing to share, or shapes that could go wrong; heads 32/8."""
    for rows, length in ((1, 1024), (1, 16384), (16, 1024), (16, 16384), (64, 4096), (256, 1024), (256, 4096)):
        yield f"unshared {rows} x {length}", ([-1] * rows, [length] * rows, list(range(rows)))
    yield "two roots, 64 leaves", levels("1,2 / 64,64")
    yield "zipf 256", zipf(256, 8192)
    yield "one-token nodes", levels("1,8,64,512 / 1,1,1,1")
    yield "chain of 64", chain(64, 16)
    yield "1000 roots", ([-1] * 1000, [32] * 1000, list(range(1000)))
    yield "one giant leaf", ([-1] * 65, [64] * 64 + [65_536], list(range(65)))


WORKLOADS = {"W1": w1, "W5": w5, "W7": w7, "W8": w8, "W9": w9, "W12": w12}


def lay_out(tree: Tree) -> tuple[Forest, Int32Array, Int32Array]:
    """The tree with each node's keys in one extent, one behind the other; its rows, each at its node's end."""
    parents, lengths, rows = (np.array(part, np.int32) for part in tree)
    starts = np.zeros_like(lengths)
    for node, parent in enumerate(parents.tolist()):
        if parent >= 0:
            starts[node] = starts[parent] + lengths[parent]
    ends = np.cumsum(lengths, dtype=np.int64)
    forest = Forest(parents, starts, lengths, np.arange(parents.size + 1), ends - lengths, lengths)
    return forest, rows, (starts + lengths - 1)[rows]


def path_tokens(tree: Tree) -> tuple[int, int]:
    """Keys that must be read at least once, and keys of all rows' paths together."""
    parents, lengths, rows = tree
    below = rows_below(parents, rows)
    return (
        sum(length for length, count in zip(lengths, below, strict=True) if count),
        sum(length * count for length, count in zip(lengths, below, strict=True)),
    )


def rows_below(parents: Sequence[int], rows: Sequence[int]) -> list[int]:
    below = [0] * len(parents)
    for row in rows:
        below[row] += 1
    for node in range(len(parents) - 1, -1, -1):
        if parents[node] >= 0:
            below[parents[node]] += below[node]
    return below
