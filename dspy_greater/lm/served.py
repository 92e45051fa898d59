"""A `dspy.LM` over several servers of one model: least busy first, a dead one left out and taken back after a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import dspy
from dspy import lm15

from dspy_greater.errors import SettingsError
from dspy_greater.lm.asynchronous import AsyncEngine

REST = 30.0  # seconds for which a server that failed is asked only where no other is left
_THEIRS = (  # errors that another server may not have
    lm15.TransportError,
    lm15.ServerError,
    lm15.TimeoutError,
    lm15.RateLimitError,
    lm15.AuthError,
    lm15.BillingError,
    lm15.UnsupportedModelError,
)


def served_lm(
    model: str,
    api_bases: str | Sequence[str],
    *,
    api_key: str = "none",
    timeout: float | None = None,
    rest: float = REST,
    **kwargs: Any,
) -> dspy.LM:
    """A `dspy.LM` over one or more servers of the same model.

    Each call goes to the server with the fewest calls under way. One that cannot be reached, fails, or says that it
    has too much to do is left out for a while, and the call goes to the next. Only where all have failed, the call
    fails, and DSPy tries again. The servers have to serve the same weights under the same name.

    Args:
        model: as for `dspy.LM`: "openai/" and the name by which the servers know the model.
        api_bases: the addresses of their APIs, which end in `/v1` as a rule.
        api_key: for all of them.
        timeout: seconds that an answer may take; 600 by default.
        rest: seconds for which a server that failed is left out, where it does not say itself.
        kwargs: more arguments of `dspy.LM` (`temperature`, `max_tokens`, `num_retries`, ...).

    Raises:
        SettingsError: no address, or one that is none.

    Example:
        >>> lm = served_lm("openai/Qwen/Qwen3-4B", ["http://one:8000/v1", "http://two:8000/v1"])
        >>> lm.engine.api_bases
        ('http://one:8000/v1', 'http://two:8000/v1')
    """
    pool = ServerPool(model, api_bases, api_key=api_key, timeout=timeout, rest=rest)
    return dspy.LM(model, engine=pool, async_engine=AsyncServerPool(pool), **kwargs)


@dataclass
class _Server:
    api_base: str
    router: lm15.LMRouter
    under_way: int = 0
    asked: int = 0
    rests_until: float = 0.0


class ServerPool:
    """DSPy's engine contract over several servers; safe in threads, and shared by copies of its LM.

    Args:
        model, api_bases, api_key, timeout, rest: as for `served_lm`.
    """

    def __init__(
        self,
        model: str,
        api_bases: str | Sequence[str],
        *,
        api_key: str = "none",
        timeout: float | None = None,
        rest: float = REST,
    ) -> None:
        self.api_bases = _addresses(api_bases)
        self.model, self.timeout, self.rest = model, timeout, rest
        self._key = api_key
        self._lock = threading.Lock()
        self._servers = [_Server(address, self._router(address)) for address in self.api_bases]

    def _router(self, api_base: str) -> lm15.LMRouter:
        timeouts = None if self.timeout is None else lm15.Timeouts(read=self.timeout, write=self.timeout)
        config = lm15.RouterConfig(
            api_keys={_PROVIDER: self._key}, base_urls={_PROVIDER: api_base}, timeouts=timeouts, env={}
        )
        return lm15.LMRouter(config)

    def __deepcopy__(self, memo: dict[int, Any]) -> ServerPool:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return ServerPool.load_state, (self.dump_state(),)

    def complete(self, request: lm15.Request) -> lm15.Response:
        """Answer one request, by the first server that can.

        Raises:
            lm15.LM15Error: what the last of them said, or a refusal of the request itself.
        """
        routed = _routed(request)
        last: lm15.LM15Error | None = None
        left = list(self._servers)
        while left:
            with self._next(left) as server:
                left.remove(server)
                try:
                    answer = server.router.complete(routed)
                except lm15.LM15Error as error:
                    if not _is_theirs(error):
                        raise
                    last = error
                    self._leave_out(server, error)
                else:
                    server.rests_until = 0.0
                    return answer
        raise last or lm15.ServerError("no server is left")

    def stream(self, request: lm15.Request) -> Iterator[Any]:
        """Answer one request in pieces, by the server that is next; what has begun cannot go on elsewhere."""
        with self._next(self._servers) as server:
            try:
                yield from server.router.stream(_routed(request))
            except lm15.LM15Error as error:
                if _is_theirs(error):
                    self._leave_out(server, error)
                raise

    def under_way(self) -> dict[str, int]:
        """How many calls each server has to answer now, by address."""
        with self._lock:
            return {server.api_base: server.under_way for server in self._servers}

    def close(self) -> None:
        """Close the connections."""
        for server in self._servers:
            server.router.close()

    def dump_state(self) -> dict[str, Any]:
        """What `program.save` writes; without the key."""
        return {"model": self.model, "api_bases": list(self.api_bases), "timeout": self.timeout, "rest": self.rest}

    @classmethod
    def load_state(cls, state: dict[str, Any]) -> ServerPool:
        """The engine of a saved program."""
        return cls(state["model"], state["api_bases"], timeout=state.get("timeout"), rest=state.get("rest", REST))

    @contextmanager
    def _next(self, servers: Sequence[_Server]) -> Iterator[_Server]:
        """The server to ask, which counts as busy while the block lasts."""
        now = time.monotonic()
        with self._lock:
            # One that rests comes last, and of several the one that rests least.
            chosen = min(
                servers, key=lambda server: (max(0.0, server.rests_until - now), server.under_way, server.asked)
            )
            chosen.under_way += 1
            chosen.asked += 1
        try:
            yield chosen
        finally:
            with self._lock:
                chosen.under_way -= 1

    def _leave_out(self, server: _Server, error: lm15.LM15Error) -> None:
        told = getattr(error, "retry_after", None)
        server.rests_until = time.monotonic() + (self.rest if told is None else float(told))


class AsyncServerPool(AsyncEngine):
    """The asynchronous side of a `ServerPool`."""

    kind = ServerPool


_PROVIDER = "openai-chat"


def _routed(request: lm15.Request) -> lm15.Request:
    return replace(request, model=f"{_PROVIDER}:{request.model.partition('/')[2] or request.model}")


def _is_theirs(error: lm15.LM15Error) -> bool:
    """Whether another server may answer: this one failed, or what it sent is no answer."""
    return isinstance(error, _THEIRS) or type(error) is lm15.ProviderError


def _addresses(api_bases: Any) -> tuple[str, ...]:
    found = (api_bases,) if isinstance(api_bases, str) else tuple(api_bases)
    strange = [
        address for address in found if not isinstance(address, str) or not address.startswith(("http://", "https://"))
    ]
    if not found or strange:
        raise SettingsError(
            f"api_bases={api_bases!r}: give the addresses of the servers' APIs, such as ['http://localhost:8000/v1']."
        )
    return tuple(dict.fromkeys(address.rstrip("/") for address in found))
