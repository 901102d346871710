"""Beam search over one prompt: which beams go on, and which hypotheses are kept. Numbers alone, no model and no tree.

The rules are those of transformers' `generate(num_beams=width, do_sample=False)`, for one prompt. Scores are float32,
as there, so that long sums are rounded alike.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from radixgen.core import BeamSearchParams, FinishReason


class Choices(NamedTuple):
    """The likeliest tokens after one beam, the likeliest first."""

    log_probs: NDArray[np.float32]
    """`[k]`, natural logarithm"""
    token_ids: NDArray[np.int64]
    """`[k]`"""


class Beam(NamedTuple):
    """What goes on: `score` is the sum of the natural-log probabilities of its tokens."""

    parent: int
    """Its place among the beams of the generation before"""
    token_ids: list[int]
    score: np.float32


class Hypothesis(NamedTuple):
    """What has ended: `score` is `cumulative_logprob` divided by `len(token_ids) ** length_penalty`."""

    token_ids: list[int]
    cumulative_logprob: float
    score: float
    finish_reason: FinishReason


class BeamSearch:
    """The beams of one prompt and its hypotheses, both best first.

    Each `select` is one generation: of all the tokens that may follow all beams, the `width` best that end nothing go
    on, and those of the `width` best that end a hypothesis are kept as long as `width` others are not better. A search
    of width 1 ends with its first hypothesis: it is greedy decoding.
    """

    def __init__(self, params: BeamSearchParams, max_tokens: int, stop_ids: frozenset[int]) -> None:
        self.beams = [Beam(0, [], np.float32(0))]
        self.hypotheses: list[Hypothesis] = []
        self.done = False
        self._params = params
        self._max_tokens = max_tokens
        self._stop_ids = stop_ids
        self._length = 0

    @property
    def num_choices(self) -> int:
        """The tokens that can matter after one beam: those of the `width` best that end nothing, and all that do."""
        return self._params.beam_width + len(self._stop_ids)

    def select(self, choices: Sequence[Choices]) -> list[Beam]:
        """The beams that go on, given for each beam its `num_choices` likeliest tokens, or the whole vocabulary.

        Of equal candidates the one after the better beam goes first, then the likelier, then the one named first.
        """
        assert not self.done and len(choices) == len(self.beams)
        self._length += 1
        width, at_end = self._params.beam_width, self._length == self._max_tokens
        going: list[Beam] = []
        for place, beam in enumerate(self._candidates(choices)):
            if place >= width and (at_end or len(going) == width):
                break
            stops = beam.token_ids[-1] in self._stop_ids
            if not (stops or at_end):
                going.append(beam)
            elif place < width:
                self._keep(beam, "stop" if stops else "length")
        self.beams = going
        self.done = at_end or not going or not self._improvable()
        return self.beams

    def close(self, reason: FinishReason) -> None:
        """End the search where it stands: the beams count as hypotheses, and all end for this reason."""
        for beam in self.beams:
            self._keep(beam, reason)
        self.hypotheses = [one._replace(finish_reason=reason) for one in self.hypotheses]
        self.beams, self.done = [], True

    def _candidates(self, choices: Sequence[Choices]) -> Iterator[Beam]:
        """What may follow the beams, best first."""
        log_probs = np.stack([one.log_probs for one in choices])
        token_ids = np.stack([one.token_ids for one in choices])
        scores = log_probs + np.array([beam.score for beam in self.beams], np.float32)[:, None]
        if self._length <= self._params.min_tokens:
            held_back = np.isin(token_ids, list(self._stop_ids))
            if (scores[~held_back] > -np.inf).any():
                scores[held_back] = -np.inf
        for place in np.argsort(-scores, axis=None, kind="stable").tolist():
            parent, column = divmod(place, scores.shape[1])
            if scores[parent, column] == -np.inf:
                return
            tokens = [*self.beams[parent].token_ids, int(token_ids[parent, column])]
            yield Beam(parent, tokens, scores[parent, column])

    def _keep(self, beam: Beam, reason: FinishReason) -> None:
        """Make a hypothesis of `beam`, if it is one of the `width` best; of equal ones the earlier goes first."""
        score = self._normalized(beam.score, len(beam.token_ids))
        new = Hypothesis(beam.token_ids, float(beam.score), score, reason)
        best = sorted([*self.hypotheses, new], key=lambda one: one.score, reverse=True)
        self.hypotheses = best[: self._params.beam_width]

    def _improvable(self) -> bool:
        """Whether the best beam could still end better than the worst hypothesis, as `early_stopping` guesses it."""
        params = self._params
        if len(self.hypotheses) < params.beam_width:
            return True
        if params.early_stopping is True or params.beam_width == 1:
            return False
        longest = params.early_stopping == "never" and params.length_penalty > 0
        best = self._normalized(self.beams[0].score, self._max_tokens if longest else self._length)
        return best > self.hypotheses[-1].score

    def _normalized(self, score: np.float32, length: int) -> float:
        divisor: float = max(length, 1) ** self._params.length_penalty
        return float(score) / divisor
