"""What the optimizers written from their papers share: scoring an instruction, asking the proposer, best so far.

A method is a `TextualTeleprompter` with an `improve` that reads like its paper's algorithm. It improves one
instruction; in a program with several predictors each is improved in turn, the others standing as they are by then,
and the metric is always the whole program's.
"""

from __future__ import annotations

import contextvars
import inspect
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import dspy
from dspy.teleprompt.teleprompt import Teleprompter

from benchmarks.harness.budget import BudgetSpent
from benchmarks.harness.candidates import Candidate
from benchmarks.optimizers.optimizer import Context, Metric
from benchmarks.tasks import answers
from dspy_greater.errors import DataError, ProgramError
from dspy_greater.metric import RowMetric

if TYPE_CHECKING:
    from benchmarks.harness.budget import Budget

RIGHT = 1.0


@dataclass(frozen=True)
class Outcome:
    """What a program made of one row.

    Attributes:
        row: the example.
        prediction: empty where the program failed.
        score: of the metric; 0 where the program or the metric failed.
        steps: what each predictor said, as (predictor, its outputs in words), in the order of the calls.
    """

    row: dspy.Example
    prediction: dspy.Prediction
    score: float
    steps: tuple[tuple[str, str], ...] = ()

    @property
    def is_right(self) -> bool:
        """Whether the metric found nothing to complain of."""
        return self.score >= RIGHT


class Scorer:
    """Runs programs on rows with a metric, and reports what it finds to the budget.

    The same instructions never meet the same row twice: decoding is greedy, so the answer would be the same. What a
    budget cuts short is reported for the rows that were done.

    Args:
        metric: metric(example, prediction, trace=None) -> score.
        budget: told of every candidate's score; may be left out.
        threads: rows that run at the same time; DSPy's own setting if left out.
    """

    def __init__(self, metric: Metric, budget: Budget | None = None, threads: int | None = None) -> None:
        self._metric, self._budget, self._threads = RowMetric(metric), budget, threads
        # The row is kept beside its outcome, so that its id is not given to another one.
        self._known: dict[tuple[tuple[str, ...], int], Outcome] = {}

    def score(self, program: dspy.Module, rows: Sequence[dspy.Example]) -> float:
        """The mean score over the rows.

        Raises:
            BudgetSpent: the task model may not be called any more.
            DataError: there are no rows.
        """
        if not rows:
            raise DataError("A candidate cannot be scored on no rows; give the optimizer rows to train on.")
        outcomes = self.outcomes(program, rows)
        return sum(outcome.score for outcome in outcomes) / len(outcomes)

    def outcomes(self, program: dspy.Module, rows: Sequence[dspy.Example]) -> list[Outcome]:
        """What the program makes of each row.

        Raises:
            BudgetSpent: the task model may not be called any more.
        """
        texts = tuple(text for _, text in Candidate.of(program).instructions)
        missing = list({id(row): row for row in rows if (texts, id(row)) not in self._known}.values())
        try:
            self._run(program, texts, missing)
        finally:
            done = [self._known[texts, id(row)].score for row in missing if (texts, id(row)) in self._known]
            if done and self._budget is not None:
                self._budget.record(program, sum(done) / len(done), len(done))
        return [self._known[texts, id(row)] for row in rows]

    def _run(self, program: dspy.Module, texts: tuple[str, ...], rows: Sequence[dspy.Example]) -> None:
        names = {id(predictor): name for name, predictor in program.named_predictors()}

        def run(row: dspy.Example) -> None:
            self._known[texts, id(row)] = self._outcome(program, row, names)

        with ThreadPoolExecutor(self._threads or dspy.settings.num_threads or 1) as pool:
            running = [pool.submit(contextvars.copy_context().run, run, row) for row in rows]
        for each in running:  # all have ended; the first error comes through
            each.result()

    def _outcome(self, program: dspy.Module, row: dspy.Example, names: dict[int, str]) -> Outcome:
        trace: list[Any] = []
        try:
            with dspy.context(trace=trace):
                prediction = program(**row.inputs())
        except Exception:  # an answer that cannot be read is a wrong one, as in `dspy.Evaluate`
            return Outcome(row, dspy.Prediction(), 0.0)
        steps = tuple((names[id(call[0])], fields(call[2])) for call in trace if id(call[0]) in names)
        return Outcome(row, prediction, self._metric(row, prediction).value, steps)


