"""What whole instructions of three origins are worth: each of them reasons on all training rows of a task.

    PYTHONPATH=. python benchmarks/results/origins-0.5b-2026-11-30/origins.py FILE.gguf --data-dir DIR --tasks navigate

One line of JSON an instruction. Rows are the first 24 training rows of draw 2. Requests are those of
`dspy_greater.search.written`, forms some ways of saying what `dspy_greater.search.answer_form` says.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import dspy

from benchmarks.tasks.registry import load
from dspy_greater import GReaTer, local_lm
from dspy_greater.model.interface import GenerationRequest
from dspy_greater.search import written
from dspy_greater.search.default_step import DefaultStep, _Look
from dspy_greater.search.select import Selection
from dspy_greater.search.step import StepContext

DRAW, ROWS, EACH = 2, 24, 8
ORIGINS = ("answers", "mistakes", "form")


@dataclass(frozen=True)
class OfOneOrigin(DefaultStep):
    """A step that lets instructions of one origin reason on all rows, tells of them, and leaves the seed as it is."""

    task: str = ""

    def take(self, at: StepContext) -> Any:
        """The step's number says which origin."""
        random, origin, before = at.random(), ORIGINS[at.state.step], at.evaluator.spent()
        texts = forms(at, random) if origin == "form" else asked(at, origin, random)
        found = tuple(each for each in (written._edit(at, text, "written") for text in dict.fromkeys(texts)) if each)
        evaluated = at.evaluator.evaluate([each.instruction for each in found], at.model)
        for each in evaluated:
            tell(self.task, origin, each)
        return self._taken(_Look(at, found, {}, found, {}), evaluated, Selection(at.current, "kept"), before)


def asked(at: StepContext, origin: str, random: Random) -> list[str]:
    """What the model writes from right answers, or from mistakes."""
    rows = [row for row in at.current.rows if row.inputs]
    if origin == "answers":
        messages = [written._from_answers(at, rows, random) for _ in range(EACH)]
    else:
        accents = [written._ACCENTS[number % len(written._ACCENTS)] for number in range(EACH)]
        messages = [[written._from_mistakes(at, rows, accent, random)] for accent in accents]
    encoder = at.evaluator.layout.encoder
    requests = [
        GenerationRequest(encoder.chat_ids(each), 64, 0.8, 0.95, seed=random.randrange(2**31)) for each in messages
    ]
    return [written.instruction_in(encoder.decode(each.token_ids), ended=False) for each in at.model.generate(requests)]


def forms(at: StepContext, random: Random) -> list[str]:
    """Three ways of saying what a right answer looks like behind the seed, and one behind another instruction."""
    values = list(dict.fromkeys(str(each) for each in at.evaluator.examples.golds()))
    if len(values) <= 3:
        named = " or ".join(sorted(values))
        found = [f"Answer with {named}.", f"Answer with one word: {named}.", f"The answer is {named}."]
    else:
        shown = random.sample(values, 3)
        found = [
            f"Answer in the form of {shown[0]}.",
            f"Right answers look like {', '.join(shown)}.",
            f"Answer with nothing but {shown[0]} or the like.",
        ]
    return [*(f"{at.current.instruction} {each}" for each in found), f"Think step by step. {found[0]}"]


def tell(task: str, origin: str, found: Any) -> None:
    """One line."""
    line = {"task": task, "kind": origin, "text": found.instruction, "score": found.score}
    print(json.dumps({**line, "objective": found.objective[0], "ce": found.cross_entropy}), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Every task in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--tasks", required=True)
    given = parser.parse_args(argv)
    lm = local_lm(given.model, max_tokens=160)
    for name in given.tasks.split(","):
        task = load(f"bbh:{name}", data_dir=given.data_dir, seed=DRAW, limit=ROWS)
        knobs: dict[str, Any] = {"auto": None, "finalists": 1, "max_instruction_tokens": 40, "written": 0}
        with dspy.context(lm=lm, adapter=dspy.ChatAdapter(use_json_adapter_fallback=False)):
            optimizer = GReaTer(task.metric, seed=DRAW, steps=3, variant=OfOneOrigin(task=name), **knobs)
            found = optimizer.compile(task.make_program(), trainset=list(task.train), valset=list(task.train)[:1])
        tell(name, "seed", found.detailed_results.predictors[0].seed)


if __name__ == "__main__":
    main()
