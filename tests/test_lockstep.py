"""Lockstep under hurry: every batch starts because somebody was woken for it, and not because a wait ran out."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from dspy_greater.lm.batcher import Batcher
from dspy_greater.lm.lockstep import Lockstep

PATIENCE = 10.0  # seconds; a wake-up that is lost costs the whole of it


@pytest.fixture(autouse=True)
def waits_that_ran_out(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Every wait lasts until a wake-up, and threads take turns as often as they can."""
    ran_out: list[float] = []

    def wait(group: Any) -> None:
        if not group._changed.wait(PATIENCE):
            ran_out.append(time.monotonic())

    monkeypatch.setattr(Lockstep, "_wait", wait)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield ran_out
    sys.setswitchinterval(before)


class Group:
    """Some threads in lockstep; each asks as often as it is told, and some batches fail."""

    def __init__(self, calls: Sequence[int], *, failing: bool = False) -> None:
        self.calls, self.failing = list(calls), failing
        self.sizes: list[int] = []
        self.batcher = Batcher(self.compute)

    def compute(self, requests: Sequence[int]) -> list[int]:
        self.sizes.append(len(requests))
        if self.failing and len(self.sizes) % 3 == 0:
            raise ValueError("this batch fails")
        return [2 * request for request in requests]

    def run(self, *, leave_after: float | None = None) -> None:
        with ThreadPoolExecutor(len(self.calls)) as pool:
            with self.batcher.lockstep(len(self.calls), stall_seconds=1e6) as group:
                together = threading.Barrier(len(self.calls))  # so that every worker has a thread of its own

                def work(index: int) -> None:
                    together.wait()
                    with group.worker():
                        for call in range(self.calls[index]):
                            self.ask(100 * index + call)

                working = [pool.submit(work, index) for index in range(len(self.calls))]
                if leave_after is None:
                    for each in working:
                        each.result(60)
                else:
                    time.sleep(leave_after)
            for each in working:
                each.result(60)

    def ask(self, request: int) -> None:
        try:
            assert self.batcher.submit(request) == 2 * request
        except ValueError:
            assert self.failing


@pytest.mark.parametrize("failing", [False, True])
def test_no_wake_up_is_lost_when_workers_leave_and_batches_fail(failing: bool, waits_that_ran_out: list[float]) -> None:
    draws = random.Random(failing)
    for _ in range(60):
        calls = [draws.randint(0, 4) for _ in range(draws.randint(1, 9))]
        group = Group(calls, failing=failing)
        group.run()
        assert group.sizes == [sum(count > turn for count in calls) for turn in range(max(calls))]
    assert waits_that_ran_out == []


def test_no_wake_up_is_lost_when_the_block_ends_early(waits_that_ran_out: list[float]) -> None:
    draws = random.Random(2)
    for _ in range(60):
        calls = [draws.randint(1, 4) for _ in range(draws.randint(2, 9))]
        group = Group(calls)
        group.run(leave_after=draws.random() * 0.002)
        assert sum(group.sizes) == sum(calls)
    assert waits_that_ran_out == []


def test_a_waiter_that_is_interrupted_is_in_no_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group([1, 1])
    patched = Lockstep._wait

    def interrupted(lockstep: Any) -> None:
        if [each.request for each in lockstep._waiting] == [1]:
            raise KeyboardInterrupt
        patched(lockstep)

    monkeypatch.setattr(Lockstep, "_wait", interrupted)
    first_left = threading.Event()
    with group.batcher.lockstep(2) as lockstep, ThreadPoolExecutor(2) as pool:

        def early() -> None:
            with pytest.raises(KeyboardInterrupt), lockstep.worker():
                lockstep.submit(1)
            first_left.set()

        def late() -> int:
            with lockstep.worker():
                first_left.wait(60)
                return lockstep.submit(2)

        gone, answered = pool.submit(early), pool.submit(late)
        gone.result(60)
        assert answered.result(60) == 4
    assert group.sizes == [1]
