"""Four recorded searches on the packaged model, and how a search is told for the record.

`python tests/golden_runs.py [NAME ...]` writes them anew. Do so only where a search was meant to change, and say in the
commit what changed and why.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import dspy

from benchmarks.tasks.two_step import DecomposeThenAnswer
from dspy_greater import GReaTerTeleprompter, local_lm
from dspy_greater.pocket.tasks import generate, work_out
from dspy_greater.program.copies import with_instructions
from dspy_greater.run.events import SearchStarted, StepTaken, Validated

FOLDER = Path(__file__).parent / "golden" / "searches"


def rows(task: str, count: int, *, answer: str = "answer") -> list[Any]:
    drawn = random.Random(f"golden/{task}")
    questions = [generate(task, drawn) for _ in range(count)]
    return [
        dspy.Example(**{"question": each, answer: work_out(task, each).answer}).with_inputs("question")
        for each in questions
    ]


def exact_match(example: Any, prediction: Any, trace: Any = None) -> bool:
    return str(prediction.answer).strip() == example.answer


def matches_label(example: Any, prediction: Any, trace: Any = None) -> bool:
    return str(prediction.answer).strip() == example.label


def default() -> list[Any]:
    return searched(plain(), rows("navigate", 12), steps=6)


def paper() -> list[Any]:
    return searched(plain(), rows("object_counting", 12), steps=5, variant="paper")


def without_gold_values() -> list[Any]:
    return searched(plain(), rows("boolean_expressions", 12, answer="label"), steps=5, metric=matches_label)


def two_predictors() -> list[Any]:
    return searched(DecomposeThenAnswer(), rows("web_of_lies", 8), steps=2, max_tokens=60)


SEARCHES = {each.__name__: each for each in (default, paper, without_gold_values, two_predictors)}


def plain() -> Any:
    return with_instructions(dspy.ChainOfThought("question -> answer"), {"predict": "Answer the question."})


def searched(
    program: Any, found: list[Any], *, metric: Any = exact_match, max_tokens: int = 200, **settings: Any
) -> list[Any]:
    """Every event of a search, told."""
    events: list[Any] = []
    optimizer = GReaTerTeleprompter(
        metric=metric,
        auto=None,
        train_rows=8,
        validation_rows=8,
        progress=False,
        listeners=[events.append],
        **{"phrases": 0, "written": 0, "forecast_share": 0, **settings},
    )
    with dspy.context(lm=local_lm("pocket", dtype="float64", cache=False, max_tokens=max_tokens)):
        optimizer.compile(program, found[: len(found) // 2], valset=found[len(found) // 2 :])
    return [told(event) for event in events]


def told(event: Any) -> dict[str, Any]:
    """An event as plain values: instructions, numbers and digests of texts; no cost, which may fall."""
    if isinstance(event, SearchStarted):
        return {"event": "started", "predictor": event.predictor, "seed": evaluation(event.seed)}
    if isinstance(event, StepTaken):
        return {
            "event": "step",
            "predictor": event.predictor,
            "step": event.step,
            "position": event.position,
            "current_token": event.current_token,
            "candidates": [candidate(each) for each in event.candidates],
            "chosen": event.chosen.instruction,
            "reason": re.sub(r"[0-9.-]+", "#", event.reason),  # its numbers stand in the evaluations
        }
    if isinstance(event, Validated):
        return {"event": "validated", "predictor": event.predictor, "scores": event.scores, "winner": event.winner}
    return {"event": "warned", "message": event.message}


def candidate(found: Any) -> dict[str, Any]:
    return {
        "token": found.token,
        "edit": found.edit,
        "numbers": [found.log_probability, found.gradient, found.forecast, found.effective_samples],
        "realised": found.realised,
        "evaluation": None if found.evaluation is None else evaluation(found.evaluation),
    }


def evaluation(found: Any) -> dict[str, Any]:
    return {
        "instruction": found.instruction,
        "token_ids": found.token_ids,
        "numbers": [found.score, found.cross_entropy, found.fluency_nll, *found.objective],
        "rows": [
            {"row": each.row, "numbers": [each.score, each.cross_entropy], "text": digest(each)} for each in found.rows
        ],
    }


def digest(row: Any) -> str:
    """Of everything that was read and written on a row."""
    calls = [(call.inputs, call.completion) for call in row.calls]
    return hashlib.sha256(repr((row.inputs, row.written, row.preamble, calls, row.error)).encode()).hexdigest()[:12]


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, search in SEARCHES.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        lines = [json.dumps(each, separators=(",", ":")) for each in search()]
        (FOLDER / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
