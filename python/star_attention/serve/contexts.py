"""Named contexts: who they are, whether they are read, and when they end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np

from star_attention.errors import UserError
from star_attention.runtime.saved_contexts import SavedContext, SavedContexts
from star_attention.serve.answers import blocks_as_json
from star_attention.serve.api import ContextPatch
from star_attention.serve.engine import EngineLostError
from star_attention.serve.errors import ApiError, as_api_error, internal_error
from star_attention.serve.front import Front
from star_attention.serve.messages import Opened, Progress, ReadDone
from star_attention.serve.metrics import done_at_first, share_read

logger = logging.getLogger("star_attention.serve")

# Seconds between looks at what has expired, and at whether the engine is back.
_TICK = 0.5

Entered = TypeVar("Entered")


@dataclass(eq=False)
class Context:
    """Attributes:
    expires_at: `ttl_seconds` after it was made or asked last; None: never.
    questions: that were asked over it.
    asking: that are being answered.
    done: how far it is read, 0 to 1 for each block of `opened`.
    failure: why its reading failed.
    is_unsaved: what changed is not on disk yet.
    changed: set, and replaced, when any of this changes.
    changing: held by who changes what it is to be.
    """

    name: str
    token_ids: np.ndarray
    bytes: int
    files: list[dict[str, Any]]
    pinned: bool
    ttl_seconds: float | None
    created: float = field(default_factory=time.time)
    last_used: float | None = None
    expires_at: float | None = None
    status: Literal["reading", "ready", "failed"] = "reading"
    opened: Opened | None = None
    done: tuple[float, ...] = ()
    questions: int = 0
    asking: int = 0
    failure: Exception | None = None
    is_unsaved: bool = False
    has_saved_tokens: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    task: asyncio.Task | None = None

    def __post_init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Its time to live begins anew."""
        self.expires_at = None if self.ttl_seconds is None else time.time() + self.ttl_seconds

    def notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "context",
            "created": int(self.created),
            "tokens": len(self.token_ids),
            "bytes": self.bytes,
            "files": self.files,
            "status": self.status,
            "error": self._error(),
            "pinned": self.pinned,
            "ttl_seconds": self.ttl_seconds,
            "expires_at": self.expires_at,
            "blocks": blocks_as_json(self.opened.blocks) if self.opened else [],
            "questions": self.questions,
            "last_used": self.last_used,
        }

    def _error(self) -> str | None:
        if self.failure is None:
            return None
        return (as_api_error(self.failure) or internal_error()).message


