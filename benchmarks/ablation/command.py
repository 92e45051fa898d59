"""`python -m benchmarks ablation`: what each part of the search is worth at equal generated tokens.

Every variant searches on the same rows from the same instruction until it has generated so many tokens; the
instruction that it returns answers rows that no search saw. Finished cells are written at once; called again, the rest
is done, and the table is of the asked seeds, tasks and variants. `--sweeps` adds single knobs, `--reasonings` a table
of what was reasoned before the answers, `--along` one of how far searches came with smaller budgets.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import dspy

from benchmarks.ablation import along, reasonings
from benchmarks.ablation.table import BASELINE, table
from benchmarks.ablation.variants import FROM, STARTS, SWEEPS, VARIANTS, Variant
from dspy_greater import GReaTerTeleprompter, local_lm
from dspy_greater.pocket.tasks import TASKS
from dspy_greater.program.copies import with_instructions
from dspy_greater.report.result import PredictorResult
from dspy_greater.settings import Settings

_STEPS = 150  # where nothing new can be generated, the budget alone would not end a search
_TRAIN, _VALIDATION, _TEST = 50, 50, 100


def exact_match(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> bool:
    """Whether the answer is the gold one, case and blanks aside."""
    return str(prediction.answer).strip().lower() == str(example.answer).strip().lower()


def main(argv: Sequence[str]) -> int:
    """Run the cells that are missing and print the table."""
    arguments = _parser().parse_args(argv)
    if too_large := [budget for budget in arguments.along if budget >= arguments.generated_tokens]:
        sys.exit(f"--along {too_large[0]}: give budgets below --generated-tokens {arguments.generated_tokens}.")
    known = _variants()
    names = arguments.variants.split(",") if arguments.variants else [*VARIANTS, *(SWEEPS if arguments.sweeps else [])]
    if strangers := [name for name in names if name not in known]:
        sys.exit(f"There is no variant {', '.join(strangers)}. There are: {', '.join(known)}.")
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "cells.jsonl"
    lm = local_lm(arguments.model)
    asked = list(product(map(int, arguments.seeds.split(",")), arguments.tasks.split(","), names))
    for seed, task, name in asked:
        if (seed, task, name) not in map(_key, _read(path, arguments.generated_tokens)):
            cell = _cell(task, seed, name, lm, arguments)
            with path.open("a") as lines:
                lines.write(json.dumps(cell) + "\n")
            sys.stderr.write(f"{task}, seed {seed}, {name}: {cell.get('accuracy', cell.get('error'))}\n")
    cells = [cell for cell in _read(path, arguments.generated_tokens) if _key(cell) in asked]
    text = table(cells)
    if arguments.reasonings:
        text += "\n\n" + _reasonings([cell for cell in cells if cell["variant"] == names[0]], lm, arguments.data_dir)
    if arguments.along:
        text += "\n\n" + along.table(cells, BASELINE if BASELINE in names else names[0])
    (arguments.out / "table.md").write_text(text + "\n")
    sys.stdout.write(text + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks ablation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="holds bbh/TASK.json")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument(
        "--variants",
        help=f"of {', '.join(VARIANTS)}; sweeps: {', '.join(SWEEPS)}; from another instruction: {', '.join(STARTS)}, "
        "alone for the default or with a hyphen before another variant",
    )
    parser.add_argument("--sweeps", action="store_true", help="all variants and all sweeps")
    parser.add_argument(
        "--reasonings", action="store_true", help="how far right reasoning explains the first variant's gain"
    )
    parser.add_argument(
        "--along",
        type=_numbers,
        default=(),
        metavar="TOKENS,...",
        help="smaller budgets at which new searches are looked at, too",
    )
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--generated-tokens", type=int, default=30_000, help="of one search, the seed's rows included")
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _cell(task: str, seed: int, name: str, lm: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """One search and its accuracy on unseen rows; a failure is a cell with its error."""
    cell: dict[str, Any] = {"task": task, "seed": seed, "variant": name, "budget": arguments.generated_tokens}
    started = time.monotonic()
    try:
        with dspy.context(lm=lm):
            cell |= _searched(task, seed, name, arguments)
    except Exception as error:  # a cell must not take the others with it
        cell |= {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    return cell | {"seconds": round(time.monotonic() - started, 1)}


def _searched(task: str, seed: int, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    variant = _variants()[name]
    train, validation, test = _rows(task, seed, arguments.data_dir)
    student = with_instructions(dspy.ChainOfThought("question -> answer"), {"predict": variant.instruction})
    optimizer = GReaTerTeleprompter(
        metric=exact_match,
        variant=variant.step,
        auto=None,
        seed=seed,
        steps=_STEPS,
        max_generated_tokens=arguments.generated_tokens,
        progress=False,
        **variant.settings,
    )
    best = optimizer.compile(student, trainset=train, valset=validation)
    (found,) = best.detailed_results.predictors
    correct, before = _correct(best, test), _correct(student, test)
    return {
        "instruction": found.instruction,
        "correct": correct,
        "accuracy": sum(correct) / len(correct),
        "seed_accuracy": sum(before) / len(before),
        "steps": len(found.steps),
        "fidelity": found.fidelity,
        "cross_entropy": {"seed": found.seed.cross_entropy, "best": found.finalists[0].cross_entropy},
        "spent": found.spent_by_phase["search"],
    } | ({"along": _along(found, variant, student, validation, test, arguments)} if arguments.along else {})


def _along(
    found: PredictorResult, variant: Variant, student: Any, validation: Any, test: Any, arguments: argparse.Namespace
) -> dict[str, Any]:
    """By smaller budget, and by the whole: the instruction that the search had come to, and its accuracy."""

    def accuracy(text: str, rows: Sequence[Any]) -> float:
        return sum(_correct(with_instructions(student, {"predict": text}), rows)) / len(rows)

    reached: dict[str, Any] = {}
    for budget in (*arguments.along, arguments.generated_tokens):
        settings = Settings.of(None, steps=_STEPS, max_generated_tokens=budget, **variant.settings)
        text = along.instruction_at(found, settings, lambda text: accuracy(text, validation))
        reached[str(budget)] = {"instruction": text, "accuracy": accuracy(text, test)}
    return reached


def _reasonings(cells: Sequence[dict[str, Any]], lm: Any, data_dir: Path) -> str:
    """The test rows once more, under the seed and under the found instruction of every search."""
    pairs: dict[str, tuple[reasonings.Answered, reasonings.Answered]] = {}
    for cell in (cell for cell in cells if "instruction" in cell):
        task, student = cell["task"], dspy.ChainOfThought("question -> answer")
        *_, test = _rows(task, cell["seed"], data_dir)
        texts = (_variants()[cell["variant"]].instruction, cell["instruction"])
        with dspy.context(lm=lm):
            found = [_answers(with_instructions(student, {"predict": text}), test) for text in texts]
        before, after = (reasonings.answered(task, each) for each in found)
        known = pairs.get(task)
        pairs[task] = (known[0] + before, known[1] + after) if known else (before, after)
    return reasonings.table(pairs)


def _correct(program: Any, rows: Sequence[Any]) -> list[int]:
    return [int(score) for _, _, score in _answers(program, rows)]


def _answers(program: Any, rows: Sequence[Any]) -> list[tuple[Any, Any, Any]]:
    """(row, prediction, score) of every row."""
    evaluate = dspy.Evaluate(
        devset=list(rows), metric=exact_match, num_threads=len(rows), display_progress=False, max_errors=len(rows)
    )
    return evaluate(program).results


def _rows(task: str, seed: int, data_dir: Path) -> tuple[list[Any], list[Any], list[Any]]:
    path = data_dir / "bbh" / f"{task}.json"
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}; --data-dir names the directory that holds bbh/{task}.json.")
    raw = json.loads(path.read_text())["examples"]
    rows = [dspy.Example(question=row["input"], answer=row["target"]).with_inputs("question") for row in raw]
    rows = Random(f"ablation/{task}/{seed}").sample(rows, _TRAIN + _VALIDATION + _TEST)
    return rows[:_TRAIN], rows[_TRAIN : _TRAIN + _VALIDATION], rows[_TRAIN + _VALIDATION :]


def _variants() -> dict[str, Variant]:
    return {**VARIANTS, **SWEEPS, **FROM}


def _key(cell: dict[str, Any]) -> tuple[int, str, str]:
    return cell["seed"], cell["task"], cell["variant"]


def _read(path: Path, budget: int) -> list[dict[str, Any]]:
    """The finished cells of this budget."""
    cells = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [cell for cell in cells if cell["budget"] == budget]
