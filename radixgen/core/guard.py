"""Detection of interrupted changes, so that nothing builds on a half-changed state."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from radixgen.core.errors import EngineDead, LimitReached


class StateGuard:
    """A context manager around each change of an engine. Changes do not nest.

    If an exception leaves a change, `KeyboardInterrupt` included, the state may be half changed. From then on `require`
    and all further changes raise `EngineDead`, naming that exception. Exempt are `LimitReached`, which is raised before
    anything is changed, and exceptions raised after `undone`. The mark is set before a change and removed after it, so
    that it holds even if an interrupt arrives while another exception is handled.
    """

    def __init__(self) -> None:
        self.broken = False
        """Whether a change began and did not finish."""
        self._error: BaseException | None = None

    def require(self) -> None:
        """Raise `EngineDead` if a change was interrupted."""
        if self.broken:
            raise EngineDead(self._reason()) from self._error

    def undone(self) -> None:
        """Declare that the current change was undone completely, so that the exception on its way out is harmless."""
        self.broken = False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Enclose a wait within a change, with the state whole: an interrupt there is harmless."""
        try:
            yield
        except Exception:
            raise
        except BaseException:
            self.undone()
            raise

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