class Contexts:
    """All named contexts. A pinned one's KV is held on the ranks, and read again when they were
    started again."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._by_name: dict[str, Context] = {}
        folder = front.options.context_dir
        self._saved = SavedContexts(folder / "contexts", front.tokenizer) if folder else None
        self._writing = asyncio.Lock()
        self._looking: asyncio.Task | None = None

    async def start(self) -> None:
        """Reads what is saved; pinned contexts are read by the engine when it is ready."""
        self._looking = asyncio.create_task(self._look_after())
        if self._saved is None:
            return
        for saved, token_ids in await self._front.in_thread(self._read_saved):
            if len(self._by_name) >= self._front.options.max_contexts:
                logger.warning("saved context %s is skipped: there are too many", saved.name)
                continue
            context = Context(
                saved.name,
                token_ids,
                saved.bytes,
                list(saved.files),
                saved.pinned,
                saved.ttl_seconds,
                saved.created,
                saved.last_used,
                status="reading" if saved.pinned else "ready",
                questions=saved.questions,
                has_saved_tokens=True,
            )
            if saved.ttl_seconds is not None:
                context.expires_at = (saved.last_used or saved.created) + saved.ttl_seconds
            self._by_name[saved.name] = context
            if saved.pinned:
                context.task = asyncio.create_task(self._run(context, is_new=False))

    async def stop(self) -> None:
        tasks = [*(context.task for context in self), self._looking]
        for task in filter(None, tasks):
            task.cancel()
        await asyncio.gather(*filter(None, tasks), return_exceptions=True)
        for context in list(self):
            if context.is_unsaved:
                await self.save(context)

    def __iter__(self) -> Iterator[Context]:
        return iter(self._by_name.values())

    def get(self, name: str) -> Context:
        """Raises ApiError 404."""
        context = self._by_name.get(name)
        if context is None:
            raise ApiError(
                404, f"there is no context {name[:64]!r}", "context", "context_not_found"
            )
        return context

    def check_new(self, name: str | None) -> None:
        """Raises ApiError if there may be no further context, or none of this name."""
        if name is not None and name in self._by_name:
            raise ApiError(409, f"there is a context {name!r} already", "name", "context_exists")
        limit = self._front.options.max_contexts
        if len(self._by_name) >= limit:
            raise ApiError(
                400,
                f"there are {limit} contexts, which is what the server keeps: delete one",
                code="too_many_contexts",
            )

    def add(
        self,
        name: str | None,
        token_ids: np.ndarray,
        size: int,
        files: list[dict[str, Any]],
        pinned: bool,
        ttl_seconds: float | None,
    ) -> Context:
        """Begins to read a new context. Raises ApiError."""
        self.check_new(name)
        name = name or f"ctx-{secrets.token_hex(8)}"
        context = Context(name, token_ids, size, files, pinned, ttl_seconds)
        self._by_name[name] = context
        context.task = asyncio.create_task(self._run(context, is_new=True))
        return context

    async def changes(self, context: Context) -> AsyncIterator[Context]:
        """Each time that the reading of a new context got on, until it is over. One whose reading
        fails, or is not waited for, is removed.

        Raises:
            ApiError, EngineRefusalError, EngineLostError
        """
        try:
            while context.status == "reading":
                changed = context.changed
                yield context
                self._check_there(context)
                if context.status == "reading":
                    await changed.wait()
            if context.failure is not None:
                raise context.failure
        finally:
            if context.status != "ready":
                await self.remove(context)
        context.is_unsaved = True
        await self.save(context)

    async def change(self, context: Context, patch: ContextPatch) -> None:
        """Pins or unpins, and sets the time to live, which begins anew. Raises ApiError."""
        async with context.changing:
            if "ttl_seconds" in patch.model_fields_set:
                context.ttl_seconds = patch.ttl_seconds
            context.renew()
            if patch.pinned is not None and patch.pinned != context.pinned:
                await self._pin(context, patch.pinned)
        await self.save(context)

    async def _pin(self, context: Context, pinned: bool) -> None:
        context.pinned = pinned
        if context.status != "reading":  # else its reading ends as it is to be then
            await self._end_task(context)
            self._check_there(context)
            context.status, context.failure = "reading" if pinned else "ready", None
            if pinned:
                context.task = asyncio.create_task(self._run(context, is_new=False))
        context.notify()

    async def remove(self, context: Context) -> None:
        """What is asked over it is answered to its end."""
        if self._by_name.get(context.name) is context:
            del self._by_name[context.name]
        await self._end_task(context)
        context.notify()
        if self._saved is not None:
            async with self._writing:
                if context.name not in self._by_name:
                    try:
                        await self._front.in_thread(self._saved.remove, context.name)
                    except OSError as error:
                        logger.warning("context %s stays on disk: %s", context.name, error.strerror)

    @asynccontextmanager
    async def asked(
        self,
        name: str | None,
        answer: Callable[[np.ndarray | None], AbstractAsyncContextManager[Entered]],
    ) -> AsyncIterator[Entered]:
        """Answers over the context of this name, if there is one. Raises ApiError 404."""
        if name is None:
            async with answer(None) as entered:
                yield entered
            return
        context = self.get(name)
        context.asking += 1
        context.questions += 1
        try:
            async with answer(context.token_ids) as entered:
                yield entered
        finally:
            context.asking -= 1
            context.last_used = time.time()
            context.is_unsaved = True
            context.renew()

    async def save(self, context: Context) -> None:
        context.is_unsaved = False
        if self._saved is None:
            return
        said = {
            "name": context.name,
            "created": context.created,
            "bytes": context.bytes,
            "files": context.files,
            "pinned": context.pinned,
            "ttl_seconds": context.ttl_seconds,
            "last_used": context.last_used,
            "questions": context.questions,
        }
        async with self._writing:
            if self._by_name.get(context.name) is context:
                write, tokens_too = self._saved.write, not context.has_saved_tokens
                try:
                    await self._front.in_thread(write, said, context.token_ids, tokens_too)
                    context.has_saved_tokens = True
                except OSError as error:  # it is there until the server ends
                    logger.warning("context %s is not saved: %s", context.name, error.strerror)

    def _read_saved(self) -> list[tuple[SavedContext, np.ndarray]]:
        found = []
        for name in self._saved.names():
            try:
                found.append(self._saved.read(name))
            except UserError as error:
                logger.warning("saved context %s is skipped: %s", name, error)
        return found

    def _check_there(self, context: Context) -> None:
        """Raises ApiError if it was deleted meanwhile."""
        if self._by_name.get(context.name) is not context:
            raise ApiError(409, f"the context {context.name!r} was deleted", code="context_deleted")

    async def _end_task(self, context: Context) -> None:
        task, context.task = context.task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self, context: Context, is_new: bool) -> None:
        """Reads a context. A pinned one is then held, and read again when the ranks were started
        again; the first reading of a new one fails with them."""
        if not is_new:
            await self._until_ready()
        while True:
            try:
                await self._read(context)
                if not context.pinned:
                    return
                continue  # it was pinned meanwhile: now its KV is to be held
            except EngineLostError as error:
                if is_new and context.status == "reading":
                    self._fail(context, error)
                    return
            except Exception as error:
                self._fail(context, error)
                return
            is_new = False
            context.status = "reading"
            context.notify()
            await asyncio.sleep(_TICK)
            await self._until_ready()

    async def _read(self, context: Context) -> None:
        """Returns when the context is read and not pinned, or is not held any more."""
        generator = self._front.engine.read(context.token_ids, keep=context.pinned)
        opened, start = None, time.monotonic()
        readings = self._front.metrics.readings
        try:
            async with contextlib.aclosing(generator) as events:
                async for event in events:
                    if isinstance(event, Opened):
                        opened = context.opened = event
                        context.done = done_at_first(event)
                        readings[context] = share_read(event, context.done)
                    elif isinstance(event, Progress) and opened is not None:
                        context.done = event.done
                        readings[context] = share_read(opened, context.done)
                    elif isinstance(event, ReadDone):
                        self._front.metrics.context_read.observe(time.monotonic() - start)
                        readings.pop(context, None)
                        context.done = (1.0,) * len(context.done)
                        context.status, context.failure = "ready", None
                        context.renew()
                        context.notify()
                        if not context.pinned:
                            return
                    context.notify()
        finally:
            readings.pop(context, None)
        if context.status == "reading":
            raise EngineLostError("the engine gave up a context")

    async def _until_ready(self) -> None:
        while self._front.engine.state != "ready":
            await asyncio.sleep(_TICK)

    def _fail(self, context: Context, error: Exception) -> None:
        if as_api_error(error) is None:
            logger.error("a context could not be read", exc_info=error)
        context.status, context.failure = "failed", error
        context.notify()

    async def _look_after(self) -> None:
        """Ends contexts whose time is over, and saves what changed of others."""
        while True:
            await asyncio.sleep(_TICK)
            for context in list(self):
                expires = context.expires_at
                is_over = expires is not None and expires <= time.time()
                try:
                    if is_over and not context.asking and context.status != "reading":
                        await self.remove(context)
                    elif context.is_unsaved:
                        await self.save(context)
                except Exception:
                    logger.exception("a context could not be looked after")
