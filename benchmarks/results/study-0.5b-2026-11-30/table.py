"""The study's table: accuracy on the test rows in %, draw 0 / draw 1, by optimizer and task.

python benchmarks/results/study-0.5b-2026-11-30/table.py
"""

import json
from pathlib import Path

TASKS = ("navigate", "web_of_lies", "reasoning_about_colored_objects", "temporal_sequences")
cells = [json.loads(line) for line in (Path(__file__).parent / "cells.jsonl").read_text().splitlines()]
found = {
    (cell["optimizer"], cell["task"].removeprefix("bbh:"), cell["seed"]): cell["test"]["accuracy"]
    for cell in cells
    if cell["test"]
}
# The seed instruction is run in every cell; a cell of its own comes first.
of_seed = {
    ("seed", cell["task"].removeprefix("bbh:"), cell["seed"]): cell["seed_test"]["accuracy"]
    for cell in cells
    if cell["seed_test"]
}
found = of_seed | found


def shown(values: list[float | None]) -> str:
    """Both draws; the first alone where the second was not run."""
    told = ["" if value is None else f"{100 * value:.1f}" for value in values]
    return " / ".join(text or "-" for text in told) if told[1] else told[0]


def mean(optimizer: str, draw: int) -> float | None:
    """Over the tasks; None where one was not run."""
    values = [found.get((optimizer, task, draw)) for task in TASKS]
    known = [value for value in values if value is not None]
    return sum(known) / len(TASKS) if len(known) == len(TASKS) else None


def rank(optimizer: str) -> float:
    """The best first, by the mean of both draws."""
    means = [value for draw in (0, 1) if (value := mean(optimizer, draw)) is not None]
    return -sum(means) / len(means) if means else 0.0


names = sorted({name for name, *_ in found if name != "seed"}, key=rank)
print(f"| optimizer | {' | '.join(TASKS)} | mean |")
print(f"|{' --- |' * 6}")
for name in ["seed", *names]:
    by_task = [shown([found.get((name, task, draw)) for draw in (0, 1)]) for task in TASKS]
    print(f"| `{name}` | {' | '.join(by_task)} | {shown([mean(name, draw) for draw in (0, 1)])} |")
