"""Analysis of logged prompts: what keeps them from sharing longer prefixes. Requires only a tokenizer.

pieces       prompts as sequences of lines, each tokenized once
kinds        kinds of differences between texts: timestamps, ids, numbers, order, white space
divergences  places where prompts with equal continuations diverge, and edits that remove them
segments     what runs that are no prefix would save
reading      what a reading policy leaves unread; the only part that requires the model
show         the reports in the terminal
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from radixgen.cache import ExtentPool, RadixTree, TokenArray, common_prefix_len
from radixgen.core import SegmentReuse, check_texts
from radixgen.explain.divergences import DivergenceGroup, EditedPrompt, apply, divergences
from radixgen.explain.kinds import Kind, common_len, difference
from radixgen.explain.pieces import BLANK, Pieces, PromptText, Row, distinct_tokens
from radixgen.explain.segments import moved_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["BLANK", "Divergence", "PromptText", "Report", "explain"]

_MAX_DIVERGENCES = 8
_MAX_TRIALS = 12
_MIN_SAVING = 0.0025
"""Fraction of all tokens that a divergence must cost to be reported"""
_SHOWN_CHARACTERS = 120
_REMEDIES: dict[Kind, str] = {"white space": "made the same", "order": "brought into one order"}


@dataclass(frozen=True, slots=True)
class Divergence:
    """A way in which prompts diverge, and its cost."""

    kind: Kind
    remedy: str
    """How the varying text was changed to compute the savings: `moved to the end`, or made equal"""
    line: int
    """Line of the prompt's text where it varies, from 1; for chats, of the text that the template renders"""
    position: int
    """Index of the first token that differs, in one of the prompts"""
    frame: str
    """Constant text around the varying text; empty for white space and order"""
    here: str
    there: str
    """The varying text in two of the prompts"""
    prompts: int
    """Number of prompts that contain it"""
    variants: int
    """Number of different texts in its place"""
    blocked_tokens: int
    """Number of tokens after it that repeat those after another variant"""
    saved_alone: int
    """Number of distinct tokens that its remedy saves"""
    saved_tokens: int
    """Number of distinct tokens that its remedy saves in addition to all divergences reported before it"""


@dataclass(frozen=True, slots=True)
class Report:
    """What logged prompts share, and what they could share.

    `tree` contains every prompt; the locks of a node are the prompts that end there.
    """

    prompts: int
    tokens: int
    distinct_tokens: int
    """Number of tokens in the tree, which have to be computed if nothing is evicted"""
    moved_tokens: int
    """Number of distinct tokens that `reuse="segments"` would copy from other positions, instead of computing them"""
    inexact_prompts: int
    """Number of prompts for which it would do so"""
    divergences: list[Divergence]
    tree: RadixTree

    @property
    def saving_segments(self) -> float:
        """Fraction of tokens that sharing would save with `reuse="segments"`, whose outputs are inexact."""
        return self.saving + self.moved_tokens / max(self.tokens, 1)

    @property
    def saving(self) -> float:
        """Fraction of tokens that sharing saves, if nothing is evicted."""
        return 1 - self.distinct_tokens / self.tokens if self.tokens else 0.0

    @property
    def saving_remedied(self) -> float:
        """Fraction of tokens that sharing would save with every divergence remedied."""
        saved = sum(divergence.saved_tokens for divergence in self.divergences)
        return self.saving + saved / max(self.tokens, 1)

    def as_dict(self) -> dict[str, Any]:
        """Everything except the tree, for JSON."""
        return {
            "prompts": self.prompts,
            "tokens": self.tokens,
            "distinct_tokens": self.distinct_tokens,
            "saving": self.saving,
            "saving_remedied": self.saving_remedied,
            "moved_tokens": self.moved_tokens,
            "inexact_prompts": self.inexact_prompts,
            "saving_segments": self.saving_segments,
            "divergences": [asdict(divergence) for divergence in self.divergences],
        }


