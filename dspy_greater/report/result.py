"""The result of `compile`: every step of every predictor, and what it cost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dspy_greater.errors import ProgramError
from dspy_greater.objective.types import Evaluation
from dspy_greater.report.figures import fidelity, summed
from dspy_greater.report.plain_values import finite, step_as_dict
from dspy_greater.report.plots import Plotted
from dspy_greater.run.events import IterationTaken, StepTaken
from dspy_greater.run.log import edit_of
from dspy_greater.served.record import ServedModel


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
    validation_spent: dict[str, int]  # of the one that decided; empty when there was none
    subscores: dict[str, tuple[float, ...]]  # of `validation`, row by row

    @property
    def spent_by_phase(self) -> dict[str, dict[str, int]]:
        """The cost of "seed", "search" and "validation", as recorded; see `CompileResult.spent_by_phase`."""
        search = summed(step.spent for step in self.steps)
        return {"seed": self.seed_spent, "search": search, "validation": self.validation_spent}

    @property
    def fidelity(self) -> float:
        """Spearman's ρ between predicted and realised change of all tried candidates; nan for fewer than 3."""
        return fidelity(self.name, self.steps).rank_correlation

    @property
    def fidelity_by_step(self) -> tuple[float, ...]:
        """The same within each step; nan where fewer than 3 candidates were tried."""
        return fidelity(self.name, self.steps).by_step

    @property
    def origin(self) -> str:
        """What proposed the instruction that was kept, as its last edit: a candidate's `origin`, or "seed"."""
        tried = (candidate for step in self.steps for candidate in step.candidates if candidate.evaluation is not None)
        found = {
            candidate.evaluation.instruction: candidate.origin
            for candidate in tried
            if candidate.evaluation is not None
        }
        return "seed" if self.instruction == self.seed_instruction else found.get(self.instruction, "token")

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
class ValidatedProgram:
    """A whole program on the validation rows: instructions by searched predictor, mean score, and score by row."""

    instructions: dict[str, str]
    score: float
    subscores: tuple[float, ...] = ()


@dataclass(frozen=True)
class WarmStart:
    """What another optimizer found before the search began, and the last comparison with the student itself."""

    instructions: dict[str, str]  # by predictor: the seeds of the search
    student: ValidatedProgram  # in the last comparison
    score: float  # of what the search ended with
    details: object = None  # the other optimizer's `detailed_results`

    @property
    def student_score(self) -> float:
        """Validation score of the student."""
        return self.student.score

    @property
    def undone(self) -> bool:
        """Whether the student's own instructions were kept, because nothing better was found."""
        return not self.score > self.student_score  # a comparison that was interrupted has no scores


class _Validated(ABC):
    """What any result tells of the programs that met the validation rows."""

    @property
    @abstractmethod
    def candidates(self) -> tuple[ValidatedProgram, ...]:
        """Whole programs, in the order in which they were validated; the student comes first."""

    @property
    def val_aggregate_scores(self) -> tuple[float, ...]:
        """The score of each of `candidates`: nan where the validation did not come about."""
        return tuple(program.score for program in self.candidates)

    @property
    def val_subscores(self) -> tuple[tuple[float, ...], ...]:
        """For each of `candidates` the score of each validation row."""
        return tuple(program.subscores for program in self.candidates)


