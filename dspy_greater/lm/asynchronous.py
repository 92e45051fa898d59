"""The asynchronous side of an engine of a `dspy.LM`: the same calls, made by threads that only wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
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
        """Answer one request in pieces of text."""
        loop, end = asyncio.get_running_loop(), object()
        events: Any = self.engine.stream(request)
        try:
            while (event := await loop.run_in_executor(_waiters(), next, events, end)) is not end:
                yield event
        finally:
            await loop.run_in_executor(_waiters(), events.close)

    async def aclose(self) -> None:
        """Nothing to close: what there is belongs to the engine."""

    def dump_state(self) -> dict[str, Any]:
        """What `program.save` writes; the same as the engine's."""
        return self.engine.dump_state()

    @classmethod
    def load_state(cls, state: dict[str, Any]) -> AsyncEngine:
        """The asynchronous engine of a saved program; raises what the engine's own `load_state` raises."""
        return cls(cls.kind.load_state(state))


@cache
def _waiters() -> ThreadPoolExecutor:
    """Many threads, so that asynchronous calls share a batch."""
    return ThreadPoolExecutor(max_workers=256, thread_name_prefix="lm-calls")
