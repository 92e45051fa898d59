"""A value that holds inside a `with` block, for the threads that work for the block and for no others.

Two searches may run on one model at once. What one of them keeps between its forward passes must not show in the last
bits of the other's, so it belongs to the context (`contextvars`) in which the block was entered: threads that carry
that context see it, others do not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class _Block(Generic[T]):
    value: T | None  # None once the block has ended; contexts that still hold it keep nothing alive


_NONE: Mapping[int, _Block[Any]] = MappingProxyType({})
_BLOCKS: ContextVar[Mapping[int, _Block[Any]]] = ContextVar("blocks of `Scoped` values", default=_NONE)


class Scoped(Generic[T]):
    """What is kept in blocks.

    >>> lists = Scoped[list[int]]()
    >>> with lists.open(list) as outer:
    ...     with lists.open(list) as inner:
    ...         inner.append(1)
    ...     outer, lists.value is outer
    ([1], True)
    >>> print(lists.value)
    None
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[_Block[T]] = []

    @property
    def value(self) -> T | None:
        """That of the innermost block around the caller; None outside."""
        block = _BLOCKS.get().get(id(self))
        return None if block is None else block.value

    @property
    def everywhere(self) -> list[T]:
        """The values of all open blocks, those of other contexts too."""
        with self._lock:
            values = [block.value for block in self._open]
        return [value for value in values if value is not None]

    @contextmanager
    def holding(self, value: T) -> Iterator[T]:
        """Inside, this is the value."""
        block = _Block[T](value)
        before = _BLOCKS.set({**_BLOCKS.get(), id(self): block})
        with self._lock:
            self._open.append(block)
        try:
            yield value
        finally:
            _BLOCKS.reset(before)
            block.value = None
            with self._lock:
                self._open.remove(block)

    @contextmanager
    def open(self, make: Callable[[], T]) -> Iterator[T]:
        """Inside, there is a value: that of the block around this one, or else a new one."""
        around = self.value
        if around is not None:
            yield around
            return
        with self.holding(make()) as value:
            yield value