@dataclass(frozen=True)
class CompileResult(_Validated, Plotted):
    """`program.detailed_results`; printed, it is a short trajectory of the search.

    Scores are means of the metric, on the metric's own scale: 0.75 is what DSPy's `Evaluate` shows as 75.0 %.
    `spent` holds what the engines counted in this process: forwards, prefilled_tokens, generated_tokens,
    padded_tokens, lm_head_rows and backward_tokens. Where a predictor's LM is a server, what it says that it wrote is
    among the generated_tokens, and prompt_tokens are what it read. `faults` counts its calls that came to nothing in
    this process, whether or not they were answered later, by kind (`program.faults`). `out_of_budget` says why the
    search ended early, if `max_generated_tokens`, `max_metric_calls` or `max_seconds` did it; predictors that it
    did not come to keep their instructions and are not among `predictors`. `stopped_by` is what ended it early:
    "interrupt" (Ctrl-C), "SIGTERM", "STOP file", "callback", "budget", or where it ended and by which error; None
    when it took all its steps. `interrupted` is true for the first two. `servers` says for each predictor whose LM is
    behind a server which model answered there, and how far it was the one that is loaded here.
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
    faults: dict[str, int] = field(default_factory=dict[str, int])
    servers: tuple[ServedModel, ...] = ()
    rendering: Any = field(default=None, compare=False, repr=False)  # of the program's prompts, see `prompt`

    def prompt(self, example: Mapping[str, Any] | None = None, predictor: str | None = None) -> list[dict[str, Any]]:
        """The messages exactly as the model gets them for an example, without asking any model.

        Args:
            example: has the inputs of the predictor; None puts a gap such as `{{question}}` in the place of each.
            predictor: its name; needed where the program has several, whose inputs may come from one another.

        Raises:
            ProgramError: there is no such predictor, or its calls bring a signature or an adapter of their own.
            DataError: the example lacks an input.

        ```python
        better.detailed_results.prompt(dspy.Example(question="2 + 2?"))[-1]["content"]
        ```
        """
        if self.rendering is None:
            raise ProgramError("This result holds no prompts. Take that of a program that `compile` returned.")
        return self.rendering.prompt(example, predictor)

    @property
    def server(self) -> ServedModel | None:
        """The first of `servers`; None where all LMs are in this process."""
        return self.servers[0] if self.servers else None

    @property
    def spent_by_phase(self) -> dict[str, dict[str, int]]:
        """The cost of "seed", "search" and "validation" of all predictors, what an interrupted run spent included.

        Of a predictor that was validated, and then searched further in a later run, the last validation counts alone.
        Each holds the counters of `spent`, and `runs`: how often the program was run on a row. Its
        `generated_tokens` of seed and search are what `max_generated_tokens` bounds.
        """
        phases = [predictor.spent_by_phase for predictor in self.predictors]
        return {name: summed(phase[name] for phase in phases) for name in ("seed", "search", "validation")}

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

    @property
    def candidates(self) -> tuple[ValidatedProgram, ...]:
        """The whole programs that met the validation rows, in that order; the student comes first."""
        now = {predictor.name: predictor.seed_instruction for predictor in self.predictors}
        found: dict[tuple[str, ...], ValidatedProgram] = {}
        if self.warm_start is not None:
            student = {name: self.warm_start.student.instructions[name] for name in now}
            found[tuple(student.values())] = replace(self.warm_start.student, instructions=student)
        for predictor in self.predictors:
            for text, score in predictor.validation.items():
                program = {**now, predictor.name: text}
                key = tuple(program.values())
                if self.warm_start is None or key not in found:
                    found[key] = ValidatedProgram(program, score, predictor.subscores.get(text, ()))
            now[predictor.name] = predictor.instruction
        return tuple(found.values())

    @property
    def best_idx(self) -> int:
        """Which of `candidates` was returned."""
        if self.warm_start is not None and self.warm_start.undone:
            return 0
        returned = {predictor.name: predictor.instruction for predictor in self.predictors}
        return [program.instructions for program in self.candidates].index(returned)

    def to_dict(self) -> dict[str, Any]:
        """The record as plain values for `json.dumps`: without reasoning texts, and None for what is no finite number.

        ```python
        Path("record.json").write_text(json.dumps(better.detailed_results.to_dict()))
        ```
        """
        return finite(
            {
                **_outcome(self),
                "server": None if self.server is None else self.server.to_dict(),
                "servers": [server.to_dict() for server in self.servers],
                "candidates": [program.instructions for program in self.candidates],
                "spent_by_phase": self.spent_by_phase,
                "predictors": [_predictor_as_dict(predictor) for predictor in self.predictors],
            }
        )

    def __str__(self) -> str:
        lines = [f"score {self.seed_score:.3g} -> {self.score:.3g} on {self.validation_rows} validation rows"]
        for predictor in self.predictors:
            lines.append(f"{predictor.name}, {len(predictor.steps)} steps on {self.train_rows} training rows:")
            lines += [f"  {_new_best(step)}" for step in new_bests(predictor)]
            lines.append(f"  {predictor.seed_instruction!r} -> {predictor.instruction!r}")
        tokens = sum(phase.get("generated_tokens", 0) for phase in self.spent_by_phase.values())
        ended = "" if self.stopped_by is None else f"; stopped by {self.stopped_by}"
        return "\n".join(
            [*lines, f"{self.seconds:.0f} s, {tokens:,} tokens generated{told_faults(self.faults)}{ended}"]
        )


@dataclass(frozen=True)
class GradSumResult(_Validated):
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
    stopped_by: str | None = None  # as in `CompileResult`; None when it took all iterations
    subscores: tuple[tuple[float, ...], ...] = ()  # of the finalists, row by row
    faults: dict[str, int] = field(default_factory=dict[str, int])  # as in `CompileResult`

    @property
    def prompts(self) -> dict[str, str]:
        """What was written into the program."""
        return self.finalists[self.winner]

    @property
    def candidates(self) -> tuple[ValidatedProgram, ...]:
        """The finalists, in the order of `finalists`."""
        rows = self.subscores or ((),) * len(self.finalists)
        scored = zip(self.finalists, self.validation, rows, strict=True)
        return tuple(ValidatedProgram(prompts, score[0], row_scores) for prompts, score, row_scores in scored)

    @property
    def best_idx(self) -> int:
        """Which of `candidates` was returned."""
        return self.winner

    def to_dict(self) -> dict[str, Any]:
        """The record as plain values for `json.dumps`, with None for what is no finite number."""
        steps = [
            {"beam": list(iteration.beam), "best": max(one.score for one in iteration.compared)}
            for iteration in self.iterations
        ]
        candidates = [program.instructions for program in self.candidates]
        spent = {"spent_by_module": self.spent_by_module}
        return finite({**_outcome(self), **spent, "candidates": candidates, "iterations": steps})

    def __str__(self) -> str:
        lines = [f"score {self.seed_score:.3g} -> {self.score:.3g} on {self.validation_rows} validation rows"]
        for iteration in self.iterations:
            best = max(one.score for one in iteration.compared)
            lines.append(f"  iteration {iteration.iteration + 1}: best {', '.join(f'{part:.3g}' for part in best)}")
        lines += [f"  {name}: {self.seed_prompts[name]!r} -> {text!r}" for name, text in self.prompts.items()]
        ended = "" if self.stopped_by is None else f"; stopped by {self.stopped_by}"
        calls = f"{self.spent.get('calls', 0):,} LM calls{told_faults(self.faults)}"
        return "\n".join([*lines, f"{self.seconds:.0f} s, {calls}{ended}"])

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
        return summed(self.spent_by_module.values())


def what_stopped(*, interrupted: str | None, called_off: str | None, out_of_budget: str | None) -> str | None:
    """`stopped_by` of a result.

    >>> what_stopped(interrupted=None, called_off="callback", out_of_budget=None)
    'callback'
    """
    return interrupted or called_off or (None if out_of_budget is None else "budget")


def told_faults(faults: Mapping[str, int]) -> str:
    """Calls that came to nothing, for a result that is printed; empty where there were none.

    >>> told_faults({"rate limit": 2, "malformed": 1})
    '; calls without an answer: 2 rate limit, 1 malformed'
    """
    told = ", ".join(f"{count} {kind}" for kind, count in faults.items())
    return f"; calls without an answer: {told}" if told else ""


def new_bests(predictor: PredictorResult) -> list[StepTaken]:
    """The steps that led to a new best training objective."""
    best, found = predictor.seed.objective, list[StepTaken]()
    for step in predictor.steps:
        if step.chosen.objective < best:
            best = step.chosen.objective
            found.append(step)
    return found


def _outcome(result: CompileResult | GradSumResult) -> dict[str, Any]:
    names = ("score", "seed_score", "best_idx", "val_aggregate_scores", "val_subscores", "train_rows")
    names += ("validation_rows", "seconds", "spent", "faults", "stopped_by")
    return {name: getattr(result, name) for name in names}


def _predictor_as_dict(predictor: PredictorResult) -> dict[str, Any]:
    return {
        "name": predictor.name,
        "field": predictor.field,
        "seed_instruction": predictor.seed_instruction,
        "instruction": predictor.instruction,
        "origin": predictor.origin,
        "validation": predictor.validation,
        "fidelity": predictor.fidelity,
        "steps": [step_as_dict(step) for step in predictor.steps],
    }


def _new_best(step: StepTaken) -> str:
    return f"step {step.step + 1}: {edit_of(step)}, score {step.chosen.score:.3g}, loss {step.chosen.cross_entropy:.3g}"
