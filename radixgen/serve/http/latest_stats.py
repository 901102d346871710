"""Latest `Stats` of an engine, without waiting for a long step."""

import asyncio
from contextlib import suppress

from radixgen.core import RadixgenError, Stats
from radixgen.serve.http.backend import EngineBackend

_WAIT_SECONDS = 0.005
"""Time to wait for a busy engine, which answers between two steps"""
_IDLE_SECONDS = 1.0
"""Time to wait for an idle engine"""
_WATCH_SECONDS = 1.0


class LatestStats:
    """Cache of an engine's `Stats`."""

    def __init__(self, engine: EngineBackend) -> None:
        self._engine = engine
        self._last: Stats | None = None
        self._update: asyncio.Task[None] | None = None

    async def get(self) -> Stats | None:
        """New stats if the engine answers quickly, else the last ones; None if there are none yet."""
        _, busy = self._engine.progress
        if self._update is None or self._update.done():
            self._update = asyncio.create_task(self._fetch())
        else:
            busy = True  # it has not answered yet
        await asyncio.wait({self._update}, timeout=_WAIT_SECONDS if busy else _IDLE_SECONDS)
        return self._last

    async def watch(self) -> None:
        """Update the stats every second, until cancelled."""
        try:
            while True:
                await self.get()
                await asyncio.sleep(_WATCH_SECONDS)
        finally:
            if self._update is not None:
                self._update.cancel()

    async def _fetch(self) -> None:
        with suppress(RadixgenError):
            self._last = await self._engine.stats()
