"""`python -m benchmarks estimate`: what a search was said to cost, and what it cost.

Each line of the output is one search on one task: estimate over measured for seconds and for each kind of token.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dspy

from benchmarks.tasks import registry
from dspy_greater import GReaTer, local_lm
from dspy_greater.run.estimate import Cost, Estimate

KINDS = ("seconds", "read", "differentiated", "written", "tokens")


def ratios(told: Cost, spent: Cost) -> dict[str, float]:
    """Estimate over measured, by kind; what was not spent is left out.

    Example:
        >>> ratios(Cost(written=30.0, seconds=2.0), Cost(written=20.0, seconds=4.0))
        {'seconds': 0.5, 'written': 1.5, 'tokens': 1.5}
    """
    return {kind: getattr(told, kind) / getattr(spent, kind) for kind in KINDS if getattr(spent, kind)}


def measure(task: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The estimate of one search, and the search."""
    loaded = registry.load(task, data_dir=arguments.data_dir, seed=arguments.seed, limit=arguments.limit)
    program = loaded.make_program()
    search = GReaTer(
        metric=loaded.metric, variant=arguments.variant, auto=arguments.auto, steps=arguments.steps, seed=arguments.seed
    )
    told: Estimate = search.compile(program, loaded.train, valset=loaded.dev, dry_run=True)
    sys.stdout.write(f"{task}: {told}\n")
    details = search.compile(program, loaded.train, valset=loaded.dev).detailed_results
    spent = Cost.of(details.spent, details.seconds)
    found = ratios(told.total, spent)
    sys.stdout.write(f"{task}: {', '.join(f'{kind} {ratio:.2f}' for kind, ratio in found.items())} of what came\n")
    return {"task": task, "told": told.to_dict(), "seconds": spent.seconds, "spent": details.spent, "ratios": found}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks estimate", description=__doc__)
    made.add_argument("--model", default="pocket", help="'pocket', a hub id, a directory or a GGUF file")
    made.add_argument("--task", action="append", help="as `python -m benchmarks ls` lists them; may be repeated")
    made.add_argument("--data-dir", type=Path, help="directory with the benchmarks' files")
    made.add_argument("--auto", default="light", choices=("light", "medium", "heavy"))
    made.add_argument("--variant", default="default", choices=("default", "paper"))
    made.add_argument("--steps", type=int)
    made.add_argument("--limit", type=int, help="the most rows of each split")
    made.add_argument("--max-tokens", type=int, default=400, help="the most that the model may write at once")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, help="a JSON file for all of it")
    return made


def main(argv: Sequence[str]) -> int:
    """Run the command; 1 where any ratio of seconds or of all tokens is beyond 1.5 either way."""
    arguments = parser().parse_args(argv)
    with dspy.context(lm=local_lm(arguments.model, max_tokens=arguments.max_tokens)):
        found = [measure(task, arguments) for task in arguments.task or ["pocket:navigate"]]
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    within = [1 / 1.5 <= each["ratios"][kind] <= 1.5 for each in found for kind in ("seconds", "tokens")]
    return 0 if all(within) else 1
