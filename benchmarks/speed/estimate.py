"""`python -m benchmarks estimate`: what a search was said to cost, and what it cost.

For each task a search is estimated by a dry run, taken, and held against the estimate and against what its first steps
corrected that to: seconds, and tokens of each kind. The table is Markdown. The three searches on a real model that the
log tells of:

    OMP_NUM_THREADS=1 python -m benchmarks estimate --model FILE.gguf --data-dir DIR --max-tokens 100 --limit 60 \
        --train-rows 12 --validation-rows 10 --steps 4 \
        --task bbh:object_counting --task bbh:navigate --task bbh:reasoning_about_colored_objects
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dspy

from benchmarks.tasks import registry
from dspy_greater import GReaTer, local_lm
from dspy_greater.run.estimate import Cost, Estimate, count
from dspy_greater.run.events import Event, StepTaken
from dspy_greater.run.outlook import Outlook, Plan

KINDS = ("seconds", "read", "differentiated", "written", "tokens")
FIRST = 3  # steps after which the estimate is asked for again, as the log does
_HEAD = "| task | what | told | low to high | after 3 steps | taken | told / taken | after 3 steps / taken |"


class Corrected:
    """A listener that keeps what the first steps make of an estimate."""

    def __init__(self, told: Estimate) -> None:
        plan = Plan(told.predictors, round(told.validation.runs))
        self._outlook, self._told = Outlook(plan, told), told
        self.found: Estimate | None = None

    def __call__(self, event: Event) -> None:
        """Take the event in."""
        self._outlook(event)
        if isinstance(event, StepTaken) and self._outlook.taken == min(FIRST, self._told.steps):
            self.found = self._outlook.corrected()


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
    asked = {
        "metric": loaded.metric,
        "variant": arguments.variant,
        "auto": arguments.auto,
        "steps": arguments.steps,
        "train_rows": arguments.train_rows,
        "validation_rows": arguments.validation_rows,
        "seed": arguments.seed,
    }
    told: Estimate = GReaTer(**asked).compile(program, loaded.train, valset=loaded.dev, dry_run=True)
    sys.stderr.write(f"{task}: {told}\n")
    corrected = Corrected(told)
    search = GReaTer(**asked, callbacks=[corrected])
    details = search.compile(program, loaded.train, valset=loaded.dev).detailed_results
    spent = Cost.of(details.spent, details.seconds)
    later = told if corrected.found is None else corrected.found
    return {
        "task": task,
        "told": told.to_dict(),
        "after_first_steps": later.to_dict(),
        "taken": {**asdict(spent), "tokens": spent.tokens},
        "steps": [{**each.spent, "seconds": each.seconds} for each in details.steps],
        "ratios": ratios(told.total, spent),
        "ratios_after_first_steps": ratios(later.total, spent),
        "rows": lines(task, told, later, spent),
    }


def lines(task: str, told: Estimate, later: Estimate, spent: Cost) -> list[str]:
    """Rows of the table, a kind each."""
    first, second = ratios(told.total, spent), ratios(later.total, spent)
    return [
        f"| {task} | {kind} | {count(getattr(told.total, kind))} | {count(getattr(told.low, kind))} to "
        f"{count(getattr(told.high, kind))} | {count(getattr(later.total, kind))} | {count(getattr(spent, kind))} | "
        f"{first[kind]:.2f} | {second[kind]:.2f} |"
        for kind in first
    ]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks estimate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", default="pocket", help="'pocket', a hub id, a directory or a GGUF file")
    made.add_argument("--task", action="append", help="as `python -m benchmarks ls` lists them; may be repeated")
    made.add_argument("--data-dir", type=Path, help="directory with the benchmarks' files")
    made.add_argument("--auto", default="light", choices=("light", "medium", "heavy"))
    made.add_argument("--variant", default="default", choices=("default", "paper"))
    made.add_argument("--steps", type=int)
    made.add_argument("--train-rows", type=int, help="rows to search on (default: the preset's)")
    made.add_argument("--validation-rows", type=int, help="rows to choose on (default: the preset's)")
    made.add_argument("--limit", type=int, help="the most rows of each split")
    made.add_argument("--max-tokens", type=int, default=400, help="the most that the model may write at once")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, help="a JSON file for all of it")
    return made


def main(argv: Sequence[str]) -> int:
    """Run the command; 1 where any ratio of seconds or of all tokens is beyond 1.5 either way."""
    arguments = parser().parse_args(argv)
    sys.stdout.write(f"{_HEAD}\n|{' --- |' * (_HEAD.count('|') - 1)}\n")
    found: list[dict[str, Any]] = []
    with dspy.context(lm=local_lm(arguments.model, max_tokens=arguments.max_tokens)):
        for task in arguments.task or ["pocket:navigate"]:
            found.append(measure(task, arguments))
            sys.stdout.write("\n".join(found[-1]["rows"]) + "\n")
            sys.stdout.flush()
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    within = [1 / 1.5 <= each["ratios"][kind] <= 1.5 for each in found for kind in ("seconds", "tokens")]
    return 0 if all(within) else 1
