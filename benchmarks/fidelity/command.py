"""`python -m benchmarks fidelity`: do gradients and forecasts come true?

Every candidate at some positions of some instructions is tried with reasoning of its own on real rows. Each ranking
that could have chosen among them is then compared with what came: by Spearman's ρ per position, and by how much of the
best gain is among its first three. A second table says how far each gradient agrees with the exact change that it
linearises. Positions that were measured are written at once; called again, the rest is done.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import dspy

from benchmarks.fidelity.measure import Measured, Plan, measure
from benchmarks.fidelity.rankings import RANKINGS
from benchmarks.fidelity.table import correlation, interval, linearisation_table, share_of_best_gain, table
from benchmarks.harness import config
from benchmarks.harness.models import task_model
from benchmarks.tasks.answers import metric_of
from benchmarks.tasks.bbh import normaliser
from dspy_greater.pocket.tasks import TASKS
from dspy_greater.settings import Settings

INSTRUCTIONS = ("Answer the question.", "Think your reasoning.", "Compute the place.")
# What searches from the first one came to: under these the model reasons, and mostly well.
MIDWAY: Mapping[str, Sequence[str]] = {
    "boolean_expressions": (
        "Use inner the reasoning.",
        "Reason reasoning only the question.",
        "Think each operator question.",
        "Resolve the logical",
    ),
    "web_of_lies": (
        "Think the question.",
        "Think person question.",
        "Reason person carefully.",
        "Trace each reasoning.",
    ),
    "object_counting": (
        "Count object question.",
        "List each thing.",
        "Think question step.",
        "Reason logical sum.",
    ),
    "navigate": (
        "Think' carefully about the question.",
        "Explain each question running.",
        "Explain the question.",
        "Follow your place.",
    ),
}


def main(argv: Sequence[str]) -> int:
    """Measure what is missing and print the table."""
    arguments = _parser().parse_args(argv)
    rankings = _chosen(arguments.rankings)
    judge = task_model(arguments.model, config.arguments(arguments.model_args)).judge
    with dspy.context(lm=judge, adapter=dspy.ChatAdapter(use_json_adapter_fallback=False)):
        return _measure(arguments, rankings)


def _measure(arguments: argparse.Namespace, rankings: Sequence[str]) -> int:
    arguments.out.mkdir(parents=True, exist_ok=True)
    done = _read(arguments.out / "positions.jsonl")
    for plan in _plans(arguments):
        if any(_key(at) == _key(plan) for at in done):
            continue
        rows = _rows(plan, arguments)
        started = time.monotonic()
        found = list(measure(plan, rows, metric_of(normaliser(f"bbh:{plan.task}")), rankings))
        seconds = time.monotonic() - started
        done += found
        _append(arguments.out / "positions.jsonl", found)
        said = f"{len(found)} positions, {seconds:.0f} s"
        sys.stderr.write(f"{plan.task}, {plan.instruction!r}, seed {plan.seed}: {said}\n")
    if not done:
        sys.stderr.write("Nothing was measured: no position had candidates.\n")
        return 1
    text = f"{table(done)}\n\n{linearisation_table(done)}"
    (arguments.out / "table.md").write_text(text + "\n")
    (arguments.out / "summary.json").write_text(json.dumps(_summary(done, arguments), indent=2) + "\n")
    sys.stdout.write(text + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks fidelity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="holds bbh/TASK.json")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--instructions", nargs="+", default=list(INSTRUCTIONS), help="that candidates are to improve")
    parser.add_argument("--midway", action="store_true", help="instead of these, instructions that searches came to")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--positions", type=int, default=3, help="of each instruction, at most")
    parser.add_argument("--candidates", type=int, default=10, help="at each position, at most")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--model", default="pocket", help="'pocket' (default), a directory, a GGUF file or a hub id")
    parser.add_argument("--model-args", default={}, help="key=value with commas between: dtype, max_tokens, ...")
    parser.add_argument("--rankings", nargs="+", default=["*"], help="by name or pattern, such as 'whole*' random")
    parser.add_argument("--out", type=Path, default=Path("runs/fidelity"))
    return parser


def _plans(arguments: argparse.Namespace) -> list[Plan]:
    settings = Settings.of("light", train_rows=arguments.rows, minimum_candidates=arguments.candidates)
    begun_at = INSTRUCTIONS[0] if arguments.midway else None
    tasks = arguments.tasks.split(",")
    if arguments.midway and (strangers := [task for task in tasks if task not in MIDWAY]):
        sys.exit(f"There are no midway instructions for {', '.join(strangers)}; there are for {', '.join(MIDWAY)}.")
    return [
        Plan(task, instruction, int(seed), arguments.positions, arguments.candidates, settings, begun_at)
        for seed in arguments.seeds.split(",")
        for task in tasks
        for instruction in (MIDWAY[task] if arguments.midway else arguments.instructions)
    ]


def _chosen(patterns: Sequence[str]) -> list[str]:
    """Rankings by name or pattern, in the order of the table."""
    for pattern in patterns:
        if not fnmatch.filter(RANKINGS, pattern):
            sys.exit(f"There is no ranking {pattern!r}. There are: {'; '.join(RANKINGS)}.")
    return [name for name in RANKINGS if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def _key(at: Plan | Measured) -> tuple[str, str, int, str | None]:
    return at.task, at.instruction, at.seed, at.begun_at


def _rows(plan: Plan, arguments: argparse.Namespace) -> list[Any]:
    path = arguments.data_dir / "bbh" / f"{plan.task}.json"
    if not path.is_file():
        sys.exit(f"There is no {path}. --data-dir names the directory that holds bbh/{plan.task}.json.")
    raw = json.loads(path.read_text())["examples"]
    drawn = Random(f"{plan.task}/{plan.seed}/rows").sample(raw, arguments.rows)
    return [dspy.Example(question=row["input"], answer=row["target"]).with_inputs("question") for row in drawn]


def _summary(done: Sequence[Measured], arguments: argparse.Namespace) -> dict[str, Any]:
    def told(values: list[float]) -> dict[str, float]:
        mean, low, high = interval(values)
        return {"mean": mean, "low": low, "high": high}

    return {
        "positions": len(done),
        "settings": {name: str(value) for name, value in vars(arguments).items()},
        "rankings": {
            name: {
                "correlation": told([correlation(at, name) for at in done]),
                "share_of_best_gain": told([share_of_best_gain(at, name) for at in done]),
            }
            for name in done[0].predicted
        },
    }


def _append(path: Path, found: Sequence[Measured]) -> None:
    with path.open("a") as lines:
        for at in found:
            lines.write(json.dumps(asdict(at)) + "\n")


def _read(path: Path) -> list[Measured]:
    if not path.is_file():
        return []
    found: list[Measured] = []
    for line in path.read_text().splitlines():
        raw = json.loads(line)
        raw["candidates"] = tuple(raw["candidates"])
        raw["realised"] = tuple(
            (mistakes, loss if loss is not None else math.nan) for mistakes, loss in raw["realised"]
        )
        raw["predicted"] = {name: tuple(values) for name, values in raw["predicted"].items()}
        found.append(Measured(**raw))
    return found
