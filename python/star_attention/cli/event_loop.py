"""An event loop beside a program that waits for people."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from concurrent.futures import wait
from contextlib import aclosing, contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")
_END = object()


class EventLoop:
    """Runs in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Item]) -> Item:
        """What a coroutine returns."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    @contextmanager
    def iterate(self, items: AsyncGenerator[Item, None]) -> Iterator[Iterator[Item]]:
        """The items of an asynchronous generator, which is closed afterwards."""
        arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()

        async def pump() -> None:
            try:
                async with aclosing(items):
                    async for item in items:
                        arrived.put(item)
            finally:
                arrived.put(_END)

        def pumped() -> Iterator[Item]:
            while (item := arrived.get()) is not _END:
                yield item
            pumping.result()

        pumping = asyncio.run_coroutine_threadsafe(pump(), self._loop)
        try:
            yield pumped()
        finally:
            pumping.cancel()
            wait([pumping])

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
