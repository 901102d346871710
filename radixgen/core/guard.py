"""Whether the state that several calls change is whole: a change that was cut short must never be built upon."""

from types import TracebackType

from radixgen.core.errors import EngineDead, LimitReached


class StateGuard:
    """Surrounds each change of an engine, `with guard:`; changes do not nest.

    An exception that leaves a change, `KeyboardInterrupt` too, leaves the state half changed: from then on `require`
    and every further change raise `EngineDead`, which names that exception. Two kinds do not: `LimitReached`, raised
    before anything is changed, and whatever is raised after `undone`. The mark is set before a change and taken back
    after it, so that it also holds where an interrupt arrives while another exception is handled.
    """

    def __init__(self) -> None:
        self.broken = False
        """Whether a change was begun and has not come to its end."""
        self._error: BaseException | None = None

    def require(self) -> None:
        """Raise `EngineDead` unless the state is whole."""
        if self.broken:
            raise EngineDead(self._reason()) from self._error

    def undone(self) -> None:
        """The change was taken back whole; the exception that is on its way out leaves nothing behind."""
        self.broken = False

    def _reason(self) -> str:
        if isinstance(self._error, EngineDead):
            return str(self._error)
        return f"the engine failed: {self._error!r}" if self._error else "the engine failed: a call was cut short"

    def __enter__(self) -> None:
        self.require()
        self.broken = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, LimitReached):
            self.broken = False
        elif self.broken:
            self._error = error
