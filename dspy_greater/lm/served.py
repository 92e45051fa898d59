"""A `dspy.LM` over several servers of one model: least busy first, a dead one left out and taken back after a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from json import JSONDecodeError
from typing import Any

import dspy
from dspy import lm15

from dspy_greater.errors import SettingsError
from dspy_greater.lm.asynchronous import AsyncEngine
from dspy_greater.lm.request import told_apart

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
        self._key = api_key.strip() if api_key else ""
        self._settings: Mapping[str, Any] = {}
        self._lock = threading.Lock()
        self._servers = [_Server(address, self._router(address)) for address in self.api_bases]

    def _router(self, api_base: str) -> lm15.LMRouter:
        timeouts = None if self.timeout is None else lm15.Timeouts(read=self.timeout, write=self.timeout)
        config = lm15.RouterConfig(
            api_keys={_PROVIDER: self._key}, base_urls={_PROVIDER: api_base}, timeouts=timeouts, env={}
        )
        return lm15.LMRouter(config)

    @property
    def headers(self) -> dict[str, str]:
        """What goes with every question to one of the servers; never to be shown."""
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    def with_settings(self, settings: Mapping[str, Any]) -> ServerPool:
        """The same servers, which are sent these settings with every request that does not have its own."""
        other = object.__new__(ServerPool)
        vars(other).update(vars(self))
        other._settings = {**self._settings, **settings}
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> ServerPool:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return ServerPool.load_state, (self.dump_state(),)

    def complete(self, request: lm15.Request) -> lm15.Response:
        """Answer one request, by the first server that can.

        Raises:
            lm15.LM15Error: what the last of them said, or a refusal of the request itself.
        """
        routed = self._routed(request)
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
        """Answer one request in pieces, by the first server that can; what has begun cannot go on elsewhere.

        Raises:
            lm15.LM15Error: what the last of them said, a refusal of the request itself, or what broke off an answer.
        """
        routed = self._routed(request)
        left, begun = list(self._servers), False
        while True:
            with self._next(left) as server:
                left.remove(server)
                try:
                    for event in _pieces(server, routed):
                        begun = True
                        yield event
                except lm15.LM15Error as error:
                    if _is_theirs(error):
                        self._leave_out(server, error)
                    if begun or not left or not _is_theirs(error):
                        raise
                else:
                    if begun or not left:
                        server.rests_until = 0.0
                        return
                    self._leave_out(server)  # what it sent is no answer

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

    def _routed(self, request: lm15.Request) -> lm15.Request:
        config = request.config
        settings = {name: value for name, value in self._settings.items() if getattr(config, name, None) is None}
        if settings:
            config = replace(config, extensions={**settings, **(config.extensions or {})})
        return replace(request, model=f"{_PROVIDER}:{served_name(request.model)}", config=config)

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

    def _leave_out(self, server: _Server, error: lm15.LM15Error | None = None) -> None:
        told = getattr(error, "retry_after", None)
        server.rests_until = time.monotonic() + (self.rest if told is None else float(told))


class AsyncServerPool(AsyncEngine):
    """The asynchronous side of a `ServerPool`."""

    kind = ServerPool


_PROVIDER = "openai-chat"


def served_name(model: str) -> str:
    """The name that the servers of a pool are asked for.

    >>> served_name("openai/Qwen/Qwen3-4B")
    'Qwen/Qwen3-4B'
    """
    return model.partition("/")[2] or model


def with_settings(lm: dspy.LM, settings: Mapping[str, Any]) -> dspy.LM:
    """A copy of an LM whose server, or servers, get these sampling settings with every call.

    DSPy has no way to hand settings of a server's own to an engine, so a pool sends them itself. DSPy's cache does not
    see them there, and has to tell the answers apart.

    >>> with_settings(dspy.LM("openai/model"), {"repetition_penalty": 1.0}).kwargs["repetition_penalty"]
    1.0
    """
    if not isinstance(lm.engine, ServerPool):
        return lm.copy(**settings)
    pool = lm.engine.with_settings(settings)
    changes = {"rollout_id": told_apart(lm.kwargs.get("rollout_id"), sorted(settings.items()))} if lm.cache else {}
    copied = lm.copy(engine=pool, async_engine=AsyncServerPool(pool), **changes)
    copied._warned_zero_temp_rollout = True  # that it draws nothing anew at temperature 0 is as it should be
    return copied


def _pieces(server: _Server, routed: lm15.Request) -> Iterator[Any]:
    try:
        yield from server.router.stream(routed)
    except JSONDecodeError as error:
        raise lm15.ProviderError(f"The server at {server.api_base} sent a piece that is no JSON: {error}") from error


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
