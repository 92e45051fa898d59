"""Real servers on the loopback interface for tests: `transformers serve` over weights on this disk.

Import `pocket_server` into a test module: pytest then starts one server for the whole session.
"""

from __future__ import annotations

import importlib.util
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from server_process import server_process

from dspy_greater import pocket

MISSING = [name for name in ("fastapi", "uvicorn", "accelerate") if importlib.util.find_spec(name) is None]
needs_serving = pytest.mark.skipif(
    bool(MISSING), reason=f"needs pip install 'dspy-greater[serving]': no {', '.join(MISSING)}"
)


@dataclass(frozen=True)
class Served:
    """A running server: `url` is its API's address, with `/v1`; `model` the name that it knows its weights by."""

    url: str
    model: str

    @property
    def lm(self) -> str:
        """The model string of a `dspy.LM` on it."""
        return f"openai/{self.model}"


@contextmanager
def transformers_serve(
    weights: str | Path, *, dtype: str = "float32", port: int | None = None, seconds: float = 300.0
) -> Iterator[Served]:
    """`transformers serve` over a directory of weights while the block lasts.

    Raises `NotUpError` with the end of what the server wrote where it does not come up within `seconds`.
    """
    port = free_port() if port is None else port
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(weights)]
    command += ["--device", "cpu", "--dtype", dtype, "--host", "127.0.0.1", "--port", str(port)]
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    address = f"http://127.0.0.1:{port}"
    with server_process(command, address, environment=environment, seconds=seconds):
        yield Served(f"{address}/v1", str(weights))


def free_port() -> int:
    """A port of the loopback interface that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def pocket_server() -> Iterator[Served]:
    """One `transformers serve` over the model that ships with the package, in float32, for the whole session."""
    if MISSING:
        pytest.skip(f"needs pip install 'dspy-greater[serving]': no {', '.join(MISSING)}")
    with transformers_serve(pocket.path()) as served:
        yield served
