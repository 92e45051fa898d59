"""Questions to the optimizer's own LMs: asked together, checked, asked again within bounds, counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import dspy

from dspy_greater.errors import MalformedAnswer
from dspy_greater.gradsum.meter import Meter, Module
from dspy_greater.program.predictors import search_adapter
from dspy_greater.program.rollout import together

Answer = TypeVar("Answer")
_LONGEST_PROBLEM = 500  # characters


@dataclass(frozen=True)
class Question(Generic[Answer]):
    """A filled signature, and what turns its outputs into an answer or raises `MalformedAnswer`."""

    signature: Any
    inputs: Mapping[str, Any]
    read: Callable[[Any], Answer]


@dataclass(frozen=True)
class Answers(Generic[Answer]):
    """One per question, in order: None where every try failed, and then why."""

    found: tuple[Answer | None, ...]
    failures: dict[int, str] = field(default_factory=dict)


class Asker:
    """Asks modules, all questions of a stage at once and the malformed ones again, round by round."""

    def __init__(self, meter: Meter, *, retries: int, threads: int) -> None:
        self._meter, self._retries, self._threads = meter, retries, threads

    def ask(self, module: Module, lm: Any, questions: Sequence[Question[Answer]]) -> Answers[Answer]:
        """The answers, whatever the LM does; only the budget and the user can end this.

        Raises:
            BudgetSpent: the questions, or those to ask again, do not fit into the budget.
        """
        found: list[Answer | None] = [None] * len(questions)
        failures: dict[int, str] = {}
        open_questions = list(range(len(questions)))
        for attempt in range(self._retries + 1):
            if not open_questions:
                break
            self._meter.admit(len(open_questions))
            jobs = [(questions[index], attempt, failures.get(index)) for index in open_questions]
            with self._meter.counting(module):
                tries = together(
                    lambda question, attempt, problem: _try(question, lm, attempt, problem),
                    jobs,
                    lms=[lm],
                    threads=self._threads,
                )
            for index, (answer, problem) in zip(open_questions, tries, strict=True):
                found[index] = answer
                failures.pop(index, None)
                if problem is not None:
                    failures[index] = problem
            open_questions = sorted(failures)
            self._meter.add(module, answered=len(jobs) - len(open_questions), malformed=len(open_questions))
        self._meter.add(module, unanswered=len(open_questions))
        return Answers(tuple(found), failures)


def _try(question: Question[Answer], lm: Any, attempt: int, problem: str | None) -> tuple[Answer | None, str | None]:
    """The answer, or what was wrong with it."""
    signature, inputs = question.signature, dict(question.inputs)
    if attempt:
        # Another prompt, so that neither a cache nor a greedy LM can only say the same again.
        note = dspy.InputField(desc="what was wrong with your last answer to this")
        signature = signature.append("correction", note, str)
        inputs["correction"] = f"This is attempt {attempt + 1}. Your last answer could not be used: {problem}"
    try:
        with dspy.context(lm=lm, adapter=search_adapter(), trace=[]):
            return question.read(dspy.Predict(signature)(**inputs)), None
    except Exception as error:  # text that does not parse, a refusal, a dead server: no answer that can be used
        told = str(error) if isinstance(error, MalformedAnswer) else f"{type(error).__name__}: {error}"
        return None, told[:_LONGEST_PROBLEM]
