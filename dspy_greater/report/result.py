"""The result of `compile`: every step of every predictor, and what it cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dspy_greater.objective.types import Evaluation
from dspy_greater.run.events import IterationTaken, StepTaken
from dspy_greater.stats import spearman


@dataclass(frozen=True)
class PredictorResult:
    """One predictor's search. Scores are means of the metric; `validation` maps instruction to score, seed first."""

    name: str
    field: str | None  # the output field with gold values; None: judged by the metric alone
    seed: Evaluation
    steps: tuple[StepTaken, ...]
    finalists: tuple[Evaluation, ...]  # best training objective first
    validation: dict[str, float]
    instruction: str  # what was written into the program
    seed_spent: dict[str, int]  # on the seed's training rows
    validation_spent: dict[str, int]  # empty when there was no validation

    @property
    def spent_by_phase(self) -> dict[str, dict[str, int]]:
        """The cost of "seed", "search" and "validation", as recorded; see `CompileResult.spent_by_phase`."""
        search = _summed(step.spent for step in self.steps)
        return {"seed": self.seed_spent, "search": search, "validation": self.validation_spent}

    @property
    def fidelity(self) -> float:
        """Spearman's ρ between predicted and realised change of all tried candidates; nan for fewer than 3."""
        pairs = [pair for step in self.steps for pair in step.predictions]
        return spearman([told for told, _ in pairs], [came for _, came in pairs])

    @property
    def fidelity_by_step(self) -> tuple[float, ...]:
        """The same within each step; nan where fewer than 3 candidates were tried."""
        pairs = [step.predictions for step in self.steps]
        return tuple(spearman([told for told, _ in each], [came for _, came in each]) for each in pairs)

    @property
    def seed_instruction(self) -> str:
        """The instruction that the student came with."""
        return self.seed.instruction

    @property
    def score(self) -> float:
        """Validation score of the instruction that was written."""
        return self.validation[self.instruction]

    @property
    def seed_score(self) -> float:
        """Validation score of the seed instruction."""
        return self.validation[self.seed_instruction]


@dataclass(frozen=True)
class WarmStart:
    """What another optimizer found before the search began, and the last comparison with the student itself."""

    instructions: dict[str, str]  # by predictor: the seeds of the search
    student_score: float
    score: float  # of what the search ended with
    details: object = None  # the other optimizer's `detailed_results`

    @property
    def undone(self) -> bool:
        """Whether the student's own instructions were kept, because nothing better was found."""
        return not self.score > self.student_score  # a comparison that was interrupted has no scores


@dataclass(frozen=True)
class CompileResult:
    """`program.detailed_results`.

    `spent` holds what the engines counted in this process: forwards, prefilled_tokens, generated_tokens,
    padded_tokens, lm_head_rows and backward_tokens. `out_of_budget` says why the search ended early, if
    `max_generated_tokens` did it; predictors that it did not come to keep their instructions and are not among
    `predictors`. `stopped_by` is what ended it early: "interrupt" (Ctrl-C), "callback", "budget", or where it ended and
    by which error; None when it took all its steps.
    """

    predictors: tuple[PredictorResult, ...]
    train_rows: int
    validation_rows: int
    seconds: float
    spent: dict[str, int]
    interrupted: bool = False
    warm_start: WarmStart | None = None
    out_of_budget: str | None = None
    stopped_by: str | None = None

    @property
    def spent_by_phase(self) -> dict[str, dict[str, int]]:
        """The cost of "seed", "search" and "validation" of all predictors, what an interrupted run spent included.

        Each holds the counters of `spent`, and `runs`: how often the program was run on a row. Its
        `generated_tokens` of seed and search are what `max_generated_tokens` bounds; unlike those of `spent`,
        they count what a server wrote.
        """
        phases = [each.spent_by_phase for each in self.predictors]
        return {name: _summed(phase[name] for phase in phases) for name in ("seed", "search", "validation")}

    @property
    def score(self) -> float:
        """Validation score of the returned program."""
        if self.warm_start is not None:
            return max(self.warm_start.student_score, self.warm_start.score)
        return self.predictors[-1].score

    @property
    def seed_score(self) -> float:
        """Validation score of the student."""
        return self.predictors[0].seed_score if self.warm_start is None else self.warm_start.student_score

    @property
    def steps(self) -> tuple[StepTaken, ...]:
        """All steps of all predictors, in order."""
        return tuple(step for predictor in self.predictors for step in predictor.steps)


@dataclass(frozen=True)
class GradSumResult:
    """`program.detailed_results` of GRAD-SUM.

    Prompts map predictor names to instructions. A score has the metric's mean, then the judge's, as far as there
    are such. `spent_by_module` holds for generation, evaluation, gradients, summarisation and editing the LM calls
    (answers from DSPy's cache are free and not counted), prompt and completion tokens as reported by the LMs,
    answers used, malformed answers and questions given up.
    """

    iterations: tuple[IterationTaken, ...]
    finalists: tuple[dict[str, str], ...]  # the student's prompts first
    validation: tuple[tuple[float, ...], ...]  # of the finalists
    winner: int
    train_rows: int
    validation_rows: int
    seconds: float
    spent_by_module: dict[str, dict[str, int]]
    interrupted: bool = False
    out_of_budget: str | None = None  # why the loop ended early, if the budget did it
    stopped_by: str | None = None  # "interrupt", "callback", "budget" or an error; None when it took all iterations

    @property
    def prompts(self) -> dict[str, str]:
        """What was written into the program."""
        return self.finalists[self.winner]

    @property
    def seed_prompts(self) -> dict[str, str]:
        """What the student came with."""
        return self.finalists[0]

    @property
    def score(self) -> float:
        """Validation score of the returned program: the metric's, or the judge's where there is no metric."""
        return self.validation[self.winner][0]

    @property
    def seed_score(self) -> float:
        """Validation score of the student."""
        return self.validation[0][0]

    @property
    def spent(self) -> dict[str, int]:
        """`spent_by_module`, summed."""
        return _summed(self.spent_by_module.values())


def what_stopped(*, interrupted: bool, called_off: bool, out_of_budget: str | None) -> str | None:
    """`stopped_by` of a result.

    >>> what_stopped(interrupted=False, called_off=True, out_of_budget=None)
    'callback'
    """
    if interrupted:
        return "interrupt"
    if called_off:
        return "callback"
    return None if out_of_budget is None else "budget"


def _summed(costs: Iterable[dict[str, int]]) -> dict[str, int]:
    costs = tuple(costs)
    names = dict.fromkeys(name for counted in costs for name in counted)
    return {name: sum(counted.get(name, 0) for counted in costs) for name in names}
