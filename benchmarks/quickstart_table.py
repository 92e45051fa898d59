"""The quickstart on every pocket task and several seeds, as a table (docs/results.md).

    python -m benchmarks.quickstart_table --bbh DIR/bbh --seeds 3 --out runs/quickstart-table

Runs `examples/quickstart.py` once per task and seed, each in its own process and directory; a
run whose `result.json` is there already is not run again. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from dspy_greater.pocket.tasks import TASKS

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.py"


def run(task: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One quickstart, or the result of an earlier one."""
    out = arguments.out / f"{task}-{seed}"
    if not (out / "result.json").is_file():
        command = [sys.executable, str(QUICKSTART), "--task", task, "--seed", str(seed), "--out", str(out)]
        command += ["--bbh", str(arguments.bbh)] if arguments.bbh else []
        subprocess.run([*command, *arguments.extra], check=True)
    return json.loads((out / "result.json").read_text())


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row per task and seed."""
    lines = [
        "| task | seed | before, % | after, % | 95 % interval | found instruction | search |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        low, high = (100 * bound for bound in result["found_interval"])
        lines.append(
            f"| {result['task']} | {result['seed']} | {100 * result['seed_accuracy']:.0f} "
            f"| **{100 * result['found_accuracy']:.0f}** | {low:.0f} to {high:.0f} "
            f"| {result['found_instruction']} | {result['steps']} steps, {result['search_seconds']:.0f} s |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bbh", type=Path, help="directory with the BIG-Bench Hard files")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart-table"))
    parser.add_argument("extra", nargs="*", help="passed on to the quickstart, after --")
    arguments = parser.parse_args()
    results = [run(task, seed, arguments) for task in arguments.tasks.split(",") for seed in range(arguments.seeds)]
    text = table(results)
    (arguments.out / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
