"""What is kept in a block belongs to the block: threads of another one do not see it."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import pytest

from dspy_greater.model.fast.scoped import Scoped


class Thing:
    """Something that can be referred to weakly."""


def test_blocks_of_two_threads_do_not_meet() -> None:
    things, both_inside = Scoped[Thing](), threading.Barrier(2)

    def work() -> tuple[Any, Any, int]:
        with things.open(Thing) as mine:
            both_inside.wait(30)
            seen, everywhere = things.value, len(things.everywhere)
            both_inside.wait(30)
            return mine, seen, everywhere

    with ThreadPoolExecutor(2) as pool:
        one, other = [each.result(30) for each in [pool.submit(work), pool.submit(work)]]
    assert one[0] is one[1] and other[0] is other[1] and one[0] is not other[0]
    assert one[2] == other[2] == 2 and things.everywhere == []


def test_threads_that_carry_the_context_work_for_the_block_and_see_nothing_after_its_end() -> None:
    things = Scoped[Thing]()
    with things.open(Thing) as mine, ThreadPoolExecutor(1) as pool:
        carried = copy_context()
        assert pool.submit(carried.run, lambda: things.value).result(30) is mine
        assert pool.submit(lambda: things.value).result(30) is None
    assert carried.run(lambda: things.value) is None


def test_what_a_context_still_holds_is_given_back_when_the_block_ends() -> None:
    things = Scoped[Thing]()
    with things.open(Thing) as mine:
        held, carried = weakref.ref(mine), copy_context()
        del mine
    gc.collect()
    assert held() is None and carried.run(lambda: things.value) is None


def test_the_innermost_value_holds_and_an_error_ends_the_block() -> None:
    numbers = Scoped[int]()

    def fail() -> None:
        with numbers.holding(2):
            assert numbers.value == 2
            raise ZeroDivisionError

    with numbers.holding(1):
        with pytest.raises(ZeroDivisionError):
            fail()
        assert numbers.value == 1
    assert numbers.value is None and numbers.everywhere == []


def test_two_of_them_keep_apart() -> None:
    one, other = Scoped[int](), Scoped[int]()
    with one.holding(1), other.open(lambda: 2):
        assert (one.value, other.value) == (1, 2)
