"""Where prompts part though they go on alike, what parts them, and the same prompts without that."""

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
"""Of all tokens, how much must stand behind a divergence twice before it is looked at."""
_MAX_PIECES = 8_000_000
"""Pieces looked at in one search, below the branches with the most tokens."""
_MAX_ALIKE = 512
"""Pieces that may differ in order or white space alone."""
_SAMPLES = 64


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as it stands after some edits: the ids of its pieces, for each where it was in the log's prompt, and
    what was moved behind it.
    """

    row: Row
    origin: Row
    moved: tuple[int, ...] = ()


class Edit(NamedTuple):
    """Put `pieces` in the place of `[first, stop)` of the log's prompt `number`, and `moved` behind its end."""

    number: int
    first: int
    stop: int
    pieces: tuple[int, ...]
    moved: tuple[int, ...] = ()


@dataclass(slots=True)
class Found:
    """Divergences of one kind in one frame of text, as one: how to heal them, and an example."""

    kind: Kind
    frame: str
    """What stands around the varying text."""
    blocked_tokens: int = 0
    """Tokens behind it that stand behind another of its branches too, once for each branch but the first"""
    variants: int = 0
    edits: list[Edit] = field(default_factory=list)
    examples: tuple[Edit, ...] = ()
    """Two prompts that part here"""
    texts: tuple[str, ...] = ()
    """What they part in: the commonest, and another that parts from it early"""


class _Branch(NamedTuple):
    """Prompts `order[low:high]` are the same for `depth` pieces and then part."""

    depth: int
    low: int
    high: int
    tokens: int
    """Behind `depth`"""


def apply(prompts: Sequence[Prompt], edits: Sequence[Edit]) -> list[Prompt]:
    """The prompts with the edits made."""
    edited = list(prompts)
    for edit in edits:
        prompt = edited[edit.number]
        first, stop = np.searchsorted(prompt.origin, (edit.first, edit.stop)).tolist()
        if not edit.moved and edit.pieces == tuple(prompt.row[first:stop].tolist()):
            continue
        row = [*prompt.row[:first], *edit.pieces, *prompt.row[stop:]]
        origin = [*prompt.origin[:first], *[edit.first] * len(edit.pieces), *prompt.origin[stop:]]
        edited[edit.number] = Prompt(np.array(row, np.int32), np.array(origin, np.int32), prompt.moved + edit.moved)
    return edited


def divergences(pieces: Pieces, prompts: Sequence[Prompt]) -> list[Found]:
    """The divergences that block the most tokens, the worst first."""
    search = _Search(pieces, prompts)
    groups: dict[tuple[Kind, str], Found] = {}
    for branch in search.branches():
        found = search.look_at(branch)
        if found is None:
            continue
        whole = groups.setdefault((found.kind, found.frame), found)
        if whole is not found:
            whole.blocked_tokens += found.blocked_tokens
            whole.variants += found.variants
            edited = {edit.number: edit.stop for edit in whole.edits}
            whole.edits += [edit for edit in found.edits if edit.first >= edited.get(edit.number, 0)]
    return sorted(groups.values(), key=lambda one: -one.blocked_tokens)


