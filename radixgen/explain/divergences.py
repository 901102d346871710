"""Places where prompts with equal continuations diverge, and edits that make them equal."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from radixgen.cache import common_prefix_len
from radixgen.explain.kinds import Difference, Kind, common_len, difference, in_order, masked, without_spaces
from radixgen.explain.pieces import Pieces, Row

_MIN_SHARE = 0.005
"""Fraction of all tokens that must repeat after a divergence for it to be considered"""
_MAX_PIECES = 8_000_000
"""Maximum number of pieces examined in one search, of the branches with the most tokens"""
_MAX_ALIKE = 512
"""Maximum number of pieces that are compared without regard to order or white space"""
_SAMPLES = 64


@dataclass(frozen=True, slots=True)
class EditedPrompt:
    """Logged prompt after some edits."""

    row: Row
    """Ids of its pieces"""
    origin: Row
    """Index of each piece in the logged prompt"""
    moved: tuple[int, ...] = ()
    """Ids of pieces that were moved to its end"""


class Edit(NamedTuple):
    """Replace pieces `[first, stop)` of logged prompt `number` by `pieces`, and append `moved` to the prompt."""

    number: int
    first: int
    stop: int
    pieces: tuple[int, ...]
    moved: tuple[int, ...] = ()


@dataclass(slots=True)
class DivergenceGroup:
    """All divergences of one kind with the same text around them: edits that remedy them, and an example."""

    kind: Kind
    frame: str
    """Constant text around the varying text"""
    blocked_tokens: int = 0
    """Number of tokens after the divergence that repeat those of another branch"""
    variants: int = 0
    edits: list[Edit] = field(default_factory=list)
    examples: tuple[Edit, ...] = ()
    """Edits of two prompts that diverge here"""
    texts: tuple[str, ...] = ()
    """Varying texts of the examples: the most common, and another that differs early"""


class _Branch(NamedTuple):
    """Prompts `order[low:high]`, which have their first `depth` pieces in common, but not the next."""

    depth: int
    low: int
    high: int
    tokens: int
    """Number of tokens after `depth`"""


def apply(prompts: Sequence[EditedPrompt], edits: Sequence[Edit]) -> list[EditedPrompt]:
    """Apply edits to prompts."""
    edited = list(prompts)
    for edit in edits:
        prompt = edited[edit.number]
        first, stop = np.searchsorted(prompt.origin, (edit.first, edit.stop)).tolist()
        if not edit.moved and edit.pieces == tuple(prompt.row[first:stop].tolist()):
            continue
        row = [*prompt.row[:first], *edit.pieces, *prompt.row[stop:]]
        origin = [*prompt.origin[:first], *[edit.first] * len(edit.pieces), *prompt.origin[stop:]]
        edited[edit.number] = EditedPrompt(
            np.array(row, np.int32), np.array(origin, np.int32), prompt.moved + edit.moved
        )
    return edited


def divergences(pieces: Pieces, prompts: Sequence[EditedPrompt]) -> list[DivergenceGroup]:
    """Find the divergences that block the most tokens, the worst first."""
    search = _DivergenceSearch(pieces, prompts)
    groups: dict[tuple[Kind, str], DivergenceGroup] = {}
    for branch in search.branches():
        new = search.examine(branch)
        if new is None:
            continue
        group = groups.setdefault((new.kind, new.frame), new)
        if group is not new:
            group.blocked_tokens += new.blocked_tokens
            group.variants += new.variants
            edited = {edit.number: edit.stop for edit in group.edits}
            group.edits += [edit for edit in new.edits if edit.first >= edited.get(edit.number, 0)]
    return sorted(groups.values(), key=lambda group: -group.blocked_tokens)


class _DivergenceSearch:
    """Search over sorted prompts for branches whose continuations repeat."""

    def __init__(self, pieces: Pieces, prompts: Sequence[EditedPrompt]) -> None:
        self.pieces = pieces
        self.prompts = prompts
        self.lengths = pieces.lengths
        rows = [prompt.row for prompt in prompts]
        keys = [row.astype(">i4").tobytes() for row in rows]
        self.order = sorted(range(len(rows)), key=keys.__getitem__)
        self.sizes = [int(self.lengths[row].sum()) for row in rows]
        self.least = max(1, int(_MIN_SHARE * sum(self.sizes)))

    def row(self, index: int) -> Row:
        """Pieces of the prompt at an index of the sorted order."""
        return self.prompts[self.order[index]].row

    def branches(self) -> Iterator[_Branch]:
        """Branches with enough tokens, those with the most first, up to the limit on work."""
        total = np.concatenate([[0], np.cumsum([self.sizes[number] for number in self.order])])
        common = [common_prefix_len(self.row(n), self.row(n + 1)) for n in range(len(self.order) - 1)]
        branches = []
        for depth, low, high in _intervals(common):
            above = int(self.lengths[self.row(low)[:depth]].sum())
            tokens = int(total[high] - total[low]) - (high - low) * above
            if tokens >= self.least:
                branches.append(_Branch(depth, low, high, tokens))
        work = 0
        for branch in sorted(branches, key=lambda branch: -branch.tokens):
            work += sum(self.row(index).size - branch.depth for index in range(branch.low, branch.high))
            yield branch
            if work > _MAX_PIECES:
                return

    def examine(self, branch: _Branch) -> DivergenceGroup | None:
        """Divergence of a branch's prompts, if enough tokens after it repeat."""
        depth = branch.depth
        numbers = self.order[branch.low : branch.high]
        rests = [self.prompts[number].row[depth:] for number in numbers]
        heads = np.array([rest[0] if rest.size else -1 for rest in rests])
        children = np.cumsum(np.concatenate([[0], heads[1:] != heads[:-1]]))
        held, times = self._held(rests, children)
        content = ~np.isin(held, list(self.pieces.template))
        held, times = held[content], times[content]
        blocked = int((self.lengths[held] * (times - 1)).sum())
        if blocked < self.least:
            return None
        common = np.zeros(len(self.pieces.texts), np.bool_)
        common[held[(times > 1) & (2 * times > children[-1])]] = True
        sizes = _respaced(self.pieces, rests, children) or _reordered(self.pieces, rests, children)
        if sizes is None:
            sizes = [_first(common[rest]) for rest in rests]
        regions = [tuple(rest[:size].tolist()) for rest, size in zip(rests, sizes, strict=True)]
        group = self._remedy(numbers, depth, regions)
        if group is not None:
            group.blocked_tokens = blocked
        return group

    def _held(self, rests: list[Row], children: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Distinct pieces of `rests`, and the number of children that contain each."""
        width = len(self.pieces.texts)
        owners = np.repeat(children, [rest.size for rest in rests])
        pairs = np.unique(owners * width + np.concatenate(rests))
        return np.unique(pairs % width, return_counts=True)

    def _remedy(self, numbers: list[int], depth: int, regions: list[tuple[int, ...]]) -> DivergenceGroup | None:
        """Edits that make the regions of these prompts, from piece `depth` on, equal."""
        texts = {region: self.pieces.text_of(region) for region in set(regions)}
        counts = Counter(texts[region] for region in regions)
        if len(counts) < 2:
            return None
        remedy = find_remedy(counts)
        kept, moved = (self._ids_of(remedy.texts, part) for part in (0, 1))
        group = DivergenceGroup(remedy.kind, remedy.frame)
        first_of: dict[str, Edit] = {}
        for number, region in zip(numbers, regions, strict=True):
            text, first = texts[region], _original_index(self.prompts[number].origin, depth)
            if text not in remedy.texts:
                continue
            stop = _original_index(self.prompts[number].origin, depth + len(region))
            edit = Edit(number, first, stop, kept[text], moved[text])
            first_of.setdefault(text, edit)
            group.edits.append(edit)
        group.variants = len(first_of)
        commonest, *others = (text for text, _ in counts.most_common() if text in first_of)
        group.texts = commonest, min(others[:_SAMPLES], key=lambda other: common_len((commonest, other)))
        group.examples = tuple(first_of[text] for text in group.texts)
        return group

    def _ids_of(self, texts: dict[str, tuple[str, str]], part: int) -> dict[str, tuple[int, ...]]:
        """For each text the piece of its kept (0) or moved (1) part; no piece if that is empty."""
        filled = [text for text, parts in texts.items() if parts[part]]
        ids = self.pieces.add(texts[text][part] for text in filled)
        return dict.fromkeys(texts, ()) | {text: (piece,) for text, piece in zip(filled, ids, strict=True)}


class Remedy(NamedTuple):
    """A way to make texts equal."""

    kind: Kind
    frame: str
    """What the texts have in common"""
    texts: dict[str, tuple[str, str]]
    """For each text the part that stays in place, and the part that moves to the end of the prompt"""


def find_remedy(counts: Counter[str]) -> Remedy:
    """Find a way to make at least two texts equal. counts: the number of occurrences of each."""
    if (same := _same_but(counts, without_spaces)) is not None:
        return Remedy("white space", without_spaces(next(iter(same))), same)
    texts = list(counts)
    offset = common_len(texts)
    window = slice(max(0, offset - 64), offset + 192)
    groups: dict[str, list[str]] = {}
    for text in texts:
        groups.setdefault(masked(text[window]), []).append(text)
    largest = max(groups.values(), key=lambda group: (len(group) > 1, sum(counts[text] for text in group)))
    if len(largest) > 1 and 2 * sum(counts[text] for text in largest) >= counts.total():
        differs = difference(largest)
        if differs.kind != "text":
            return _moved(differs, texts)
    if (same := _same_but(counts, in_order)) is not None:
        return Remedy("order", in_order(next(iter(same))), same)
    return _moved(difference(texts), texts)


def _moved(differs: Difference, texts: list[str]) -> Remedy:
    """Remedy that moves the varying part of each text to the end of the prompt."""
    covered = {text: differs.varying(text).strip() for text in texts if differs.covers(text)}
    frame = differs.head + differs.tail
    parts = {text: (frame, varying and f"\n{varying}") for text, varying in covered.items()}
    return Remedy(differs.kind, f"{differs.head}…{differs.tail}", parts)


def _same_but(counts: Counter[str], form: Callable[[str], str]) -> dict[str, tuple[str, str]] | None:
    """For each text the most common one with the same form; None if there are nearly as many forms as texts."""
    common = [text for text, _ in counts.most_common()]
    sample = common[:_SAMPLES]
    if 2 * len({form(text) for text in sample}) > len(sample):
        return None
    chosen: dict[str, str] = {}
    return {text: (chosen.setdefault(form(text), text), "") for text in common}


def _respaced(pieces: Pieces, rests: list[Row], children: NDArray[np.int64]) -> list[int] | None:
    """Number of pieces of each of `rests` that differ only in white space; None if most branches differ in more."""
    heads = [rests[int(np.searchsorted(children, child))] for child in _largest(children)[:_SAMPLES]]
    same = _spaceless(pieces, heads[0])[0]
    cuts = Counter(end for head in heads for end in _same_ends(pieces, head, same))
    end = max(cuts, key=lambda cut: (cuts[cut], -cut), default=0)
    if not end or cuts[end] < 2 or 2 * cuts[end] < len(heads):
        return None
    return [_same_ends(pieces, rest, same[:end]).get(end, 0) for rest in rests]


def _same_ends(pieces: Pieces, row: Row, same: str) -> dict[int, int]:
    """Lengths of prefixes of `same` that equal the first pieces of `row` without white space, with their number."""
    text, ends = _spaceless(pieces, row)
    length = common_len((text, same))
    return {end: size for size, end in enumerate(ends, 1) if 0 < end <= length}


def _spaceless(pieces: Pieces, row: Row) -> tuple[str, list[int]]:
    parts = [without_spaces(pieces.texts[piece]) for piece in row[:_MAX_ALIKE]]
    return "".join(parts), list(accumulate(map(len, parts)))


def _reordered(pieces: Pieces, rests: list[Row], children: NDArray[np.int64]) -> list[int] | None:
    """Number of pieces of each of `rests` that differ only in order; None if there are none."""
    heads = [rests[int(np.searchsorted(children, child))] for child in _largest(children)[:_SAMPLES]]
    size = max((_balanced(pieces, heads[0], head) for head in heads[1:]), default=0)
    return [min(size, rest.size) for rest in rests] if size > 1 else None


def _balanced(pieces: Pieces, first: Row, second: Row) -> int:
    """Smallest number of first pieces that are the same in both rows, apart from order and commas; 0 if none."""
    balance: Counter[str] = Counter()
    for size, pair in enumerate(zip(first[:_MAX_ALIKE], second[:_MAX_ALIKE], strict=False), 1):
        for piece, step in zip(pair, (1, -1), strict=True):
            key = pieces.texts[piece].strip().rstrip(",")
            balance[key] += step
            if not balance[key]:
                del balance[key]
        if not balance:
            return size
    return 0


def _largest(children: NDArray[np.int64]) -> list[int]:
    """Children sorted by their number of prompts, the largest first."""
    order: list[int] = np.argsort(-np.bincount(children), kind="stable").tolist()
    return order


def _first(true: NDArray[np.bool_]) -> int:
    """Index of the first true element; the size if there is none."""
    return int(true.argmax()) if true.any() else true.size


def _original_index(origin: Row, depth: int) -> int:
    """Index in the logged prompt of the piece that is now at `depth`."""
    if depth < origin.size:
        return int(origin[depth])
    return int(origin[-1]) + 1 if origin.size else 0


def _intervals(common: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Each depth and interval `[low, high)` at which sorted rows diverge, by a walk with a stack.

    common: lengths of the common prefixes of neighbouring rows.
    """
    open_: list[tuple[int, int]] = []
    for index, depth in enumerate([*common, -1]):
        low = index
        while open_ and open_[-1][0] > depth:
            deeper, low = open_.pop()
            yield deeper, low, index + 1
        if not open_ or open_[-1][0] < depth:
            open_.append((depth, low))
