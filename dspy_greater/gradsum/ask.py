"""Questions to the optimizer's own LMs: asked together, checked, asked again within bounds, counted."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, TypeVar

import dspy

from dspy_greater.errors import MalformedAnswer
from dspy_greater.gradsum.meter import Meter, Module
from dspy_greater.program.asked_lm import uncached_lm
from dspy_greater.program.faults import ServerFault
from dspy_greater.program.predictors import search_adapter
from dspy_greater.program.rollout import together
from dspy_greater.program.servers import Servers
from dspy_greater.program.traced_run import hearing_faults

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

    def __init__(self, meter: Meter, servers: Servers, *, retries: int, threads: int) -> None:
        self._meter, self._servers, self._retries, self._threads = meter, servers, retries, threads

    def ask(
        self, module: Module, lm: Any, questions: Sequence[Question[Answer]], *, must: Sequence[int] = ()
    ) -> Answers[Answer]:
        """The answers, whatever the LM writes; only an outage, the budget and the user can end this.

        `must` are questions that may not stay without any answer of the server's.

        Raises:
            BudgetSpent: the questions, or those to ask again, do not fit into the budget.
            OutageError: a server gave no answer for longer than the run waits.
        """
        found: list[Answer | None] = [None] * len(questions)
        failures: dict[int, str] = {}
        open_questions = list(range(len(questions)))
        for attempt in range(self._retries + 1):
            if not open_questions:
                break
            self._meter.admit(len(open_questions))
            has_to = {place for place, index in enumerate(open_questions) if index in must}
            jobs = [(questions[index], attempt, failures.get(index)) for index in open_questions]
            with self._meter.counting(module):
                tries = self._tried(lm, jobs, must=has_to)
            for index, tried in zip(open_questions, tries, strict=True):
                found[index] = tried.answer
                failures.pop(index, None)
                if tried.problem is not None:
                    failures[index] = tried.problem
            open_questions = sorted(failures)
            self._meter.add(module, answered=len(jobs) - len(open_questions), malformed=len(open_questions))
        self._meter.add(module, unanswered=len(open_questions))
        return Answers(tuple(found), failures)

    def _tried(
        self, lm: Any, jobs: Sequence[tuple[Question[Answer], int, str | None]], *, must: Container[int]
    ) -> list[_Tried[Answer]]:
        """Each question asked once; those that a server did not answer until it does."""

        def ask(lm: Any, jobs: Sequence[tuple[Question[Answer], int, str | None]]) -> list[_Tried[Answer]]:
            return together(partial(_try, lm), jobs, lms=[lm], threads=self._threads)

        def again(indices: Sequence[int]) -> list[_Tried[Answer]]:
            return ask(uncached_lm(lm), [jobs[index] for index in indices])

        return self._servers.settled(ask(lm, jobs), again, must=must)


@dataclass(frozen=True)
class _Tried(Generic[Answer]):
    """The answer, or what was wrong with it; where there are faults, no language model answered."""

    answer: Answer | None
    problem: str | None = None
    faults: tuple[ServerFault, ...] = ()


def _try(lm: Any, question: Question[Answer], attempt: int, problem: str | None) -> _Tried[Answer]:
    tried, faults = hearing_faults(lambda: _asked(lm, question, attempt, problem))
    return replace(tried, faults=faults)


def _asked(lm: Any, question: Question[Answer], attempt: int, problem: str | None) -> _Tried[Answer]:
    signature, inputs = question.signature, dict(question.inputs)
    if attempt:
        # Another prompt, so that neither a cache nor a greedy LM can only say the same again.
        note = dspy.InputField(desc="what was wrong with your last answer to this")
        signature = signature.append("correction", note, str)
        inputs["correction"] = f"This is attempt {attempt + 1}. Your last answer could not be used: {problem}"
    try:
        with dspy.context(lm=lm, adapter=search_adapter(), trace=[]):
            return _Tried(question.read(dspy.Predict(signature)(**inputs)))
    except Exception as error:  # text that does not parse, a refusal, a dead server: no answer that can be used
        told = str(error) if isinstance(error, MalformedAnswer) else f"{type(error).__name__}: {error}"
        return _Tried(None, told[:_LONGEST_PROBLEM])
