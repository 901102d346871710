"""Why the prompts of a log share no more than they do, found with a tokenizer alone.

pieces       a log as sequences of lines, each tokenized once
kinds        what differs between two texts: a timestamp, an id, a number, order, white space
divergences  where prompts part though they go on alike, and the same prompts without that
show         the report in the terminal
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from radixgen.cache import ExtentPool, RadixTree, TokenArray, common_prefix_len
from radixgen.core import check_texts
from radixgen.explain.divergences import Found, Prompt, apply, divergences
from radixgen.explain.kinds import Kind, common_len, difference
from radixgen.explain.pieces import BLANK, Pieces, Row, Written, distinct_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["BLANK", "Divergence", "Report", "Written", "explain"]

_MAX_DIVERGENCES = 8
_MAX_TRIALS = 12
_MIN_SAVING = 0.0025
"""Of all tokens, what a divergence must cost to be reported."""
_SHOWN_CHARACTERS = 120
_REMEDIES: dict[Kind, str] = {"white space": "made the same", "order": "brought into one order"}


@dataclass(frozen=True, slots=True)
class Divergence:
    """Prompts that part in one way, and what that costs."""

    kind: Kind
    remedy: str
    """What the saving supposes of the varying text: `moved to the end`, or another for white space and order"""
    line: int
    """Of the prompt's text, from 1; of a chat's as the template renders it, the template's own lines too"""
    position: int
    """The first token that differs, in one of the prompts"""
    frame: str
    """What stands around the varying text; empty for white space and order"""
    here: str
    there: str
    """The varying text in two of the prompts"""
    prompts: int
    """How many it stands in"""
    variants: int
    blocked_tokens: int
    """Tokens behind it that stand behind another variant too, once for each but the first"""
    saved_alone: int
    """Distinct tokens fewer with this one remedied"""
    saved_tokens: int
    """Distinct tokens fewer with this one remedied after all that are reported before it"""


@dataclass(frozen=True, slots=True)
class Report:
    """What a log's prompts share, and what they could.

    `tree` holds every prompt; a node's locks are the prompts that end there.
    """

    prompts: int
    tokens: int
    distinct_tokens: int
    """Tokens in the tree: what has to be computed where nothing is evicted"""
    divergences: list[Divergence]
    tree: RadixTree

    @property
    def saving(self) -> float:
        """The share of tokens that sharing saves at the best."""
        return 1 - self.distinct_tokens / self.tokens if self.tokens else 0.0

    @property
    def saving_remedied(self) -> float:
        """The same with every divergence remedied."""
        saved = sum(one.saved_tokens for one in self.divergences)
        return self.saving + saved / max(self.tokens, 1)

    def as_dict(self) -> dict[str, Any]:
        """All but the tree, for JSON."""
        return {
            "prompts": self.prompts,
            "tokens": self.tokens,
            "distinct_tokens": self.distinct_tokens,
            "saving": self.saving,
            "saving_remedied": self.saving_remedied,
            "divergences": [asdict(one) for one in self.divergences],
        }


def explain(
    prompts: Sequence[Written | Sequence[int]],
    tokenizer: "PreTrainedTokenizerBase",
    templates: Sequence[Written] = (),
) -> Report:
    """What `prompts`, texts or token ids, share, and the divergences that cost most.

    `templates` are chats as the prompts are, with `BLANK` for every content: what the template writes between messages
    and behind the last is the same whatever is said, so it counts as nothing that a divergence keeps from being shared.

    Time and again the divergence that blocks the most tokens is remedied and the tree counted anew, so that one
    behind another is seen too; at most 8 are reported. Raises `InvalidRequest` for text with half of a surrogate pair.
    """
    check_texts("prompts", [one.text for one in prompts if isinstance(one, Written)])
    pieces = Pieces(tokenizer)
    cut = pieces.rows([*prompts, *templates])
    pieces.add_templates(cut[len(prompts) :])
    log = [Prompt(row, np.arange(row.size, dtype=np.int32)) for row in cut[: len(prompts)]]
    rows = [pieces.tokens_of(prompt.row) for prompt in log]
    tree = _grown(rows)
    tokens, distinct = sum(row.size for row in rows), sum(node.known for node in tree.nodes())
    del rows
    least = max(1, int(_MIN_SAVING * tokens))
    found: list[Divergence] = []
    now, left, candidates = log, distinct, divergences(pieces, log)
    for _ in range(_MAX_TRIALS):
        if not candidates or len(found) == _MAX_DIVERGENCES:
            break
        worst = candidates.pop(0)
        remedied = apply(now, worst.edits)
        fewer = _count(pieces, remedied)
        if left - fewer >= least:
            alone = distinct - _count(pieces, apply(log, worst.edits)) if found else left - fewer
            found.append(_told(pieces, log, worst, alone, left - fewer))
            now, left, candidates = remedied, fewer, divergences(pieces, remedied)
    return Report(len(log), tokens, distinct, found, tree)


def _grown(rows: Iterable[TokenArray]) -> RadixTree:
    tree = RadixTree(ExtentPool(1))
    for row in rows:
        tree.insert(row)
    return tree


def _count(pieces: Pieces, prompts: Sequence[Prompt]) -> int:
    """Distinct tokens of the prompts with what was moved behind all that is said in them."""
    return distinct_tokens(pieces.tokens_of(_whole(pieces, prompt)) for prompt in prompts)


def _whole(pieces: Pieces, prompt: Prompt) -> list[int]:
    end = prompt.row.size - pieces.tail(prompt.row)
    return [*prompt.row[:end].tolist(), *prompt.moved, *prompt.row[end:].tolist()]


def _told(pieces: Pieces, log: Sequence[Prompt], found: Found, alone: int, saved: int) -> Divergence:
    one, two = (log[edit.number].row for edit in found.examples)
    first, second = (edit.first for edit in found.examples)
    before = pieces.text_of(one[:first])
    common = common_len(found.texts)
    above = before + found.texts[0][:common] + max((_breaks(text[common:]) for text in found.texts), key=len)
    here, there = _varying(found)
    return Divergence(
        kind=found.kind,
        remedy=_REMEDIES.get(found.kind, "moved to the end"),
        line=1 + above.count("\n"),
        position=_tokens(pieces, one[:first]) + _common(pieces, one[first:], two[second:]),
        frame="" if found.kind in _REMEDIES else found.frame.strip()[:_SHOWN_CHARACTERS],
        here=here[:_SHOWN_CHARACTERS],
        there=there[:_SHOWN_CHARACTERS],
        prompts=len({edit.number for edit in found.edits}),
        variants=found.variants,
        blocked_tokens=found.blocked_tokens,
        saved_alone=alone,
        saved_tokens=saved,
    )


def _breaks(text: str) -> str:
    """The white space that `text` begins with."""
    return text[: len(text) - len(text.lstrip())]


def _varying(found: Found) -> tuple[str, str]:
    """What differs between the two texts of the example."""
    one, two = found.texts
    if found.kind in _REMEDIES:
        offset = max(0, common_len(found.texts) - 20)
        return one[offset:], two[offset:]
    differs = difference(found.texts)
    return differs.varying(one).strip(), differs.varying(two).strip()


def _tokens(pieces: Pieces, row: Row) -> int:
    return sum(pieces.tokens[piece].size for piece in row)


def _common(pieces: Pieces, one: Row, two: Row) -> int:
    return common_prefix_len(pieces.tokens_of(one), pieces.tokens_of(two))
