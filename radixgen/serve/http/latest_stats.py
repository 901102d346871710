"""An engine's `Stats`, for those who cannot wait for a step."""

import asyncio
from contextlib import suppress

from radixgen.core import RadixgenError, Stats
from radixgen.serve.http.backend import Backend

_WAIT_SECONDS = 0.005
"""For an engine that is busy: it answers between two steps."""
_IDLE_SECONDS = 1.0
"""For one that is idle"""
_WATCH_SECONDS = 1.0


class LatestStats:
    """The latest `Stats` of an engine."""

    def __init__(self, engine: Backend) -> None:
        self._engine = engine
        self._last: Stats | None = None
        self._asking: asyncio.Task[None] | None = None

    async def get(self) -> Stats | None:
        """New ones where the engine answers at once, else the last; None where there are none yet."""
        _, busy = self._engine.progress
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
        else:
            busy = True  # it has not answered yet
        await asyncio.wait({self._asking}, timeout=_WAIT_SECONDS if busy else _IDLE_SECONDS)
        return self._last

    async def watch(self) -> None:
        """Ask every second, so that the last ones are not old, until cancelled."""
        try:
            while True:
                await self.get()
                await asyncio.sleep(_WATCH_SECONDS)
        finally:
            if self._asking is not None:
                self._asking.cancel()

    async def _ask(self) -> None:
        with suppress(RadixgenError):
            self._last = await self._engine.stats()
