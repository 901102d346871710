"""Inboxes of requests and calls: the front end's thread puts items in, threads or coroutines take them out."""

import asyncio
import queue
from collections import deque
from contextlib import suppress

from radixgen.core import RadixgenError, RequestFailed
from radixgen.serve.zmq import wire

Item = wire.Output | wire.Reply | RadixgenError


class ThreadInbox:
    """Inbox that a thread reads."""

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[Item] = queue.SimpleQueue()

    def put(self, item: Item) -> None:
        self._items.put(item)

    def get(self, timeout: float | None = None) -> wire.Output | wire.Reply:
        """Wait for the next item. Raises it if it is an error, and `RequestFailed` after `timeout` seconds."""
        try:
            item = self._items.get(timeout=timeout)
        except queue.Empty:
            raise RequestFailed(f"no answer within {timeout:g} seconds") from None
        if isinstance(item, RadixgenError):
            raise item
        return item


class Courier:
    """Passes items from the front end's thread to an event loop, which it wakes once for many items."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: deque[tuple[asyncio.Queue[Item], Item]] = deque()
        self._called = False

    def pass_on(self, inbox: "asyncio.Queue[Item]", item: Item) -> None:
        """Have the event loop put `item` into `inbox`. Called from the front end's thread."""
        self._items.append((inbox, item))
        if not self._called:
            self._called = True
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._called = False
        while self._items:
            inbox, item = self._items.popleft()
            inbox.put_nowait(item)


class CoroutineInbox:
    """Inbox that a coroutine reads."""

    def __init__(self, courier: Courier) -> None:
        self._courier = courier
        self._items: asyncio.Queue[Item] = asyncio.Queue()

    def put(self, item: Item) -> None:
        self._courier.pass_on(self._items, item)

    async def get(self) -> wire.Output | wire.Reply:
        """Wait for the next item. Raises it if it is an error."""
        item = await self._items.get()
        if isinstance(item, RadixgenError):
            raise item
        return item
