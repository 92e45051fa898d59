"""Rollouts on a server, gradients here on the same weights: `python examples/served_search.py WEIGHTS`.

With `--server` a server is started, out of the environment of `--server-python`, and ended afterwards, as `make served`
does; with `--api-base` the one that you run already is asked, such as `http://localhost:8080/v1`. Prints what was
found, and how far the server is the model that is loaded here. Rows are as in `quickstart.py`.

`llama.cpp` serves a GGUF file by `serve_gguf.py`; `vllm` serves a directory of weights, in float32 on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import dspy
from quickstart import exact_match, load_rows

from dspy_greater import GReaTer, pocket

HERE = Path(__file__).resolve().parent
# What vLLM needs on a CPU: a bound for its memory in GiB, and threads that the system places.
ON_A_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}


def command(given: argparse.Namespace) -> list[str]:
    """The command line of the server that was asked for."""
    python, weights, port = given.server_python, str(given.weights), str(given.port)
    if given.server == "llama.cpp":
        return [python, str(HERE / "serve_gguf.py"), weights, "--port", port, "--parallel", str(given.rows)]
    served = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", weights, "--served-model-name", given.name]
    return [*served, "--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1", "--port", port]


@contextmanager
def server(given: argparse.Namespace) -> Iterator[str]:
    """A server over the weights, while the block lasts; its address."""
    line = command(given)
    address = f"http://127.0.0.1:{given.port}"
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(line, env={**os.environ, **ON_A_CPU}, stdout=said, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + given.start_seconds
            while not is_up(f"{address}/health"):
                if process.poll() is not None or time.monotonic() > deadline:
                    said.seek(0)
                    sys.exit(f"The server did not start: {' '.join(line)}\n{said.read().decode()[-2000:]}")
                time.sleep(0.5)
            yield f"{address}/v1"
        finally:
            process.terminate()
            process.wait()


def is_up(address: str) -> bool:
    """Whether a server answers there with status 200."""
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help="a file, a directory, or `pocket`")
    parser.add_argument("--server", choices=("llama.cpp", "vllm"), help="which to start")
    parser.add_argument("--server-python", help="the Python of an environment that has it")
    parser.add_argument("--start-seconds", type=float, default=600.0, help="for which its start is waited")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--api-base", help="of a server that runs already")
    parser.add_argument("--name", default="local", help="that the weights have there")
    parser.add_argument("--task", default="navigate")
    parser.add_argument("--bbh", type=Path, help="directory with the BIG-Bench Hard files")
    parser.add_argument("--rows", type=int, default=8, help="to search on, and to choose on")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=120)
    parser.add_argument("--out", type=Path, default=Path("runs/served"))
    given = parser.parse_args()
    if (given.api_base is None) == (given.server is None) or (given.server is None) != (given.server_python is None):
        parser.error("give --api-base, or --server with --server-python")
    if str(given.weights) == "pocket":
        given.weights = Path(pocket.path())
    return given


def main() -> None:
    """Search, and say what answered."""
    given = parse_arguments()
    rows, source = load_rows(given.task, given.bbh)
    random.Random(0).shuffle(rows)
    started = nullcontext(given.api_base) if given.api_base else server(given)
    with started as address:
        lm = dspy.LM(
            f"openai/{given.name}",
            api_base=address,
            api_key="none",
            temperature=0.0,
            max_tokens=given.max_tokens,
            cache=False,
        )
        dspy.configure(lm=lm, adapter=dspy.ChatAdapter(use_json_adapter_fallback=False))
        program = dspy.ChainOfThought(dspy.Signature("question -> answer", "Answer the question."))
        optimizer = GReaTer(
            metric=exact_match,
            weights=str(given.weights),
            steps=given.steps,
            train_rows=given.rows,
            validation_rows=given.rows,
            num_threads=given.rows,
            progress=True,
        )
        since = time.monotonic()
        better = optimizer.compile(program, trainset=rows[: given.rows], valset=rows[given.rows : 2 * given.rows])
    details = better.detailed_results
    print(f"rows: {source}")
    print(details)
    server_told = details.server
    print(server_told)
    print(
        f"prompts that differ: {server_told.prompts_different} of {server_told.prompts}; tokens that the weights "
        f"here would have written: {server_told.agreed} of {server_told.written}"
    )
    given.out.mkdir(parents=True, exist_ok=True)
    told = {
        "weights": given.weights.name,
        "task": given.task,
        "rows": given.rows,
        "steps": len(details.steps),
        "seconds": round(time.monotonic() - since, 1),
        "seed_score": details.seed_score,
        "score": details.score,
        "found": better.predictors()[0].signature.instructions,
        "server": asdict(details.server),
        "faults": details.faults,
        "spent": details.spent,
    }
    (given.out / "result.json").write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
