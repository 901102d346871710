"""Whether the engine makes progress (`/health`), and whether the server accepts requests (`/ready`)."""

import asyncio
import logging
from collections.abc import Callable

from radixgen.core import RadixgenError, RequestFailed, SamplingParams
from radixgen.engine.warm_up import announce_warm_up
from radixgen.serve.http.backend import EngineBackend

logger = logging.getLogger(__name__)

_WATCH_SECONDS = 0.25
_WARM_UP = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)


class Health:
    """Health of an engine: warm, stalled, draining."""

    def __init__(
        self,
        engine: EngineBackend,
        stall_seconds: float,
        preparer_stalled: Callable[[float], bool],
        *,
        warm_up: bool = False,
    ) -> None:
        """
        stall_seconds: seconds without progress, in spite of work, until the engine counts as stalled.
        preparer_stalled: `RequestPreparer.stalled`.
        warm_up: whether the engine runs every kind of step before it is ready.
        """
        self.warm = False
        self._whole_warm_up = warm_up
        self._warming = ""
        self._announce = announce_warm_up(logger.info)
        self.draining = False
        self._engine = engine
        self._stall_seconds = stall_seconds
        self._preparer_stalled = preparer_stalled
        self._steps = -1
        self._moved = 0.0

    @property
    def stalled(self) -> bool:
        """Whether the engine has work, and made no progress for `stall_seconds`."""
        return self._steps >= 0 and asyncio.get_running_loop().time() - self._moved > self._stall_seconds

    def look(self) -> None:
        """Check whether the engine has made progress."""
        steps, busy = self._engine.progress
        if steps != self._steps or not busy:
            self._steps, self._moved = steps, asyncio.get_running_loop().time()

    def fault(self) -> str | None:
        """Why the engine is unhealthy; None if it is healthy."""
        if self._engine.closed:
            return "the engine is closed"
        self.look()
        if self._preparer_stalled(self._stall_seconds):
            return "requests wait for threads that make no progress"
        return "the engine has work but makes no progress" if self.stalled else None

    def unready(self) -> str | None:
        """Why the server should get no requests; None if it is ready."""
        if self.draining:
            return "the server is shutting down"
        return self.fault() or (None if self.warm else f"the model is warming up{self._warming}")

    async def watch(self) -> None:
        """Warm the engine up, then check its progress until cancelled."""
        try:
            if self._whole_warm_up:
                await self._engine.warm_up(self._note)
            await self._warm_up()
        except RadixgenError as error:
            logger.warning("warming up failed: %s", error)
        self.warm = True
        while True:
            self.look()
            await asyncio.sleep(_WATCH_SECONDS)

    def _note(self, done: int, total: int) -> None:
        """Report the progress of warming up, in `/ready` and the log."""
        self._warming = f": {done} of {total}"
        self._announce(done, total)

    async def _warm_up(self) -> None:
        """Run a short request, so that compilation and capture happen before real ones; drop it from the cache."""
        tokens = self._engine.inputs.tokenize([0])
        outputs = await self._engine.open(tokens, _WARM_UP, priority=0, namespace="warm-up", timeout=None)
        try:
            async for output in outputs:
                for completion in output.outputs:
                    if completion.finish_reason == "error":
                        raise RequestFailed(str(completion.stop_reason))
        finally:
            await outputs.aclose()
        await self._engine.reset_prefix_cache()
