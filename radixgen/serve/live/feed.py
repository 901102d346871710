"""`Feed`: reads the tree periodically for all viewers, and only while there are viewers."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from functools import partial

from radixgen.core import EngineClosed, LimitReached, Limits
from radixgen.engine.async_engine import AsyncEngine
from radixgen.serve.live.frames import EMPTY, Frame, TreeReader, figures
from radixgen.serve.live.texts import MAX_TOKENS, Decode, Texts, plain, text_of

logger = logging.getLogger(__name__)

INTERVAL = 0.125
"""Minimum number of seconds between frames"""
_SHARE = 0.02
"""Maximum fraction of the engine's time that is spent reading the tree"""
_HEARTBEAT = 1.0
"""Maximum number of seconds between frames, even if nothing changed"""
_KEPT = 16
"""Number of differences that are kept for slow viewers; slower ones get a whole frame"""
_MAX_NAME = 64
"""Maximum length of a displayed namespace, in characters"""


class Feed:
    """Frames of an engine's tree, as JSON, for up to `limits.max_viewers` viewers of one event loop.

    Viewers pull: each gets the differences that it lacks, or a whole frame if those are no longer kept. A slow viewer
    delays no other and takes no memory.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        limits: Limits | None = None,
        *,
        interval: float = INTERVAL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits or Limits()
        self.num_readings = 0
        self._engine = engine
        self._interval = interval
        self._clock = clock
        self._viewers = 0
        self._closed = False
        self._seq = 0
        self._task: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self._clear()

    @property
    def num_viewers(self) -> int:
        """Number of current viewers."""
        return self._viewers

    @contextmanager
    def viewer(self) -> Iterator[AsyncGenerator[bytes, None]]:
        """Add a viewer; yields a whole frame, then differences, until the feed or the engine is closed.

        Raises `LimitReached` if there are too many viewers.
        """
        if self._viewers >= self.limits.max_viewers:
            limit = f"at most {self.limits.max_viewers} watch at the same time"
            raise LimitReached("viewers", self._viewers + 1, limit)
        self._viewers += 1
        try:
            if self._task is None and not self._closed:
                self._task = asyncio.create_task(self._run())
            yield self._frames()
        finally:
            self._viewers -= 1
            if not self._viewers:
                self._stop()

    def close(self) -> None:
        """End the streams of all viewers. Call it in their event loop."""
        self._closed = True
        self._stop()
        self._wake()

    # -- inside -------------------------------------------------------------------------------------------

    async def _frames(self) -> AsyncGenerator[bytes, None]:
        seen = 0
        while not self._closed:
            messages = self._since(seen)
            for seq, message in messages:
                seen = seq
                yield message
            if not messages:
                await self._news.wait()

    def _clear(self) -> None:
        self._reader = TreeReader(self.limits)
        self._texts = Texts(self.limits)
        self._table = EMPTY
        self._namespaces: dict[int, str] = {}
        self._last: Frame | None = None
        self._whole: bytes | None = None
        self._differences: deque[tuple[int, bytes]] = deque(maxlen=_KEPT)

    def _stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self._clear()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def _since(self, seen: int) -> list[tuple[int, bytes]]:
        """Messages that bring a viewer from frame `seen`, or from none (0), to the last frame."""
        if self._last is None or seen == self._seq:
            return []
        if seen and self._differences and self._differences[0][0] <= seen + 1:
            return [difference for difference in self._differences if difference[0] > seen]
        if self._whole is None:
            rows, texts, numbers = self._table.rows(), self._texts.whole(), self._last.figures
            whole = Frame(self._seq, self._last.time, True, rows, [], texts, self._namespaces, numbers)
            self._whole = whole.encode()
        return [(self._seq, self._whole)]

    async def _run(self) -> None:
        try:
            while True:
                begin = self._clock()
                await self._tick(self._engine.inputs.decode)
                due = begin + max(self._interval, self._reader.seconds / _SHARE)
                await asyncio.sleep(max(due - self._clock(), self._interval / 4))
        except EngineClosed:
            self._closed = True
        except Exception:
            logger.exception("the live page's feed failed")
            self._closed = True
        self._wake()

    async def _tick(self, decode: Decode) -> None:
        """Read the tree, and publish a frame of its changes."""
        wanted = self._texts.wanted()
        read_tree = partial(self._reader.read, wanted=wanted, max_tokens=MAX_TOKENS)
        reading = await asyncio.wrap_future(self._engine.inspect(read_tree))
        self.num_readings += 1
        captured = reading.captured
        read = await asyncio.to_thread(lambda: [(c, text_of(c, decode)) for c in captured]) if captured else []
        before, self._table = self._table, reading.table()
        changed, gone = self._table.since(before)
        fresh = zip(reading.fresh, self._table.known(reading.fresh), strict=True)
        self._texts.update(fresh, ((row.id, row.known) for row in changed), gone)
        texts = self._texts.learn(read)
        names = {node_id: plain(name[:_MAX_NAME]) for node_id, name in reading.namespaces.items()}
        for node_id in (*gone, *reading.fresh):
            self._namespaces.pop(node_id, None)
        self._namespaces |= names
        now, numbers = self._clock(), figures(reading.stats, reading.num_nodes)
        last = self._last
        if last and not (changed or gone or texts) and numbers == last.figures and now < last.time + _HEARTBEAT:
            return
        self._seq += 1
        self._last = Frame(self._seq, now, False, changed, gone, texts, names, numbers)
        self._whole = None
        self._differences.append((self._seq, self._last.encode()))
        self._wake()
