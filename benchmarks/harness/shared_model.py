"""One in-process model for cells in processes of their own, whose requests meet in the same batches.

A model on a CPU writes one row hardly faster than sixteen. An optimizer that writes one proposal after another leaves
its machine idle thus, and several of them at once fill it. What a cell is charged is counted by its own requests alone:
a beginning that those under way share counts once, and one that another cell has as well counts for both.
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

from dspy import lm15

from dspy_greater.errors import GreaterError
from dspy_greater.lm.batcher import Batcher
from dspy_greater.lm.local import LocalEngine
from dspy_greater.lm.request import SUPPORTED_PARAMETERS
from dspy_greater.model.counters import Counters, Tally
from dspy_greater.model.engine import Engine
from dspy_greater.model.fast.prefix_cache import LEAST_SHARED
from dspy_greater.model.fast.session import Session
from dspy_greater.model.interface import Generation, GenerationRequest, Tokens
from dspy_greater.model.kv_cache import shared_length
from dspy_greater.model.memory import release
from dspy_greater.model.prefill import parts_of
from dspy_greater.model.requests import row_of

SILENCE = 0.2  # seconds in which the rows of an evaluation come
LONGEST = 600.0  # seconds in which others may join a batch
_HUNG_UP = (OSError, EOFError, AuthenticationError)
_AGAIN = "again"  # in the place of a request that is the one before it


@dataclass(frozen=True)
class Door:
    """Where the process that holds the weights is asked, and the key that shows who may ask."""

    address: Any
    authkey: bytes = field(repr=False)


@dataclass(frozen=True)
class Answer:
    """What comes back for a request.

    Attributes:
        response: of the model; None where there is an error.
        error: name of an `lm15` error and its text.
        counters: what has been computed for the asking lane so far.
    """

    response: lm15.Response | None
    error: tuple[str, str] | None
    counters: Counters


@dataclass(eq=False)
class _Waiting:
    """A request of a cell and, later, its result or what went wrong."""

    lane: _Lane
    request: GenerationRequest
    done: threading.Event = field(default_factory=threading.Event)
    result: Generation | None = None
    error: BaseException | None = None

    def end(self, result: Generation) -> None:
        self.result = result
        self.lane.tally.add(generated_tokens=len(result.token_ids))
        self.done.set()

    def outcome(self) -> Generation:
        self.done.wait()
        if self.result is None:
            raise self.error or _closed()
        return self.result


def _knock(door: Door) -> None:
    with contextlib.suppress(*_HUNG_UP):
        Client(door.address, authkey=door.authkey).close()


class SharedModel:
    """The weights, asked by other processes. Requests that come while others are answered join those.

    Example:
        >>> with SharedModel(engine).opened() as door:  # doctest: +SKIP
        ...     RemoteEngine(door, "a").complete(request)  # in any process of this machine
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._changed = threading.Condition()  # of all that follows
        self._waiting: list[_Waiting] = []
        self._under_way: list[_Waiting] = []
        self._lanes: dict[str, _Lane] = {}
        self._open = False

    @contextlib.contextmanager
    def opened(self) -> Iterator[Door]:
        """Answers requests for as long as the block lasts; those that are under way at its end are told so."""
        key = secrets.token_bytes(32)
        with Listener(backlog=1024, authkey=key) as listener:
            door = Door(listener.address, key)
            self._open = True
            threading.Thread(target=self._receive, args=(listener,), name="shared-model-door", daemon=True).start()
            computing = threading.Thread(target=self._compute, name="shared-model", daemon=True)
            computing.start()
            try:
                yield door
            finally:
                with self._changed:
                    self._open = False
                    self._changed.notify_all()
                # A caller of ours, so that `accept` comes back. Where it is not waiting any more nobody answers, until
                # the listener is closed.
                threading.Thread(target=_knock, args=(door,), name="shared-model-knock", daemon=True).start()
                computing.join()

    def submit(self, lane: _Lane, request: GenerationRequest) -> Generation:
        """Wait for the request's result.

        Raises:
            GreaterError: what `Engine.generate` raises; or the door is closed.
        """
        row_of(self._engine, request)  # one that cannot be answered is refused here, where it harms no other
        waiting = _Waiting(lane, request)
        own = request.on_token

        def on_token(token: int) -> bool:
            return bool(own is not None and own(token)) or not self._open

        waiting.request = replace(request, on_token=on_token, on_end=waiting.end)
        with self._changed:
            if not self._open:
                raise _closed()
            self._waiting.append(waiting)
            self._changed.notify_all()
        return waiting.outcome()

    def _receive(self, listener: Listener) -> None:
        while self._open:
            try:
                connection = listener.accept()
            except Exception:  # who asked was killed meanwhile, has not the key, or files have run out for a while
                time.sleep(0.01)
                continue
            threading.Thread(target=self._serve, args=(connection,), name="shared-model-cell", daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        """One thread of a cell: a request, an answer, and so on until it hangs up."""
        with connection, contextlib.suppress(*_HUNG_UP):
            lane = self._lane(connection.recv())
            request: Any = None
            while True:
                asked = connection.recv()
                request = request if asked == _AGAIN else asked
                connection.send(lane.answer(request))

    def _lane(self, name: str) -> _Lane:
        with self._changed:
            if name not in self._lanes:
                self._lanes[name] = _Lane(self._engine, self)
            return self._lanes[name]

    def _compute(self) -> None:
        """Answer what waits, until the door is closed; what waits then is told so."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or not self._open)
            time.sleep(SILENCE)
            with self._changed:
                if not self._open:
                    left, self._waiting = self._waiting, []
                    break
            self._answer()
        for waiting in left:
            waiting.done.set()

    def _answer(self) -> None:
        """A batch and all that joins it. What its end leaves without a result has its error."""
        ends = time.monotonic() + LONGEST  # what nobody is told of before the end of a batch does not wait for ever
        error: BaseException | None = None

        def arrivals(most: int) -> list[GenerationRequest]:
            return self._take(most) if time.monotonic() < ends else []

        try:
            Session(self._engine, keeps=False).generate(self._take(self._engine.max_batch_rows), arrivals)
        except Exception as failure:  # raised again where it was asked
            error = failure
        finally:
            release()
        with self._changed:
            left, self._under_way = self._under_way, []
        for waiting in left:
            waiting.error = error
            waiting.done.set()

    def _take(self, most: int) -> list[GenerationRequest]:
        """The next requests, whose prompts are charged to their cells."""
        with self._changed:
            taken, self._waiting = (self._waiting[:most], self._waiting[most:]) if self._open else ([], self._waiting)
            before = [waiting for waiting in self._under_way if not waiting.done.is_set()]
            self._under_way = [*before, *taken]
        for lane in {id(waiting.lane): waiting.lane for waiting in taken}.values():
            known, new = ([each.request.prompt for each in some if each.lane is lane] for some in (before, taken))
            lane.tally.add(prefilled_tokens=max(0, tokens_to_read([*known, *new]) - tokens_to_read(known)))
        return [waiting.request for waiting in taken]


def _closed() -> GreaterError:
    return GreaterError("The model that cells share was closed; run the same command again to go on.")


class _Lane(Batcher):
    """A cell's way into the batches of all, and what it has cost."""

    def __init__(self, engine: Engine, shared: SharedModel) -> None:
        super().__init__(engine.generate)
        self._shared, self.tally = shared, Tally()
        self._local = LocalEngine(engine)
        self._local.batcher = self

    def submit(self, request: GenerationRequest) -> Generation:
        """Wait for the request's result in a batch with those of other cells."""
        return self._shared.submit(self, request)

    def answer(self, request: lm15.Request) -> Answer:
        """The response or the error, which must not end the connection."""
        try:
            return Answer(self._local.complete(request), None, self.tally.total)
        except lm15.LM15Error as error:
            return Answer(None, (type(error).__name__, str(error)), self.tally.total)
        except Exception as error:  # raised again where it was asked
            return Answer(None, ("ServerError", f"{type(error).__name__}: {error}"), self.tally.total)


class RemoteEngine:
    """DSPy's engine contract over a `SharedModel` of another process; many threads may ask.

    Args:
        door: of the shared model.
        lane: a name for what is counted together.
    """

    supports_function_calling = False
    supports_reasoning = False
    supports_response_schema = False
    supported_params = SUPPORTED_PARAMETERS

    def __init__(self, door: Door, lane: str) -> None:
        self._door, self._lane = door, lane
        self._mine = threading.local()  # a connection for each thread, and its last request
        self._lock = threading.Lock()
        self._counters = Counters()

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteEngine:
        return self

    @property
    def counters(self) -> Counters:
        """What this lane has cost, as of the last answer."""
        return self._counters

    def complete(self, request: lm15.Request) -> lm15.Response:
        """Answer one request; it shares a batch with those of other threads and processes.

        Raises:
            lm15.LM15Error: as a `LocalEngine` does; `ServerError` where the other process is gone.
        """
        try:
            answer = self._exchange(request)
        except _HUNG_UP as error:
            raise lm15.ServerError(
                f"The process that holds the weights does not answer ({error}); run the same command again."
            ) from error
        with self._lock:  # answers may overtake each other, and counters only grow
            self._counters = max(self._counters, answer.counters, key=_size)
        if answer.response is None:
            name, text = answer.error or ("ServerError", "")
            raise getattr(lm15, name)(text)
        return answer.response

    def close(self) -> None:
        """Nothing to close: a connection ends with its thread."""

    def _exchange(self, request: lm15.Request) -> Answer:
        if not hasattr(self._mine, "connection"):
            connection = Client(self._door.address, authkey=self._door.authkey)
            connection.send(self._lane)
            self._mine.connection, self._mine.request = connection, None
        try:
            # The same object again is another sample, and has to be the same object there as well.
            self._mine.connection.send(_AGAIN if request is self._mine.request else request)
            self._mine.request = request
            return self._mine.connection.recv()
        except BaseException:  # an interrupt: the answer that is on its way is nobody's
            self._mine.connection.close()
            del self._mine.connection
            raise


def tokens_to_read(prompts: Sequence[Tokens]) -> int:
    """Tokens to read of these prompts in a batch of their own: what the rows of a part begin with is read once."""
    if not prompts:
        return 0
    parts = [(part, part.shared if part.shared >= LEAST_SHARED else 0) for part in parts_of(prompts)]
    beginnings = [prompts[part.rows[0]][:shared] for part, shared in parts]
    return distinct_tokens(beginnings) + sum(len(prompts[row]) - shared for part, shared in parts for row in part.rows)


def distinct_tokens(sequences: Sequence[Tokens]) -> int:
    """Tokens of these sequences, where what several of them begin with counts once.

    >>> distinct_tokens([(1, 2, 3), (1, 2, 4), (5,)])
    5
    """
    ordered = sorted(sequences)
    return sum(map(len, ordered)) - sum(shared_length(pair) for pair in itertools.pairwise(ordered))


def _size(counters: Counters) -> int:
    return counters.prefilled_tokens + counters.generated_tokens
