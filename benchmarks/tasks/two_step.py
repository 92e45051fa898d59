"""`two-step:NAME`: the rows of another task, answered by a program of two predictors."""

from __future__ import annotations

from dataclasses import replace

import dspy
from dspy.signatures import make_signature
from dspy.utils.exceptions import AdapterParseError

from benchmarks.tasks.task import SEED_INSTRUCTION, Task

DECOMPOSE = "Break the question down into steps."


class DecomposeThenAnswer(dspy.Module):
    """Writes down the steps that a question takes, then answers it with those steps in front of it.

    Steps that do not parse are left out: the second predictor then sees the question alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.decompose = dspy.Predict(make_signature("question -> steps", DECOMPOSE))
        self.answer = dspy.ChainOfThought(make_signature("question -> answer", SEED_INSTRUCTION))

    def forward(self, question: str) -> dspy.Prediction:
        """A prediction with `answer`, `reasoning` and `steps`."""
        try:
            steps = str(self.decompose(question=question).steps or "").strip()
        except AdapterParseError:
            steps = ""
        asked = f"{question}\n\nSteps:\n{steps}" if steps else question
        answered = self.answer(question=asked)
        return dspy.Prediction(answer=answered.answer, reasoning=answered.reasoning, steps=steps)


def of(task: Task, name: str) -> Task:
    """The task with the two-predictor program."""
    return replace(task, name=name, about=f"{task.about}; decomposed first, then answered", make_program=_program)


def _program() -> dspy.Module:
    return DecomposeThenAnswer()
