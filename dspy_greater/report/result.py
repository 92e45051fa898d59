"""The result of `compile`: every step of every predictor, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass

from ..run.events import Evaluation, StepTaken


@dataclass(frozen=True)
class PredictorResult:
    """One predictor's search. Scores are means of the metric; `validation` maps instruction to score, seed first."""

    name: str
    field: str  # the output field with gold values
    seed: Evaluation
    steps: tuple[StepTaken, ...]
    finalists: tuple[Evaluation, ...]  # best training objective first
    validation: dict[str, float]
    instruction: str  # what was written into the program

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
class CompileResult:
    """`program.detailed_results`.

    `spent` holds the engines' counters over the whole run: forwards, prefilled_tokens,
    generated_tokens, padded_tokens, lm_head_rows and backward_tokens.
    """

    predictors: tuple[PredictorResult, ...]
    train_rows: int
    validation_rows: int
    seconds: float
    spent: dict[str, int]
    interrupted: bool = False

    @property
    def score(self) -> float:
        """Validation score of the returned program."""
        return self.predictors[-1].score

    @property
    def seed_score(self) -> float:
        """Validation score of the student."""
        return self.predictors[0].seed_score

    @property
    def steps(self) -> tuple[StepTaken, ...]:
        """All steps of all predictors, in order."""
        return tuple(step for predictor in self.predictors for step in predictor.steps)
