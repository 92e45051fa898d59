"""Rollouts on llama.cpp's server, gradients here on the same GGUF file: `python examples/llama_cpp.py FILE.gguf`.

With `--server-python` a server is started by `serve_gguf.py` in that environment and ended afterwards, as `make served`
does; with `--api-base` the one that you run already is asked, such as `http://localhost:8080/v1`. Prints what was
found, and how far the server is the model that is loaded here. Rows are as in `quickstart.py`.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import dspy
from quickstart import exact_match, load_rows

from dspy_greater import GReaTer

HERE = Path(__file__).resolve().parent


@contextmanager
def server(python: str, weights: Path, port: int, parallel: int) -> Iterator[str]:
    """A server over the file, while the block lasts; its address."""
    command = [python, str(HERE / "serve_gguf.py"), str(weights), "--port", str(port), "--parallel", str(parallel)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith("serving"):
                sys.exit(f"The server did not start. Try it alone: {' '.join(command)}")
            yield line.split()[-1]
        finally:
            process.terminate()


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, metavar="FILE.gguf")
    parser.add_argument("--server-python", help="of an environment with xllamacpp")
    parser.add_argument("--api-base", help="of a server that runs already")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--task", default="navigate")
    parser.add_argument("--bbh", type=Path, help="directory with the BIG-Bench Hard files")
    parser.add_argument("--rows", type=int, default=8, help="to search on, and to choose on")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=120)
    parser.add_argument("--out", type=Path, default=Path("runs/llama-cpp"))
    given = parser.parse_args()
    if (given.api_base is None) == (given.server_python is None):
        parser.error("give --api-base or --server-python, one of the two")
    return given


def main() -> None:
    """Search, and say what answered."""
    given = parse_arguments()
    rows, source = load_rows(given.task, given.bbh)
    random.Random(0).shuffle(rows)
    started = (
        nullcontext(given.api_base)
        if given.api_base
        else server(given.server_python, given.weights, given.port, parallel=given.rows)
    )
    with started as address:
        lm = dspy.LM(
            "openai/local", api_base=address, api_key="none", temperature=0.0, max_tokens=given.max_tokens, cache=False
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
