"""What several test modules start, and what every test leaves as it found it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any

import openai
import pytest


@pytest.fixture(scope="session")
def openai_clients() -> Iterator[list[openai.OpenAI]]:
    """Every client that the test under way has made. They are held: a client collected open is an error of its test."""
    clients: list[openai.OpenAI] = []
    make = openai.OpenAI.__init__

    @functools.wraps(make)
    def make_and_remember(self: openai.OpenAI, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        clients.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai.OpenAI, "__init__", make_and_remember)
        yield clients


@pytest.fixture(autouse=True)
def connections_to_servers_end_with_the_test(openai_clients: list[openai.OpenAI]) -> Iterator[None]:
    """LiteLLM drops clients unclosed, to be collected in whatever test is running by then.

    It keeps one for ten minutes. Threads that ask a server at the same time make one each, and all but the last to be
    kept are dropped at once.
    """
    yield
    made = tuple(openai_clients)
    for client in made:
        client.close()
    openai_clients.clear()
    if made and "litellm" in sys.modules:
        sys.modules["litellm"].in_memory_llm_clients_cache.flush_cache()


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray cluster on this machine, for all tests of a module; skips, visibly, where Ray is missing."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'dspy-greater[ray]'")
    from dspy_greater.workers.cluster import joined

    leave = joined(None, 2)
    yield
    leave()