class InstructionSearch:
    """One predictor's instruction, and all that a method needs to better it.

    Attributes:
        seed: the instruction to begin with.
        best: what the method would return if it had to stop now; it keeps this up to date.
        train: rows to learn from.
        dev: rows to choose on; the training rows where there are no others.
        rng: the method's random choices.
    """

    def __init__(
        self,
        program: dspy.Module,
        predictor: str,
        *,
        scorer: Scorer,
        prompt_lm: Any,
        train: Sequence[dspy.Example],
        dev: Sequence[dspy.Example],
        rng: random.Random,
    ) -> None:
        self._program, self._predictor, self._scorer, self._prompt_lm = program, predictor, scorer, prompt_lm
        self._asked = 0
        self.train, self.dev, self.rng = list(train), list(dev) or list(train), rng
        self._signature: Any = dict(program.named_predictors())[predictor].signature
        self.seed: str = self._signature.instructions
        self.best = self.seed
        self._best_score, self._best_rows = 0.0, 0

    def program(self, instruction: str) -> dspy.Module:
        """A copy of the program with this instruction."""
        copied = self._program.deepcopy()
        dict(copied.named_predictors())[self._predictor].signature = self._signature.with_instructions(instruction)
        return copied

    def score(self, instruction: str, rows: Sequence[dspy.Example]) -> float:
        """The program's mean score over the rows with this instruction."""
        return self._scorer.score(self.program(instruction), rows)

    def scores(self, instructions: Iterable[str], rows: Sequence[dspy.Example]) -> dict[str, float]:
        """Instruction -> score, for instructions in the order of their promise.

        `best` follows along, so that a budget may end it anywhere: a score on more rows goes before one on fewer, and
        of equal scores the first.
        """
        found: dict[str, float] = {}
        for instruction in instructions:
            score = found[instruction] = self.score(instruction, rows)
            if len(rows) > self._best_rows or (len(rows) == self._best_rows and score > self._best_score):
                self.best, self._best_score, self._best_rows = instruction, score, len(rows)
        return found

    def outcomes(self, instruction: str, rows: Sequence[dspy.Example]) -> list[Outcome]:
        """What the program makes of each row with this instruction."""
        return self._scorer.outcomes(self.program(instruction), rows)

    def sample(self, population: Sequence[Any], count: int) -> list[Any]:
        """So many of them at random, or all, in random order."""
        return self.rng.sample(list(population), min(count, len(population)))

    def ask(self, prompt: str, *, temperature: float = 1.0) -> str:
        """The proposer's answer to a request in plain text; every call is a draw of its own."""
        self._asked += 1
        answer: Any = self._prompt_lm(prompt, temperature=temperature, rollout_id=self._asked)[0]
        text = answer.get("text") if isinstance(answer, dict) else answer  # beside it are thoughts, where it has some
        return text or ""

    def said(self, outcome: Outcome) -> str:
        """What the program answered, and before it what this predictor said in a program with several."""
        answer = fields({name: outcome.prediction.get(name) for name in outcome.row.labels().keys()})
        own = [text for name, text in outcome.steps if name == self._predictor]
        if len(self._program.predictors()) < 2 or not own:
            return answer
        return f"(this step) {'; '.join(own)} (the whole program) {answer}"

    def reasoned(self, outcome: Outcome) -> str:
        """What the program wrote beside its answer, on one line; empty where that is nothing."""
        labels = outcome.row.labels().keys()
        return " ".join(fields({name: text for name, text in outcome.prediction.items() if name not in labels}).split())

    def template(self, instruction: str) -> str:
        """How the instruction is put together with an input."""
        inputs = "\n".join(f"{name}: <{name}>" for name in self._signature.input_fields)
        outputs = "\n".join(f"{name}:" for name in self._signature.output_fields)
        return f"{instruction}\n\n{inputs}\n\n{outputs}"


