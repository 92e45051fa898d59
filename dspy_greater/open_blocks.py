"""Something is kept while any of its `with` blocks is open, in whichever thread; the last to end gives it back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class OpenBlocks:
    """Counts the open blocks.

    Args:
        at_end: gives back what was kept; called under the lock.
        lock: guards what is kept.

    >>> kept = [1]
    >>> blocks = OpenBlocks(kept.clear)
    >>> with blocks.open(), blocks.open():
    ...     bool(blocks), kept
    (True, [1])
    >>> bool(blocks), kept
    (False, [])
    """

    def __init__(self, at_end: Callable[[], object], lock: Any = None) -> None:
        self._at_end, self._lock = at_end, lock or threading.RLock()
        self._count = 0

    def __bool__(self) -> bool:
        return self._count > 0

    @contextmanager
    def open(self) -> Iterator[None]:
        """Keep things until the outermost of the open blocks ends."""
        with self._lock:
            self._count += 1
        try:
            yield
        finally:
            with self._lock:
                self._count -= 1
                if not self._count:
                    self._at_end()
