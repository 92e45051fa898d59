"""How tests that start Ray are marked: slow, and with Ray's own warnings left to Ray."""

from __future__ import annotations

from typing import Any

import pytest

MARKS = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def with_ray(test: Any) -> Any:
    """One test that starts Ray, in a module of others."""
    for mark in MARKS:
        test = mark(test)
    return test
