"""A server in a process of its own, while a block of code lasts."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager


class NotUpError(RuntimeError):
    """A server that did not come up."""


@contextmanager
def server_process(
    command: Sequence[str], address: str, *, environment: Mapping[str, str], seconds: float
) -> Iterator[None]:
    """Run a server, which answers at `address`/health once it is ready.

    Raises `NotUpError` with the end of what the server wrote where it ends at once, or is not up within `seconds`.
    """
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=said, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + seconds
            while not is_up(f"{address}/health"):
                if process.poll() is not None or time.monotonic() > deadline:
                    said.seek(0)
                    wrote = said.read().decode(errors="replace")[-2000:]
                    raise NotUpError(f"The server did not come up: {' '.join(command)}\n{wrote}")
                time.sleep(0.2)
            yield
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def is_up(address: str) -> bool:
    """Whether a server answers there with status 200."""
    try:
        with urllib.request.urlopen(address, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False
