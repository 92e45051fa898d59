"""The log's figures, from the recorded reasonings.

    PYTHONPATH=. python benchmarks/results/forecasts-0.5b-2026-11-30/table.py

Spearman's ρ of forecasts with mistakes, a line a task or position: both terms as the default takes them, the gold
answers alone, the score term shrunk by James and Stein's factor, and 8 of the 24 outcomes drawn instead of a forecast.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from dspy_greater.stats import mean, spearman

ROWS, TRIED, DRAWS = 24, 8, 200


def terms(candidate: dict[str, Any]) -> tuple[list[float], list[float], list[float]]:
    """Of each reasoning: score term, answer term, and the product whose mean is the covariance of the first."""
    rows = [row[:7] for row in candidate["rows"]]  # one of each row, so that shares are 1
    ratios = [3 * math.tanh((after - before) / 3) for *_, before, after, _, _ in rows]
    mistakes, middle = mean([row[2] for row in rows]), mean(ratios)
    score = [row[1] * ratio for row, ratio in zip(rows, ratios, strict=True)]
    answers = [math.exp(-before) - math.exp(-after) for *_, before, after in rows]
    return score, answers, [(row[2] - mistakes) * (ratio - middle) for row, ratio in zip(rows, ratios, strict=True)]


def factor(products: Sequence[Sequence[float]]) -> float:
    """max(0, 1 - Σ s² / Σ C²) over candidates."""
    signal = sum(mean(each) ** 2 for each in products)
    noise = sum(sum((value - mean(each)) ** 2 for value in each) / len(each) / (len(each) - 1) for each in products)
    return max(0.0, 1 - noise / signal) if signal else 0.0


def by_runs(scores: Sequence[float]) -> float:
    """Mean ρ of the mistakes on some rows with those on all; draws without a difference say nothing."""
    random, found = Random(0), list[float]()
    for _ in range(DRAWS):
        right = [[1] * round(ROWS * score) + [0] * (ROWS - round(ROWS * score)) for score in scores]
        found.append(spearman([-sum(random.sample(each, TRIED)) for each in right], [-score for score in scores]))
    return mean([each for each in found if not math.isnan(each)])


def main() -> None:
    """A table for each file."""
    for name in ("whole", "edits", "edits-pocket"):
        groups: dict[str, list[dict[str, Any]]] = {}
        for line in (Path(__file__).parent / f"{name}.jsonl").read_text().splitlines():
            groups.setdefault(json.loads(line)["task"], []).append(json.loads(line))
        print(f"\n| {name} | candidates | both terms | answers | shrunk | factor | 8 runs |\n|{' --- |' * 7}")
        for task, candidates in groups.items():
            told, came = [terms(each) for each in candidates], [1 - each["score"] for each in candidates]
            trust = factor([products for *_, products in told])
            ranked = [
                spearman([mean(score) * weight + mean(answers) for score, answers, _ in told], came)
                for weight in (1.0, 0.0, trust)
            ]
            figures = [*ranked, trust, by_runs([each["score"] for each in candidates])]
            print(f"| {task} | {len(told)} | {' | '.join(f'{each:.2f}' for each in figures)} |")


if __name__ == "__main__":
    main()
