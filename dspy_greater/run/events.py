"""What the search says while it works. The algorithm emits; progress bar, journal and callbacks listen.

Every event is a frozen dataclass of plain values, so that it can be written as JSON
and read back without loss (`to_json`, `from_json`). `seconds` are no part of what was decided: two events are equal
whatever time they took, and journals of older versions do without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from dspy_greater.objective.types import Candidate, Evaluation

LATER = {"later": True}  # a field of this metadata is missing in journals of before there was one


@dataclass(frozen=True)
class SearchStarted:
    """A predictor's search begins from the seed instruction."""

    predictor: str
    seed: Evaluation
    steps: int
    spent: dict[str, int] = field(default_factory=dict[str, int])  # on the seed's evaluation, as in `StepTaken`
    called_as: str = ""  # in which other way than the predictor itself its calls are rendered
    seconds: float = field(default=0.0, compare=False, repr=False)  # that the seed's evaluation took


@dataclass(frozen=True)
class StepTaken:
    """One step of Algorithm 1: a position was proposed for, differentiated and decided."""

    predictor: str
    step: int
    position: int
    current_token: int
    candidates: tuple[Candidate, ...]
    chosen: Evaluation  # the instruction after the step
    reason: str  # why, in words
    spent: dict[str, int]  # this step: the engines' counters, and `runs`, of the program on a row
    current_text: str = ""  # of the current token, or of all where it is rewritten; empty where a token is appended
    asked: bool = False  # for whole instructions, in place of edits
    began: str = field(default="", metadata=LATER)  # the instruction before the step
    seconds: float = field(default=0.0, compare=False, repr=False)  # since the event before

    @property
    def evaluated(self) -> tuple[Evaluation, ...]:
        """The chosen instruction, and every candidate that was tried."""
        return (
            self.chosen,
            *(candidate.evaluation for candidate in self.candidates if candidate.evaluation is not None),
        )

    @property
    def predictions(self) -> tuple[tuple[float, tuple[float, float]], ...]:
        """(predicted, realised) of every tried candidate: the forecast, or else the gradient, and what came."""
        pairs = [
            (candidate.gradient if candidate.forecast is None else candidate.forecast, candidate.realised)
            for candidate in self.candidates
        ]
        return tuple((told, came) for told, came in pairs if told is not None and came is not None)


@dataclass(frozen=True)
class ChangedRow:
    """A validation row that the winner scores otherwise than the seed, as text, and what the model wrote for it.

    `before` (the seed) and `after` (the winner) are pairs of a predictor and what it wrote, call by call.
    """

    row: int  # of the validation rows, from 0
    inputs: dict[str, str]
    expected: dict[str, str]  # the row's other fields
    before: tuple[tuple[str, str], ...]
    after: tuple[tuple[str, str], ...]
    errors: tuple[str | None, str | None] = (None, None)  # why the run or the metric failed, before and after


@dataclass(frozen=True)
class Validated:
    """The finalists of a predictor on the validation rows; `scores` by instruction, the seed first."""

    predictor: str
    scores: dict[str, float]  # means of the metric
    winner: str
    spent: dict[str, int] = field(default_factory=dict[str, int])  # as in `StepTaken`
    subscores: dict[str, tuple[float, ...]] = field(default_factory=dict[str, tuple[float, ...]])  # row by row
    changed: tuple[ChangedRow, ...] = field(default=(), metadata=LATER)  # what the winner fixed and broke
    seconds: float = field(default=0.0, compare=False, repr=False)  # that the validation took


@dataclass(frozen=True)
class NotCalled:
    """Predictors that have no search: the program called them on none of the training rows.

    Before the first search it is the student that was run, later the program with what was found for those before.
    """

    predictors: tuple[str, ...]


@dataclass(frozen=True)
class Warned:
    """Something the user should know, once."""

    message: str


# --- GRAD-SUM: prompts are mappings of predictor name to instruction ---


@dataclass(frozen=True)
class Output:
    """What a program wrote for one row, and how good that is; everything as the text that modules are shown."""

    row: int
    inputs: str
    expected: str  # empty when the row has no expected values
    written: str
    trace: str  # every predictor's call; empty when there was only one
    metric: float | None  # None without a metric
    judged: float | None  # 0.0 to 1.0; None without criteria
    evaluation: str  # what keeps it from full score; empty at full score, or when that is not known
    feedback: str | None = None  # the metric's own
    error: str | None = None  # why the run, the metric or the judge failed, if one did

    @property
    def score(self) -> tuple[float, ...]:
        """The metric's score and then the judge's, as far as there are such."""
        return tuple(part for part in (self.metric, self.judged) if part is not None)


@dataclass(frozen=True)
class TextGradient:
    """How the prompts of some predictors should change, because of one output."""

    row: int
    concerns: tuple[str, ...]  # names of predictors
    text: str


@dataclass(frozen=True)
class MemberEdited:
    """One member of the beam in one iteration: outputs, gradients, a summary per predictor, candidates."""

    prompts: dict[str, str]
    outputs: tuple[Output, ...]
    gradients: tuple[TextGradient, ...]
    summaries: dict[str, str]  # the raw gradients where nothing is summarised
    candidates: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class PromptsScored:
    """Prompts on the rows that candidates are compared on."""

    prompts: dict[str, str]
    outputs: tuple[Output, ...]
    score: tuple[float, ...]  # means


@dataclass(frozen=True)
class BeamStarted:
    """GRAD-SUM begins from the student's prompts."""

    prompts: dict[str, str]
    iterations: int


@dataclass(frozen=True)
class IterationTaken:
    """One loop of GRAD-SUM, from generation to the next beam."""

    iteration: int
    sample: tuple[int, ...]  # rows that every member was run on
    subset: tuple[int, ...]  # rows that members and candidates were compared on
    members: tuple[MemberEdited, ...]
    compared: tuple[PromptsScored, ...]  # the members, then the candidates
    beam: tuple[dict[str, str], ...]  # of the next iteration, best first
    spent: dict[str, dict[str, int]]  # since the start, by module: calls, tokens, malformed, unanswered
    seconds: float = field(default=0.0, compare=False, repr=False)  # since the event before


@dataclass(frozen=True)
class BeamValidated:
    """The finalists of GRAD-SUM on the validation rows, the student's prompts first."""

    finalists: tuple[dict[str, str], ...]
    scores: tuple[tuple[float, ...], ...]
    winner: int


Event = SearchStarted | StepTaken | Validated | Warned | BeamStarted | IterationTaken | BeamValidated | NotCalled
Listener = Callable[[Event], object]  # one that returns exactly False stops the search
