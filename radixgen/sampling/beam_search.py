"""Beam search over one prompt: selection of beams and hypotheses. Works on numbers only, without model or tree.

The rules are those of transformers' `generate(num_beams=width, do_sample=False)` for one prompt. Scores are float32, as
there, so that sums are rounded alike.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from radixgen.core import BeamSearchParams, FinishReason


class Choices(NamedTuple):
    """The most likely tokens after one beam, most likely first."""

    log_probs: NDArray[np.float32]
    """`[k]`, natural logarithm."""
    token_ids: NDArray[np.int64]
    """`[k]`"""


class Beam(NamedTuple):
    """A beam that continues. `score` is the sum of the natural-log probabilities of its tokens."""

    parent: int
    """Index among the beams of the previous generation."""
    token_ids: list[int]
    score: np.float32


class Hypothesis(NamedTuple):
    """A beam that has ended. `score` is `cumulative_logprob / len(token_ids) ** length_penalty`."""

    token_ids: list[int]
    cumulative_logprob: float
    score: float
    finish_reason: FinishReason


class BeamSearch:
    """The beams of one prompt and its hypotheses, both best first.

    Each `select` is one generation. Of all candidate tokens after all beams, the `width` best that are not end tokens
    continue. End tokens among the `width` best candidates make hypotheses, which are kept while they are among the
    `width` best. A search of width 1 ends with its first hypothesis: it is greedy decoding.
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
        """Candidate tokens needed per beam: the `width` best that are not end tokens, plus all end tokens."""
        return self._params.beam_width + len(self._stop_ids)

    def select(self, choices: Sequence[Choices]) -> list[Beam]:
        """Return the beams that continue, given the `num_choices` most likely tokens of each beam, or the whole
        vocabulary.

        Ties are ordered by the better beam, then the more likely token, then the order in `choices`.
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
        """End the search: the beams become hypotheses, and all get this finish reason."""
        for beam in self.beams:
            self._keep(beam, reason)
        self.hypotheses = [hypothesis._replace(finish_reason=reason) for hypothesis in self.hypotheses]
        self.beams, self.done = [], True

    def _candidates(self, choices: Sequence[Choices]) -> Iterator[Beam]:
        """Yield the candidates after all beams, best first."""
        log_probs = np.stack([choice.log_probs for choice in choices])
        token_ids = np.stack([choice.token_ids for choice in choices])
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
        """Make `beam` a hypothesis if it is among the `width` best. Of equal ones the earlier is better."""
        score = self._normalized(beam.score, len(beam.token_ids))
        new = Hypothesis(beam.token_ids, float(beam.score), score, reason)
        best = sorted([*self.hypotheses, new], key=lambda hypothesis: hypothesis.score, reverse=True)
        self.hypotheses = best[: self._params.beam_width]

    def _improvable(self) -> bool:
        """Return whether the best beam may still beat the worst hypothesis, by the rule of `early_stopping`."""
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