def explain(
    prompts: Sequence[PromptText | Sequence[int]],
    tokenizer: "PreTrainedTokenizerBase",
    templates: Sequence[PromptText] = (),
) -> Report:
    """Analyze which prefixes `prompts` share, and which divergences cost most. Returns at most 8 divergences.

    prompts: texts or token ids.
    templates: chats with `BLANK` as the content of each message. What the template writes around contents is the same
        in all prompts, so a divergence before it does not count as blocking it.

    The divergence that blocks the most tokens is remedied and the tree counted again, repeatedly, so that divergences
    behind it are found too. Raises `InvalidRequest` for text with lone surrogates.
    """
    check_texts("prompts", [prompt.text for prompt in prompts if isinstance(prompt, PromptText)])
    pieces = Pieces(tokenizer)
    cut = pieces.rows([*prompts, *templates])
    pieces.add_templates(cut[len(prompts) :])
    log = [EditedPrompt(row, np.arange(row.size, dtype=np.int32)) for row in cut[: len(prompts)]]
    rows = [pieces.tokens_of(prompt.row) for prompt in log]
    tree = _build_tree(rows)
    moved, inexact = moved_tokens(rows, SegmentReuse())
    tokens, distinct = sum(row.size for row in rows), sum(node.known for node in tree.nodes())
    del rows
    least = max(1, int(_MIN_SAVING * tokens))
    reported: list[Divergence] = []
    current, remaining, candidates = log, distinct, divergences(pieces, log)
    for _ in range(_MAX_TRIALS):
        if not candidates or len(reported) == _MAX_DIVERGENCES:
            break
        worst = candidates.pop(0)
        remedied = apply(current, worst.edits)
        saved = remaining - _count(pieces, remedied)
        if saved >= least:
            alone = distinct - _count(pieces, apply(log, worst.edits)) if reported else saved
            reported.append(_describe(pieces, log, worst, alone, saved))
            current, remaining, candidates = remedied, remaining - saved, divergences(pieces, remedied)
    return Report(len(log), tokens, distinct, moved, inexact, reported, tree)


def _build_tree(rows: Iterable[TokenArray]) -> RadixTree:
    tree = RadixTree(ExtentPool(1))
    for row in rows:
        tree.insert(row)
    return tree


def _count(pieces: Pieces, prompts: Sequence[EditedPrompt]) -> int:
    """Number of distinct tokens of edited prompts."""
    return distinct_tokens(pieces.tokens_of(_whole(pieces, prompt)) for prompt in prompts)


def _whole(pieces: Pieces, prompt: EditedPrompt) -> list[int]:
    """Pieces of a prompt, with moved pieces before the template's tail."""
    end = prompt.row.size - pieces.tail(prompt.row)
    return [*prompt.row[:end].tolist(), *prompt.moved, *prompt.row[end:].tolist()]


def _describe(
    pieces: Pieces, log: Sequence[EditedPrompt], group: DivergenceGroup, alone: int, saved: int
) -> Divergence:
    here_row, there_row = (log[edit.number].row for edit in group.examples)
    first, second = (edit.first for edit in group.examples)
    before = pieces.text_of(here_row[:first])
    common = common_len(group.texts)
    above = before + group.texts[0][:common] + max((_breaks(text[common:]) for text in group.texts), key=len)
    here, there = _varying(group)
    return Divergence(
        kind=group.kind,
        remedy=_REMEDIES.get(group.kind, "moved to the end"),
        line=1 + above.count("\n"),
        position=_tokens(pieces, here_row[:first]) + _common(pieces, here_row[first:], there_row[second:]),
        frame="" if group.kind in _REMEDIES else group.frame.strip()[:_SHOWN_CHARACTERS],
        here=here[:_SHOWN_CHARACTERS],
        there=there[:_SHOWN_CHARACTERS],
        prompts=len({edit.number for edit in group.edits}),
        variants=group.variants,
        blocked_tokens=group.blocked_tokens,
        saved_alone=alone,
        saved_tokens=saved,
    )


def _breaks(text: str) -> str:
    """Leading white space of `text`."""
    return text[: len(text) - len(text.lstrip())]


def _varying(group: DivergenceGroup) -> tuple[str, str]:
    """The parts in which the second example texts differ."""
    first, second = group.texts
    if group.kind in _REMEDIES:
        offset = max(0, common_len(group.texts) - 20)
        return first[offset:], second[offset:]
    differs = difference(group.texts)
    return differs.varying(first).strip(), differs.varying(second).strip()


def _tokens(pieces: Pieces, row: Row) -> int:
    return sum(pieces.tokens[piece].size for piece in row)


def _common(pieces: Pieces, first: Row, second: Row) -> int:
    return common_prefix_len(pieces.tokens_of(first), pieces.tokens_of(second))
