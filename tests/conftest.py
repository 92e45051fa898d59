"""What several test modules start, and what every test leaves as it found it."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import openai
import pytest


@pytest.fixture(autouse=True)
def connections_to_servers_end_with_the_test() -> Iterator[None]:
    """LiteLLM keeps a client for ten minutes and drops it unclosed, in whatever test is running by then."""
    yield
    litellm = sys.modules.get("litellm")
    kept = getattr(litellm, "in_memory_llm_clients_cache", None)
    clients = [] if kept is None else [each for each in kept.cache_dict.values() if isinstance(each, openai.OpenAI)]
    for client in clients:
        client.close()
    if kept is not None and clients:
        kept.flush_cache()


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray cluster on this machine, for all tests of a module; skips, visibly, where Ray is missing."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'dspy-greater[ray]'")
    from dspy_greater.workers.ray_actors import joined

    leave = joined(None, 2)
    yield
    leave()
