"""Rollouts on a server, gradients here on the same weights: `python examples/served_search.py WEIGHTS`.

With `--server` a server is started, out of the environment of `--server-python`, and ended afterwards, as `make served`
does; with `--api-base` the one that you run already is asked, such as `http://localhost:8080/v1`. Prints what was
found, and how far the server is the model that is loaded here. Rows are as in `quickstart.py`.

`llama.cpp` serves a GGUF file by `serve_gguf.py`; `vllm` serves a directory of weights, in float32 on a CPU.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import dspy
from quickstart import exact_match, load_rows
from server_process import NotUpError, server_process

from dspy_greater import GReaTer, pocket

HERE = Path(__file__).resolve().parent
# What vLLM needs on a CPU: a bound for its memory in GiB, and threads that the system places.
ON_A_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}

OF_THIS_MACHINE = ("url", "said", "weights")  # addresses and paths


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
    address = f"http://127.0.0.1:{given.port}"
    with server_process(command(given), address, environment=ON_A_CPU, seconds=given.start_seconds):
        yield f"{address}/v1"


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
    since = time.monotonic()
    try:
        with nullcontext(given.api_base) if given.api_base else server(given) as address:
            better = search(given, rows, address)
    except NotUpError as error:
        sys.exit(str(error))
    print(f"rows: {source}")
    report(given, better, round(time.monotonic() - since, 1))


def search(given: argparse.Namespace, rows: list[dspy.Example], address: str) -> dspy.Module:
    """A program with a better instruction; the server at this address runs it meanwhile."""
    model, limit = f"openai/{given.name}", given.max_tokens
    lm = dspy.LM(model, api_base=address, api_key="none", temperature=0.0, max_tokens=limit, cache=False)
    dspy.configure(lm=lm, adapter=dspy.ChatAdapter(use_json_adapter_fallback=False))
    optimizer = GReaTer(
        metric=exact_match,
        weights=str(given.weights),
        steps=given.steps,
        train_rows=given.rows,
        validation_rows=given.rows,
        num_threads=given.rows,
        progress=True,
    )
    program = dspy.ChainOfThought(dspy.Signature("question -> answer", "Answer the question."))
    return optimizer.compile(program, trainset=rows[: given.rows], valset=rows[given.rows : 2 * given.rows])


def report(given: argparse.Namespace, better: dspy.Module, seconds: float) -> None:
    """Print what was found and how alike the server is, and write both to a file."""
    details = better.detailed_results
    server_told = details.server
    print(details)
    print(server_told)
    print(
        f"prompts that differ: {server_told.prompts_different} of {server_told.prompts}; tokens that the weights "
        f"here would have written: {server_told.agreed} of {server_told.written}"
    )
    given.out.mkdir(parents=True, exist_ok=True)
    told = {
        "weights": "pocket" if given.weights == Path(pocket.path()) else given.weights.name,
        "task": given.task,
        "rows": given.rows,
        "steps": len(details.steps),
        "seconds": seconds,
        "seed_score": details.seed_score,
        "score": details.score,
        "found": better.predictors()[0].signature.instructions,
        "server": {name: value for name, value in asdict(server_told).items() if name not in OF_THIS_MACHINE},
        "faults": details.faults,
        "spent": details.spent,
    }
    (given.out / "result.json").write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
