"""`pocket:NAME`: rows from the generator that the pocket model's training rows came from; none is a benchmark row.

As many as one likes: 50 to search on, 100 to choose on, and 300 to test, for an interval that is narrower than
BIG-Bench Hard's own rows allow.
"""

from __future__ import annotations

import random
from pathlib import Path

from benchmarks.tasks import answers, bbh
from benchmarks.tasks.task import SEED_INSTRUCTION, Task, question_program, row
from dspy_greater.pocket.tasks import TASKS, generate, work_out

TRAIN, DEV, TEST = 50, 100, 300
ABOUT = {f"pocket:{name}": f"generated rows like BIG-Bench Hard's {name.replace('_', ' ')}" for name in TASKS}


def load(name: str, data_dir: Path | None, seed: int) -> Task:
    """`pocket:NAME`, from the generator; needs no files and no network."""
    short, rng = name.removeprefix("pocket:"), random.Random(f"rows/{name}/{seed}")
    questions: dict[str, None] = {}
    while len(questions) < TRAIN + DEV + TEST:
        questions[generate(short, rng)] = None
    rows = [row(question, work_out(short, question).answer) for question in questions]
    return Task(
        name=name,
        about=ABOUT[name],
        make_program=question_program,
        metric=answers.metric_of(bbh.normaliser(name)),
        train=tuple(rows[:TRAIN]),
        dev=tuple(rows[TRAIN : TRAIN + DEV]),
        test=tuple(rows[TRAIN + DEV :]),
        seed_instruction=SEED_INSTRUCTION,
        source="the pocket model's generator",
    )
