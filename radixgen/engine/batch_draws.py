"""`BatchDraws`: draws a token for each sequence of a step, all at once, or one by one if that fails."""

import logging
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq

from radixgen.core import EngineDead
from radixgen.kernels.drawable_tokens import DrawableTokens
from radixgen.model.base import Logits
from radixgen.sampling.sampler import PendingTokens, SamplerOutput, draw, report, sample
from radixgen.scheduler.sequence import Sequence

logger = logging.getLogger(__name__)

DrawListener = Callable[[Seq[Sequence], Logits, Seq[int]], None]
"""Called with the sequences of a step, its logits `[n, vocab]`, and the row of the logits for each sequence."""


class BatchDraws:
    """The draws of a step, while they run on the device. If a draw fails, only its own sequence gets no token.

    Raises `EngineDead` if ranks can no longer draw together.
    """

    def __init__(
        self,
        logits: Logits,
        rows: Seq[int],
        sequences: Seq[Sequence],
        drawable: DrawableTokens | None,
        faults: Mapping[int, str],
        listener: DrawListener | None = None,
    ) -> None:
        """
        logits: `[n, vocab]`.
        rows: logits row of each sequence.
        faults: error by index, for sequences that must end without a draw.
        """
        if listener is not None:
            listener(sequences, logits, rows)
        self._logits = logits
        self._sequences = sequences
        self._drawable = drawable
        self._faults = faults
        self._places = [place for place in range(len(sequences)) if place not in faults]
        self._rows = [rows[place] for place in self._places]
        self._states = [sequences[place].sampling for place in self._places]
        self._draws: PendingTokens | None = None
        try:
            self._draws = draw(logits, self._rows, self._states, drawable)
        except EngineDead:
            raise
        except Exception:
            logger.exception("drawing %d tokens at once failed; drawing them one by one", len(self._places))

    @property
    def all(self) -> PendingTokens | None:
        """The tokens on the device; None unless every sequence has a draw and none failed."""
        return None if self._faults else self._draws

    def wait(self) -> SamplerOutput:
        """Wait for the draws. Returns a token for each sequence, -1 if it has none."""
        if self._draws is None:
            return self._draw_each()
        drawn = report(self._logits, self._rows, self._states, self._draws.wait())
        if not self._faults:
            return drawn
        tokens = [-1] * len(self._sequences)
        for place, token in zip(self._places, drawn.tokens, strict=True):
            tokens[place] = token
        logprobs = {self._places[index]: logprobs for index, logprobs in drawn.logprobs.items()}
        return SamplerOutput(tokens, logprobs, dict(self._faults))

    def _draw_each(self) -> SamplerOutput:
        drawn = SamplerOutput([-1] * len(self._sequences), {}, dict(self._faults))
        for place, row, state in zip(self._places, self._rows, self._states, strict=True):
            try:
                single = sample(self._logits, [row], [state], self._drawable)
            except EngineDead:
                raise
            except Exception as error:
                logger.exception("request %s could not be sampled", self._sequences[place].request.id)
                drawn.faults[place] = repr(error)
                continue
            drawn.tokens[place] = single.tokens[0]
            if single.logprobs:
                drawn.logprobs[place] = single.logprobs[0]
        return drawn
