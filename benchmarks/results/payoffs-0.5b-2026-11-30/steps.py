"""What the steps of the study's searches paid, from their journals.

    python benchmarks/results/payoffs-0.5b-2026-11-30/steps.py

prints the log's tables: of searches before steps were chosen by what they paid (`steps.jsonl`), after it
(`steps-after.jsonl`), and with the mended search (`steps-mended.jsonl`). `steps.py JOURNAL.jsonl ...` writes such
lines for other searches, with 6 whole instructions a step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

KINDS = ("the first, whole instructions", "whole instructions, later", "edits")


def steps_of(journal: Path) -> list[dict[str, Any]]:
    """A line a step: its kind, what it was charged, and how many more training rows are right than ever before."""
    name, found, best = journal.parts[-3].split("-_root")[0], list[dict[str, Any]](), 0
    for line in journal.read_text().splitlines():
        event = json.loads(line)["payload"]
        if event.get("type") == "SearchStarted":
            best = _right(event["seed"])
        if event.get("type") == "StepTaken":
            edits = [candidate["edit"] for candidate in event["candidates"]]
            origins = [candidate["origin"] for candidate in event["candidates"]]
            kind = KINDS[2] if not {"rewrite"} & {*edits} else KINDS[0 if event["step"] == 0 else 1]
            tried = [candidate["evaluation"] for candidate in event["candidates"] if candidate["evaluation"]]
            right = max(map(_right, [event["chosen"], *tried]))
            spent = event["spent"]
            charged = spent["prefilled_tokens"] + spent["generated_tokens"] + 2 * spent.get("backward_tokens", 0)
            gained, usable = max(0, right - best), origins.count("written")
            asked = 6 - origins.count("form") if kind != KINDS[2] else 0
            told = {"search": name, "kind": kind, "charged": charged, "gained": gained}
            found.append({**told, "asked": asked, "usable": usable})
            best = max(best, right)
    return found


def _right(evaluation: dict[str, Any]) -> int:
    return sum(row["score"] for row in evaluation["rows"])


def main() -> None:
    """The tables, or the lines of other journals."""
    if sys.argv[1:]:
        for journal in sys.argv[1:]:
            for step in steps_of(Path(journal)):
                print(json.dumps(step))
        return
    for name in ("steps", "steps-after", "steps-mended"):
        tables([json.loads(line) for line in (Path(__file__).parent / f"{name}.jsonl").read_text().splitlines()])


def tables(steps: list[dict[str, Any]]) -> None:
    """What each kind of step paid, and how many of the model's answers could be tried."""
    print("\n| arm | kind of step | steps | paid | charged tokens a step | rows gained, all steps |\n|" + " --- |" * 6)
    for arm in ("greater", "random-search"):
        for kind in KINDS:
            some = [step for step in steps if step["kind"] == kind and f"-{arm}-" in step["search"]]
            paid, gained = sum(step["gained"] > 0 for step in some), sum(step["gained"] for step in some)
            charged = sum(step["charged"] for step in some) // max(1, len(some))
            print(f"| `{arm}` | {kind} | {len(some)} | {paid} | {charged:,} | {gained:g} |")
    for kind in KINDS[:2]:
        some = [step for step in steps if step["kind"] == kind]
        asked, usable = (sum(step[what] for step in some) for what in ("asked", "usable"))
        print(f"\n{kind}: {usable} of {asked} answers could be tried, over {len(some)} steps")


if __name__ == "__main__":
    main()
