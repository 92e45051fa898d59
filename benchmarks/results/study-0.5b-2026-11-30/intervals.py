"""Differences of `greater` to each peer on the same rows, with 95 % intervals: rows are drawn anew within tasks.

python benchmarks/results/study-0.5b-2026-11-30/intervals.py
"""

import json
import math
import random
from pathlib import Path

DRAWS = 10_000
cells = [json.loads(line) for line in (Path(__file__).parent / "cells.jsonl").read_text().splitlines()]
right = {(cell["optimizer"], cell["task"], cell["seed"]): cell["test"]["correct"] for cell in cells if cell["test"]}
peers = dict.fromkeys(name for name, *_ in right if name != "greater")


def exact(wins: int, losses: int) -> float:
    """McNemar's exact test, two-sided."""
    least, count = min(wins, losses), wins + losses
    return min(1.0, 2 * sum(math.comb(count, k) for k in range(least + 1)) / 2**count)


found = []
for peer in peers:
    pairs = [
        [ours - theirs for ours, theirs in zip(right["greater", task, seed], rows, strict=True)]
        for (name, task, seed), rows in right.items()
        if name == peer and ("greater", task, seed) in right
    ]
    every = [difference for cell in pairs for difference in cell]
    wins, losses = every.count(1), every.count(-1)
    draw = random.Random(0)
    means = sorted(sum(sum(draw.choices(cell, k=len(cell))) for cell in pairs) / len(every) for _ in range(DRAWS))
    low, high = means[int(0.025 * DRAWS)], means[int(0.975 * DRAWS)]
    found.append((exact(wins, losses), peer, len(every), wins, losses, sum(every) / len(every), low, high))

print("| peer | rows | only `greater` right | only the peer right | difference | 95 % interval | p (Holm) |")
print("| --- | --- | --- | --- | --- | --- | --- |")
corrected = 0.0
for place, (p, peer, rows, wins, losses, mean, low, high) in enumerate(sorted(found)):
    corrected = max(corrected, min(1.0, p * (len(found) - place)))
    shown = "< 0.001" if corrected < 0.001 else f"{corrected:.3f}"
    interval = f"{100 * low:+.1f} to {100 * high:+.1f}"
    print(f"| `{peer}` | {rows} | {wins} | {losses} | {100 * mean:+.1f} | {interval} | {shown} |")
