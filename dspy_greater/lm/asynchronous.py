"""The asynchronous side of an engine of a `dspy.LM`: the same calls, made by threads that only wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from typing import Any

from dspy import lm15


class AsyncEngine:
    """DSPy's asynchronous engine contract over a synchronous engine; a subclass says of which `kind`."""

    kind: Any = None

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def __deepcopy__(self, memo: dict[int, Any]) -> AsyncEngine:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.engine,)

    async def complete(self, request: lm15.Request) -> lm15.Response:
        """Answer one request without blocking the event loop."""
        return await asyncio.get_running_loop().run_in_executor(_waiters(), self.engine.complete, request)

    async def stream(self, request: lm15.Request) -> AsyncIterator[Any]:
        """Answer one request in pieces of text.

        Who is cancelled while it waits for a piece is not kept waiting: the answer ends by itself soon after.
        """
        end = object()
        events, cancel = self._begun(request)
        waiting: Future[Any] | None = None
        try:
            while True:
                waiting = _waiters().submit(next, events, end)
                if (event := await asyncio.wrap_future(waiting)) is end:
                    break
                yield event
        finally:
            cancel()
            # A generator cannot be closed while a thread is inside it.
            closed = _waiters().submit(_close_after, waiting, events)
            if waiting is None or waiting.done():
                await asyncio.wrap_future(closed)

    def _begun(self, request: lm15.Request) -> tuple[Any, Callable[[], None]]:
        """The pieces of an answer, and what ends it early while its next piece is waited for, if anything can."""
        return self.engine.stream(request), lambda: None

    async def aclose(self) -> None:
        """Nothing to close: what there is belongs to the engine."""

    def dump_state(self) -> dict[str, Any]:
        """What `program.save` writes; the same as the engine's."""
        return self.engine.dump_state()

    @classmethod
    def load_state(cls, state: dict[str, Any]) -> AsyncEngine:
        """The asynchronous engine of a saved program; raises what the engine's own `load_state` raises."""
        return cls(cls.kind.load_state(state))


def _close_after(waiting: Future[Any] | None, events: Any) -> None:
    if waiting is not None:
        wait([waiting])
    events.close()


@cache
def _waiters() -> ThreadPoolExecutor:
    """Many threads, so that asynchronous calls share a batch."""
    return ThreadPoolExecutor(max_workers=256, thread_name_prefix="lm-calls")
