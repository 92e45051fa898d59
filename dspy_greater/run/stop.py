"""What ends a search from outside and leaves it the time to return the best so far: SIGTERM, and a file named STOP."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from dspy_greater.notices import warn_caller

NAME = "STOP"
BY_FILE = "STOP file"
_SIGTERM = "SIGTERM"
_SECOND = "the second one: what was found is not waited for any more"


def by_signal(interrupt: KeyboardInterrupt) -> str:
    """What an interrupt is called in a result.

    >>> by_signal(KeyboardInterrupt("SIGTERM")), by_signal(KeyboardInterrupt())
    ('SIGTERM', 'interrupt')
    """
    return _SIGTERM if interrupt.args[:1] == (_SIGTERM,) else "interrupt"


def second(interrupt: KeyboardInterrupt) -> KeyboardInterrupt:
    """What is to be raised for an interrupt that came after another one had ended the search.

    >>> is_second(second(KeyboardInterrupt())), is_second(KeyboardInterrupt())
    (True, False)
    """
    return KeyboardInterrupt(*interrupt.args, _SECOND)


def is_second(error: BaseException) -> bool:
    """Whether it is an interrupt after which nothing more is to be computed."""
    return isinstance(error, KeyboardInterrupt) and _SECOND in error.args


@contextmanager
def terminable() -> Generator[None, None, None]:
    """In this block SIGTERM raises `KeyboardInterrupt("SIGTERM")` in the main thread, as Ctrl-C raises one.

    The system's own way of dealing with SIGTERM, to end the process at once, is replaced. A handler of the caller's
    is called first: what it raises (`SystemExit`, say) ends the search at once, and if it returns, the search ends with
    the best so far. Where the caller ignores SIGTERM, or handles it outside of Python, and in any thread but
    the main one, nothing is changed. Afterwards the caller's handler is back.

    Example:
        >>> with terminable():
        ...     signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        False
    """
    before = signal.getsignal(signal.SIGTERM)
    if before in (signal.SIG_IGN, None) or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        if callable(before):
            before(number, frame)
        raise KeyboardInterrupt(_SIGTERM)

    installed = _install(end)
    try:
        yield
    finally:
        if installed and signal.getsignal(signal.SIGTERM) is end:  # or somebody has put in another one
            signal.signal(signal.SIGTERM, before)


def _install(handler: Callable[[int, FrameType | None], Any]) -> bool:
    try:
        signal.signal(signal.SIGTERM, handler)
    except ValueError:  # the main thread of an interpreter within the interpreter
        return False
    return True


class StopFile:
    """A file `STOP` in a run's directory; whoever makes one asks the run to end after the step that it is in.

    Only its being there counts: it is not read, and may be empty. It is removed when it was obeyed, and at the end
    of any run: as the context of a `with`, of one that ends with an error too. One that lies there before the run
    begins is obeyed as well: no step is taken, and a warning says so.

    Example:
        >>> StopFile(None).seen()
        False
    """

    def __init__(self, log_dir: str | os.PathLike[str] | None) -> None:
        self._path = None if log_dir is None else Path(log_dir).expanduser() / NAME
        self._seen = False
        self._before = self._is_there()

    def seen(self) -> bool:
        """Whether it is there, or was there when this was last asked."""
        self._seen = self._seen or self._is_there()
        return self._seen

    def obeyed(self, *, ended: bool) -> None:
        """The run is over; `ended` says that the file has ended it."""
        if self._path is None:
            return
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
        if ended and self._before:
            now = "It could not be removed: remove it" if self._is_there() else "It is removed: compile again"
            warn_caller(
                f"{self._path} was there before the run began, so no step was taken. {now} to go on.", RuntimeWarning
            )

    def __enter__(self) -> StopFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        if kind is not None:
            self.obeyed(ended=False)

    def _is_there(self) -> bool:
        return self._path is not None and os.path.lexists(self._path)