class _Search:
    def __init__(self, pieces: Pieces, prompts: Sequence[Prompt]) -> None:
        self.pieces = pieces
        self.prompts = prompts
        self.lengths = pieces.lengths
        rows = [prompt.row for prompt in prompts]
        keys = [row.astype(">i4").tobytes() for row in rows]
        self.order = sorted(range(len(rows)), key=keys.__getitem__)
        self.sizes = [int(self.lengths[row].sum()) for row in rows]
        self.least = max(1, int(_MIN_SHARE * sum(self.sizes)))

    def row(self, place: int) -> Row:
        return self.prompts[self.order[place]].row

    def branches(self) -> Iterator[_Branch]:
        """Those with enough tokens below, most first, as far as the work is bounded."""
        total = np.concatenate([[0], np.cumsum([self.sizes[number] for number in self.order])])
        common = [common_prefix_len(self.row(n), self.row(n + 1)) for n in range(len(self.order) - 1)]
        found = []
        for depth, low, high in _intervals(common):
            above = int(self.lengths[self.row(low)[:depth]].sum())
            tokens = int(total[high] - total[low]) - (high - low) * above
            if tokens >= self.least:
                found.append(_Branch(depth, low, high, tokens))
        work = 0
        for branch in sorted(found, key=lambda one: -one.tokens):
            work += sum(self.row(place).size - branch.depth for place in range(branch.low, branch.high))
            yield branch
            if work > _MAX_PIECES:
                return

    def look_at(self, branch: _Branch) -> Found | None:
        """What parts the prompts of a branch, where enough tokens behind it would be the same."""
        depth = branch.depth
        numbers = self.order[branch.low : branch.high]
        rests = [self.prompts[number].row[depth:] for number in numbers]
        heads = np.array([rest[0] if rest.size else -1 for rest in rests])
        children = np.cumsum(np.concatenate([[0], heads[1:] != heads[:-1]]))
        held, times = self._held(rests, children)
        said = ~np.isin(held, list(self.pieces.template))
        held, times = held[said], times[said]
        blocked = int((self.lengths[held] * (times - 1)).sum())
        if blocked < self.least:
            return None
        common = np.zeros(len(self.pieces.texts), np.bool_)
        common[held[(times > 1) & (2 * times > children[-1])]] = True
        sizes = _respaced(self.pieces, rests, children) or _reordered(self.pieces, rests, children)
        if sizes is None:
            sizes = [_first(common[rest]) for rest in rests]
        regions = [tuple(rest[:size].tolist()) for rest, size in zip(rests, sizes, strict=True)]
        found = self._healed(numbers, depth, regions)
        if found is not None:
            found.blocked_tokens = blocked
        return found

    def _held(self, rests: list[Row], children: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The pieces of `rests`, and behind how many of the children each stands."""
        width = len(self.pieces.texts)
        owners = np.repeat(children, [rest.size for rest in rests])
        pairs = np.unique(owners * width + np.concatenate(rests))
        return np.unique(pairs % width, return_counts=True)

    def _healed(self, numbers: list[int], depth: int, regions: list[tuple[int, ...]]) -> Found | None:
        """How to make the regions of these prompts, from the piece at `depth` on, the same."""
        texts = {region: self.pieces.text_of(region) for region in set(regions)}
        counts = Counter(texts[region] for region in regions)
        if len(counts) < 2:
            return None
        healing = heal(counts)
        put, moved = (self._ids_of(healing.texts, part) for part in (0, 1))
        found = Found(healing.kind, healing.frame)
        first_of: dict[str, Edit] = {}
        for number, region in zip(numbers, regions, strict=True):
            text, place = texts[region], _place(self.prompts[number].origin, depth)
            if text not in healing.texts:
                continue
            stop = _place(self.prompts[number].origin, depth + len(region))
            edit = Edit(number, place, stop, put[text], moved[text])
            first_of.setdefault(text, edit)
            found.edits.append(edit)
        found.variants = len(first_of)
        one, *others = (text for text, _ in counts.most_common() if text in first_of)
        found.texts = one, min(others[:_SAMPLES], key=lambda other: common_len((one, other)))
        found.examples = tuple(first_of[text] for text in found.texts)
        return found

    def _ids_of(self, texts: dict[str, tuple[str, str]], part: int) -> dict[str, tuple[int, ...]]:
        """For each text the piece that its healed part is; none where that is empty."""
        filled = [text for text, parts in texts.items() if parts[part]]
        ids = self.pieces.add(texts[text][part] for text in filled)
        return dict.fromkeys(texts, ()) | {text: (piece,) for text, piece in zip(filled, ids, strict=True)}


class Healing(NamedTuple):
    """What differs between texts, what they have in common, and for each what stays in its place and what goes to
    the prompt's end.
    """

    kind: Kind
    frame: str
    texts: dict[str, tuple[str, str]]


def heal(counts: Counter[str]) -> Healing:
    """How to make texts the same that occur so often, at least two of them."""
    if (same := _same_but(counts, without_spaces)) is not None:
        return Healing("white space", without_spaces(next(iter(same))), same)
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
        return Healing("order", in_order(next(iter(same))), same)
    return _moved(difference(texts), texts)


def _moved(found: Difference, texts: list[str]) -> Healing:
    covered = {text: found.varying(text).strip() for text in texts if found.covers(text)}
    frame = found.head + found.tail
    healed = {text: (frame, varying and f"\n{varying}") for text, varying in covered.items()}
    return Healing(found.kind, f"{found.head}…{found.tail}", healed)


def _same_but(counts: Counter[str], form: Callable[[str], str]) -> dict[str, tuple[str, str]] | None:
    """For each text the commonest that has the same form; None where forms differ nearly as much as texts."""
    common = [text for text, _ in counts.most_common()]
    sample = common[:_SAMPLES]
    if 2 * len({form(text) for text in sample}) > len(sample):
        return None
    chosen: dict[str, str] = {}
    return {text: (chosen.setdefault(form(text), text), "") for text in common}


def _respaced(pieces: Pieces, rests: list[Row], children: NDArray[np.int64]) -> list[int] | None:
    """How many pieces of each of `rests` are the same but for white space; None where most branches differ in more."""
    heads = [rests[int(np.searchsorted(children, child))] for child in _largest(children)[:_SAMPLES]]
    same = _spaceless(pieces, heads[0])[0]
    cuts = Counter(end for head in heads for end in _same_ends(pieces, head, same))
    end = max(cuts, key=lambda one: (cuts[one], -one), default=0)
    if not end or cuts[end] < 2 or 2 * cuts[end] < len(heads):
        return None
    return [_same_ends(pieces, rest, same[:end]).get(end, 0) for rest in rests]


def _same_ends(pieces: Pieces, row: Row, same: str) -> dict[int, int]:
    """Lengths of `same`, at which a piece of `row` ends that has begun with it but for white space, and which piece."""
    text, ends = _spaceless(pieces, row)
    length = common_len((text, same))
    return {end: size for size, end in enumerate(ends, 1) if 0 < end <= length}


def _spaceless(pieces: Pieces, row: Row) -> tuple[str, list[int]]:
    parts = [without_spaces(pieces.texts[piece]) for piece in row[:_MAX_ALIKE]]
    return "".join(parts), list(accumulate(map(len, parts)))


def _reordered(pieces: Pieces, rests: list[Row], children: NDArray[np.int64]) -> list[int] | None:
    """How many pieces of each of `rests` are the same in another order; None where no two branches have the same."""
    heads = [rests[int(np.searchsorted(children, child))] for child in _largest(children)[:_SAMPLES]]
    size = max((_balanced(pieces, heads[0], head) for head in heads[1:]), default=0)
    return [min(size, rest.size) for rest in rests] if size > 1 else None


def _balanced(pieces: Pieces, one: Row, two: Row) -> int:
    """The number of first pieces, at least 1, that are the same in both, each as often, commas aside; 0 for none."""
    balance: Counter[str] = Counter()
    for size, pair in enumerate(zip(one[:_MAX_ALIKE], two[:_MAX_ALIKE], strict=False), 1):
        for piece, step in zip(pair, (1, -1), strict=True):
            key = pieces.texts[piece].strip().rstrip(",")
            balance[key] += step
            if not balance[key]:
                del balance[key]
        if not balance:
            return size
    return 0


def _largest(children: NDArray[np.int64]) -> list[int]:
    """The children, those of the most prompts first."""
    found: list[int] = np.argsort(-np.bincount(children), kind="stable").tolist()
    return found


def _first(true: NDArray[np.bool_]) -> int:
    """The place of the first that is true; behind the last where none is."""
    return int(true.argmax()) if true.any() else true.size


def _place(origin: Row, depth: int) -> int:
    """Where in the log's prompt the piece at `depth` was."""
    if depth < origin.size:
        return int(origin[depth])
    return int(origin[-1]) + 1 if origin.size else 0


def _intervals(common: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Of sorted rows with these common prefixes, each `depth` and `[low, high)` at which rows part, as a walk over
    the array finds them that keeps the open ones on a stack.
    """
    open_: list[tuple[int, int]] = []
    for place, depth in enumerate([*common, -1]):
        low = place
        while open_ and open_[-1][0] > depth:
            deeper, low = open_.pop()
            yield deeper, low, place + 1
        if not open_ or open_[-1][0] < depth:
            open_.append((depth, low))