class TextualTeleprompter(Teleprompter, ABC):
    """A DSPy optimizer that asks a language model for instructions and scores them.

    Args:
        metric: metric(example, prediction, trace=None) -> score.
        prompt_lm: the proposer.
        budget: told of every scored candidate.
        seed: of every random choice.
        num_threads: rows that run at the same time; DSPy's own setting if left out.
    """

    def __init__(
        self,
        metric: Metric,
        prompt_lm: Any,
        *,
        budget: Budget | None = None,
        seed: int = 0,
        num_threads: int | None = None,
    ) -> None:
        super().__init__()
        self.metric, self.prompt_lm, self.budget = metric, prompt_lm, budget
        self.random_seed, self.num_threads = seed, num_threads

    @abstractmethod
    def improve(self, search: InstructionSearch) -> str:
        """The method: the best instruction that it finds."""

    def compile(
        self,
        student: dspy.Module,
        *,
        trainset: list[dspy.Example],
        teacher: dspy.Module | None = None,
        valset: list[dspy.Example] | None = None,
    ) -> dspy.Module:
        """A copy of the student with better instructions; the best so far where `BudgetSpent` ends the search.

        Args:
            student: the program; it is not changed.
            trainset: rows to learn from.
            teacher: not used.
            valset: rows to choose on, where the method has a use for them.

        Raises:
            DataError: there are no training rows.
            ProgramError: there is no predictor.
        """
        if not trainset:
            raise DataError(f"{type(self).__name__} has no training rows; pass trainset=.")
        if not student.predictors():
            raise ProgramError("The program has no predictor, so there is no instruction to improve.")
        scorer, rng = Scorer(self.metric, self.budget, self.num_threads), random.Random(self.random_seed)
        program = student.deepcopy()
        for name, _ in student.named_predictors():
            search = InstructionSearch(
                program,
                name,
                scorer=scorer,
                prompt_lm=self.prompt_lm,
                train=trainset,
                dev=valset or trainset,
                rng=rng,
            )
            try:
                search.best = self.improve(search)
            except BudgetSpent:
                return search.program(search.best)
            program = search.program(search.best)
        return program


class PaperPeer:
    """A `TextualTeleprompter` as an optimizer of the comparison."""

    name: ClassVar[str]
    about: ClassVar[str]
    teleprompter: ClassVar[type[TextualTeleprompter]]

    def optimise(
        self, student: dspy.Module, train: Sequence[dspy.Example], dev: Sequence[dspy.Example], context: Context
    ) -> dspy.Module:
        """The student with the best instructions that were found within the budget."""
        method = self.teleprompter(context.metric, context.prompt_lm, budget=context.budget, seed=context.seed)
        return method.compile(student, trainset=list(train), valset=list(dev))


def ranked(scores: dict[str, float]) -> list[str]:
    """Instructions from best to worst; the earlier one first on a tie."""
    return sorted(scores, key=lambda instruction: -scores[instruction])


def distinct(texts: Iterable[str], *, but: Iterable[str] = ()) -> list[str]:
    """The instructions among the texts, once each, without those that are known already."""
    known = {"", *but}
    return [text for text in dict.fromkeys(as_instruction(text) for text in texts) if text not in known]


def as_instruction(text: str) -> str:
    """A proposer's text as DSPy will keep it: no blank or quotation mark around it.

    Example:
        >>> as_instruction(' "Think first." ')
        'Think first.'
    """
    text = inspect.cleandoc(text).strip()
    for mark in ('"""', "```", '"', "'", "“"):
        closing = "”" if mark == "“" else mark
        if len(text) > len(mark + closing) and text.startswith(mark) and text.endswith(closing):
            inner = text[len(mark) : -len(closing)]
            if mark not in inner and closing not in inner:
                return inner.strip()
    return text


def between(text: str, start: str, end: str) -> list[str]:
    """What stands between two marks; the whole text where a proposer forgot them, since it is most of the time it.

    Example:
        >>> between("<START>one<END> and <START>two<END>", "<START>", "<END>")
        ['one', 'two']
        >>> between("one", "<START>", "<END>")
        ['one']
        >>> between("<START>cut off", "<START>", "<END>")
        ['cut off']
    """
    found = re.findall(f"{re.escape(start)}(.*?){re.escape(end)}", text, re.DOTALL)
    return [each.strip() for each in found] or [text.rpartition(start)[2].strip()]


def fields(values: Any) -> str:
    """Fields in words: the bare value where there is one, else `name: value` a line."""
    named = dict(values)
    if len(named) == 1:
        return str(next(iter(named.values())))
    return "\n".join(f"{name}: {value}" for name, value in named.items())


def shown_input(row: dspy.Example) -> str:
    """What a row asks."""
    return fields(row.inputs())


def shown_label(row: dspy.Example) -> str:
    """What a row's right answer is."""
    return fields(answers.expected(row))
