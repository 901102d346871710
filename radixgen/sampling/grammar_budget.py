"""Time budget of grammars in shared steps, so that slow masks cost their own request only."""

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager

from radixgen.core import GrammarFailed
from radixgen.scheduler.sequence import Request, Sequence

LEAST_SECONDS = 0.01
"""Time that all grammars of a step may take, however short the step."""
MOST_DEBT = 0.1
"""Maximum debt of a request in seconds."""
MOST_ALONE = 0.25
"""Time that a grammar may take per step if there is no other request."""


class GrammarBudget:
    """Limits the time that grammars take per step.

    In each step, all grammars together may take as long as everything else did, or 10 ms, in equal shares per request
    with a grammar. If they take longer, each request's excess over its share is added to its debt, which is reduced by
    unused parts of later shares. A request with a debt above 100 ms ends with `GrammarFailed`.

    If there is only one request, it has no debt and may take 250 ms per step. Time is processor time, so that requests
    do not fail because the machine is busy.
    """

    def __init__(
        self, clock: Callable[[], float] = time.thread_time, wall: Callable[[], float] = time.perf_counter
    ) -> None:
        """`clock`: seconds that grammars take; `wall`: seconds that steps take."""
        self._clock = clock
        self._wall = wall
        self._begun = 0.0
        self._allowed = 0.0
        self._taken: dict[Request, float] = {}
        """Seconds in this step, by request."""

    def begin_step(self) -> None:
        self._begun = self._wall()
        self._taken.clear()

    def compute_masks(self, sequences: Seq[Sequence], *, alone: bool) -> dict[int, str]:
        """Compute the masks of all sequences. Returns the reasons why sequences must end, by index.

        `alone`: whether the engine has no other request.
        """
        self._allowed = max(LEAST_SECONDS, self._wall() - self._begun)
        faults: dict[int, str] = {}
        for place, sequence in enumerate(sequences):
            grammar = sequence.sampling.grammar
            if grammar is None or sequence.finish_reason is not None:
                continue
            try:
                self._check(sequence.request, alone)
                with self.counted(sequence.request):
                    grammar.allowed()
            except Exception as error:
                faults[place] = repr(error)
        return faults

    @contextmanager
    def counted(self, request: Request) -> Iterator[None]:
        """Add the time of the context to the request's."""
        begin = self._clock()
        try:
            yield
        finally:
            self._taken[request] = self._taken.get(request, 0.0) + self._clock() - begin

    def end_step(self, *, alone: bool) -> None:
        """Update debts by the time that the step's grammars took."""
        share, over = self._allowed / max(len(self._taken), 1), sum(self._taken.values()) > self._allowed
        for request, taken in self._taken.items():
            if (over and not alone) or taken < share:
                request.grammar_debt = max(request.grammar_debt + taken - share, 0.0)

    def _check(self, request: Request, alone: bool) -> None:
        """Raise `GrammarFailed` if the request has taken too much time."""
        taken = self._taken.get(request, 0.0)
        if alone:
            if taken > MOST_ALONE:
                raise GrammarFailed(f"its masks took {1e3 * taken:.0f} ms of one step, at most {1e3 * MOST_ALONE:g} ms")
            return
        debt = request.grammar_debt + max(taken - self._allowed, 0.0)
        if debt > MOST_DEBT:
            limit = f"at most {1e3 * MOST_DEBT:g} ms"
            raise GrammarFailed(f"its masks took {1e3 * debt:.0f} ms more than its share of the steps, {limit}")
