"""What the edit that is picked changes, by how it is picked, at positions whose edits were all tried.

    python benchmarks/results/payoffs-0.5b-2026-11-30/picks.py

Draw 3 has forecasts and slopes from 24 reasonings, and changes are mistakes a row. The other two have slopes from 24
and forecasts from four drawn ones, with the weights that the default gives them, and changes are of the objective.
Means over positions, and over 400 draws of what chance decides.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random
from statistics import fmean as mean
from typing import Any

RESULTS, DRAWS = Path(__file__).parent.parent, 400
Picks = dict[str, float]


def lines(path: Path) -> list[dict[str, Any]]:
    """Of a file with an object a line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def picks(changes: list[float], slopes: list[float | None], forecasts: list[float], random: Random) -> Picks:
    """Of one position, for one draw of what chance decides."""
    order = random.sample(range(len(changes)), len(changes))
    sloped = sorted((edit for edit in order if slopes[edit] is not None), key=lambda edit: slopes[edit] or 0.0)[:2]

    def best(some: list[int]) -> float:
        return changes[min(some, key=lambda edit: forecasts[edit])]

    found = {"chance": changes[order[0]], "forecast of six by chance": best(order[:6]), "forecast of all": best(order)}
    return found | {"best of all": min(changes)} | ({"forecast of the two best slopes": best(sloped)} if sloped else {})


def forecast(edit: dict[str, Any], rows: list[int]) -> float:
    """Both terms of the default, from some reasonings (`off_policy.forecast`)."""
    some = [edit["rows"][row][:7] for row in rows]
    score = mean([row[1] * 3 * math.tanh((row[4] - row[3]) / 3) for row in some])
    return score + mean([math.exp(-row[5]) - math.exp(-row[6]) for row in some])


def told(title: str, positions: list[list[Picks]]) -> None:
    """A line for each way to pick."""
    print(f"\n{title}, {len(positions)} positions")
    for name in positions[0][0]:
        print(f"  {name}: {mean([mean([draw[name] for draw in draws if name in draw]) for draws in positions]):+.3f}")


def main() -> None:
    """A list for each set of positions."""
    random = Random(0)
    found: list[list[Picks]] = []
    for path in sorted((RESULTS / "fidelity-0.5b-midway-2026-11-30").glob("*/positions.jsonl")):
        for at in lines(path):
            changes = [mistakes for mistakes, _ in at["realised"]]
            slopes, forecasts = at["predicted"]["score, centroid"], at["predicted"]["re-weighted scoring"]
            found.append([picks(changes, slopes, forecasts, random) for _ in range(DRAWS)])
    told("0.5B, draw 3, mistakes a row", found)
    for title, name in (("0.5B, draw 2, objective", "edits"), ("pocket, objective", "edits-pocket")):
        groups: dict[str, list[dict[str, Any]]] = {}
        for edit in lines(RESULTS / "forecasts-0.5b-2026-11-30" / f"{name}.jsonl"):
            groups.setdefault(edit["task"], []).append(edit)
        found = []
        for edits in groups.values():
            changes = [edit["objective"] - edit["now"][1] for edit in edits]
            draws = [random.sample(range(len(edits[0]["rows"])), 4) for _ in range(DRAWS)]
            slopes = [edit["slope"] for edit in edits]
            found.append([picks(changes, slopes, [forecast(edit, rows) for edit in edits], random) for rows in draws])
        told(title, found)


if __name__ == "__main__":
    main()
