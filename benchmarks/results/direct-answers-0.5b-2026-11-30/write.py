"""Instructions that the model writes, several from each request; each of them reasons on all training rows of a task.

    PYTHONPATH=. python benchmarks/results/direct-answers-0.5b-2026-11-30/write.py FILE.gguf --data-dir DIR \
        --tasks reasoning_about_colored_objects >> written.jsonl

Six requests from right answers with three samples each, and three from mistakes with two. The first 24 training rows of
draw 2. The run that wrote `written.jsonl` was ended after 17 instructions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy

from benchmarks.tasks.registry import load
from dspy_greater import GReaTer, local_lm
from dspy_greater.model.interface import GenerationRequest
from dspy_greater.search import written
from dspy_greater.search.default_step import DefaultStep, _Look
from dspy_greater.search.edits import Edit
from dspy_greater.search.select import Selection
from dspy_greater.search.step import StepContext

DRAW, ROWS, AT_ONCE = 2, 24, 4
REQUESTS = (("answers", 6, 3), ("mistakes", 3, 2))  # origin, requests, samples of each


@dataclass(frozen=True)
class Pool(DefaultStep):
    """A step that lets many written instructions reason on all rows, tells of them, and leaves the seed as it is."""

    task: str = ""

    def take(self, at: StepContext) -> Any:
        """Four at a time."""
        before, pool = at.evaluator.spent(), list(asked(at).items())
        for start in range(0, len(pool), AT_ONCE):
            some = pool[start : start + AT_ONCE]
            evaluated = at.evaluator.evaluate([edit.instruction for edit, _ in some], at.model)
            for found, (_, kind) in zip(evaluated, some, strict=True):
                line = {"task": self.task, "kind": kind, "text": found.instruction, "score": found.score}
                more = {"objective": found.objective[0], "ce": found.cross_entropy}
                print(json.dumps({**line, **more, "rows": [row.score for row in found.rows]}), flush=True)
        return self._taken(_Look(at, (), {}, (), {}), [], Selection(at.current, "kept"), before)


def asked(at: StepContext) -> dict[Edit, str]:
    """What the model writes and can be deployed, with the request that it came from."""
    random, encoder = at.random(), at.evaluator.layout.encoder
    rows = [row for row in at.current.rows if row.inputs]
    requests: list[GenerationRequest] = []
    kinds: list[str] = []
    for origin, count, samples in REQUESTS:
        for number in range(count):
            messages = (
                written._from_answers(at, rows, random)
                if origin == "answers"
                else [written._from_mistakes(at, rows, written._ACCENTS[number], random)]
            )
            ids = encoder.chat_ids(messages)
            requests += [GenerationRequest(ids, 64, 0.8, 0.95, seed=random.randrange(2**31)) for _ in range(samples)]
            kinds += [f"{origin}{number}"] * samples
    texts = [
        written.instruction_in(encoder.decode(each.token_ids), ended=False) for each in at.model.generate(requests)
    ]
    found: dict[str, tuple[Edit, str]] = {}
    for text, kind in zip(texts, kinds, strict=True):
        edit = written._edit(at, text, "written") if text else None
        if edit is not None:
            found.setdefault(edit.instruction.text, (edit, kind))
    return dict(found.values())


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
            optimizer = GReaTer(task.metric, seed=DRAW, steps=1, variant=Pool(task=name), **knobs)
            optimizer.compile(task.make_program(), trainset=list(task.train), valset=list(task.train)[:1])


if __name__ == "__main__":
    main()
