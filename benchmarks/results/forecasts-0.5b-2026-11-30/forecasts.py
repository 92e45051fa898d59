"""What off-policy forecasts of a real model are made of, reasoning by reasoning, beside what came.

    PYTHONPATH=. python benchmarks/results/forecasts-0.5b-2026-11-30/forecasts.py FILE.gguf --data-dir DIR \
        --known benchmarks/results/origins-0.5b-2026-11-30/origins.jsonl --task navigate  # whole instructions
    PYTHONPATH=. python benchmarks/results/forecasts-0.5b-2026-11-30/forecasts.py FILE.gguf --data-dir DIR \
        --task navigate --instruction "Make a decision based on the steps."  # edits at two positions

One line of JSON a candidate, with a row of `rows` for each of 24 reasonings: share, ℓ_m - b, mistake, log-likelihood of
the reasoning under the instruction now and under the candidate, cross-entropy of the gold answer under both, and tokens
that were generated. Whole instructions have the outcomes that `origins.py` recorded, edits reason here. Draw 2.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import dspy

from benchmarks.tasks.registry import load
from dspy_greater import GReaTer, local_lm
from dspy_greater.estimators.off_policy import likelihoods
from dspy_greater.objective.replay import advantages
from dspy_greater.search import written
from dspy_greater.search.default_step import DefaultStep, _Look
from dspy_greater.search.edits import propose_edits
from dspy_greater.search.phrases import propose_phrases
from dspy_greater.search.select import Selection
from dspy_greater.search.step import StepContext

DRAW, ROWS, EDITS, POSITIONS = 2, 24, 8, (0, 3)


@dataclass(frozen=True)
class Told(DefaultStep):
    """A step that tells what each candidate does to the reasonings at hand, and leaves the instruction as it is."""

    task: str = ""
    known: tuple[dict[str, Any], ...] = ()

    def take(self, at: StepContext) -> Any:
        """Whole instructions that are known, or some edits at one of the positions."""
        random, before = at.random(), at.evaluator.spent()
        if self.known:
            found = [(each, written._edit(at, each["text"], "written")) for each in self.known]
            self._tell(at, [(edit, each) for each, edit in found if edit is not None], random)
            return self._taken(_Look(at, (), {}, (), {}), [], Selection(at.current, "kept"), before)
        positions = at.evaluator.layout.edits.positions(at.current.token_ids)
        here = replace(at, state=replace(at.state, position=positions[POSITIONS[at.state.step] % len(positions)]))
        edits = [*propose_edits(here), *propose_phrases(here)]
        edits = Random(f"{self.task}/{here.state.position}").sample(edits, min(EDITS, len(edits)))
        evaluated = at.evaluator.evaluate([edit.instruction for edit in edits], at.model)
        outcomes = [{"kind": edit.kind, "score": one.score} for edit, one in zip(edits, evaluated, strict=True)]
        self._tell(here, list(zip(edits, outcomes, strict=True)), random)
        look = _Look(here, tuple(edits), {}, tuple(edits), {})
        return self._taken(look, evaluated, Selection(at.current, "kept"), before)

    def _tell(self, at: StepContext, candidates: Sequence[tuple[Any, dict[str, Any]]], random: Random) -> None:
        replay, heat = at.evaluator.replay(at.current, random, ROWS), at.settings.answer_temperature
        against = advantages(replay, baseline_scale=0.5)
        now = likelihoods(at.model, replay, answer_temperature=heat)
        for edit, outcome in candidates:
            moved = [run.under(edit.instruction.token_ids) for run in replay]
            then = likelihoods(at.model, moved, answer_temperature=heat)
            rows = [
                (run.share, more, run.mistake, old.generated, new.generated, old.answer, new.answer)
                for run, more, old, new in zip(replay, against, now, then, strict=True)
            ]
            told = {"task": self.task, "position": at.state.position, "text": edit.instruction.text}
            print(json.dumps({**told, **outcome, "rows": rows}), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """One task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--instruction", default="Answer the question.")
    parser.add_argument("--known", type=Path)
    given = parser.parse_args(argv)
    lines = [json.loads(line) for line in given.known.read_text().splitlines()] if given.known else []
    known = tuple(line for line in lines if line["task"] == given.task and line["kind"] != "seed")
    task = load(f"bbh:{given.task}", data_dir=given.data_dir, seed=DRAW, limit=ROWS)
    program = task.make_program()
    for predictor in program.predictors():
        signature: Any = predictor.signature
        predictor.signature = signature.with_instructions(given.instruction)
    knobs: dict[str, Any] = {"auto": None, "finalists": 1, "max_instruction_tokens": 40, "written": 0}
    steps = 1 if known else len(POSITIONS)
    lm = local_lm(given.model, max_tokens=160)
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter(use_json_adapter_fallback=False)):
        optimizer = GReaTer(task.metric, seed=DRAW, steps=steps, variant=Told(task=given.task, known=known), **knobs)
        optimizer.compile(program, trainset=list(task.train), valset=list(task.train)[:1])


if __name__ == "__main__":
    main()
