"""Memory that was freed is given back."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest
import torch

from dspy_greater.model import memory
from dspy_greater.model.engine import Engine
from dspy_greater.model.interface import GenerationRequest

MEGABYTE = 1 << 20


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc"
)
def test_what_growing_states_leave_behind_goes_back_to_the_system() -> None:
    torch.ones(30 * MEGABYTE // 4)  # when it is freed, glibc keeps blocks of up to this size for itself
    blocks = [torch.ones(MEGABYTE // 4 + 64 * size) for size in range(300)]
    kept = blocks[::10]
    held = resident()
    del blocks
    memory.release()
    assert held - resident() > 200 * MEGABYTE
    assert all(float(each.sum()) == len(each) for each in kept)


def test_memory_is_given_back_when_a_step_or_a_call_of_its_own_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[int] = []
    monkeypatch.setattr("dspy_greater.model.engine.release", lambda: times.append(1))
    engine = Engine.from_pretrained("pocket")
    request = GenerationRequest((5, 6, 7), 3)
    with engine.session() as session:
        session.generate([request])
        session.generate([request])
        assert times == []
    assert times == [1]
    engine.generate([request])
    assert times == [1, 1]


def test_where_the_library_cannot_be_asked_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    memory.release()
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "CDLL", None)
    memory.release()
