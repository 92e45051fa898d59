"""Who hears of a search while it runs: the progress bar, and any number of listeners at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, TextIO, cast

from dspy_greater.errors import SettingsError
from dspy_greater.notices import warn_caller
from dspy_greater.objective.types import Evaluation
from dspy_greater.run.events import (
    BeamStarted,
    BeamValidated,
    Event,
    IterationTaken,
    Listener,
    SearchStarted,
    StepTaken,
    Validated,
)
from dspy_greater.run.stop import BY_FILE, StopFile

if TYPE_CHECKING:
    from tqdm import tqdm


class ProgressBar:
    """A listener that draws one bar per predictor: steps taken, position, best score and its loss.

    `show` is True for always, False for never, and None for only on a terminal; `file` is
    standard error unless given. "best" is the metric's mean over the training rows of the instruction
    with the lowest objective so far, and "loss" its mean cross-entropy in nats.

    Example:
        >>> from dspy_greater.run.events import Warned
        >>> with ProgressBar(show=False) as bar:
        ...     bar(Warned("careful"))
    """

    def __init__(self, show: bool | None = None, file: TextIO | None = None) -> None:
        """Draws nothing yet; the first bar comes with the first search."""
        self._disable = None if show is None else not show
        self._file = file
        self._bar: tqdm[NoReturn] | None = None
        self._predictor = ""
        self._best: Evaluation | None = None

    def __call__(self, event: Event) -> None:
        """Draw what the event changes."""
        if isinstance(event, SearchStarted):
            self._begin(event.predictor, event.steps)
            self._better(event.seed)
            self._describe({"best": _best_score(self._best), "loss": _loss(self._best)})
        elif isinstance(event, StepTaken):
            self._step(event)
        elif isinstance(event, Validated):
            self._validated(event)
        elif isinstance(event, BeamStarted):
            self._begin("GRAD-SUM", event.iterations, unit="iteration")
        elif isinstance(event, IterationTaken):
            self._iteration(event)
        elif isinstance(event, BeamValidated):
            best, seed = event.scores[event.winner], event.scores[0]
            self._describe({"validation": _first(best), "seed": _first(seed)})
            self.close()

    def close(self) -> None:
        """Leave the bar as it is and end its line; a second call does nothing."""
        bar, self._bar = self._bar, None
        self._best = None
        if bar is not None:
            bar.close()

    def __enter__(self) -> ProgressBar:
        """The bar itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the bar; whatever it is drawn on may be gone by then."""
        with contextlib.suppress(OSError, ValueError):
            self.close()

    def _begin(self, predictor: str, steps: int | None, *, unit: str = "step") -> None:
        from tqdm import tqdm

        self.close()
        self._predictor = predictor
        self._bar = tqdm(
            total=steps,
            desc=predictor,
            unit=unit,
            file=self._file,
            disable=self._disable,
            dynamic_ncols=True,
        )

    def _step(self, event: StepTaken) -> None:
        if self._bar is None or event.predictor != self._predictor:
            self._begin(event.predictor, None)
        self._better(event.chosen)
        for candidate in event.candidates:
            if candidate.evaluation is not None:
                self._better(candidate.evaluation)
        if self._bar is not None:
            self._bar.update(max(0, event.step + 1 - self._bar.n))
        self._describe({"position": str(event.position), "best": _best_score(self._best), "loss": _loss(self._best)})

    def _iteration(self, event: IterationTaken) -> None:
        if self._bar is not None:
            self._bar.update(max(0, event.iteration + 1 - self._bar.n))
        candidates = sum(len(member.candidates) for member in event.members)
        best = max((each.score for each in event.compared), default=())
        calls = sum(part.get("calls", 0) for part in event.spent.values())
        self._describe({"best": _first(best), "candidates": str(candidates), "LM calls": str(calls)})

    def _validated(self, event: Validated) -> None:
        if event.predictor == self._predictor and event.winner in event.scores:
            seed = next(iter(event.scores.values()))
            self._describe({"validation": f"{event.scores[event.winner]:.3g}", "seed": f"{seed:.3g}"})
        self.close()

    def _better(self, evaluation: Evaluation) -> None:
        if self._best is None or evaluation.objective < self._best.objective:
            self._best = evaluation

    def _describe(self, values: dict[str, str]) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(f"{name}={value}" for name, value in values.items()))


def _first(score: tuple[float, ...]) -> str:
    return f"{score[0]:.3g}" if score else ""


def _best_score(evaluation: Evaluation | None) -> str:
    return "" if evaluation is None else f"{evaluation.score:.3g}"


def _loss(evaluation: Evaluation | None) -> str:
    return "" if evaluation is None else f"{evaluation.cross_entropy:.3g}"


class Listeners:
    """Several listeners as one.

    A listener that raises is reported in a warning and not called again: no fault of a callback ends a search.
    Ctrl-C passes. One that returns exactly `False` asks for the end of the search, and so does a `StopFile`;
    `stopped_by` tells which of them did.

    Example:
        >>> from dspy_greater.run.events import Warned
        >>> heard = []
        >>> listeners = Listeners([heard.append])
        >>> listeners.emit(Warned("careful"))
        >>> heard
        [Warned(message='careful')]
    """

    def __init__(self, listeners: Iterable[Listener] = (), stop_file: StopFile | None = None) -> None:
        """They are called in this order."""
        self._listeners: list[Listener] = list(listeners)
        self._stop_file = stop_file
        self.stopped_by: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether the search is to end now; looks for the file."""
        if self.stopped_by is None and self._stop_file is not None and self._stop_file.seen():
            self.stopped_by = BY_FILE
        return self.stopped_by is not None

    def emit(self, event: Event, *, replayed: bool = False) -> None:
        """Tell every listener; one that is replayed from a journal has stopped what it could when it was new."""
        for listener in tuple(self._listeners):
            try:
                if listener(event) is False and not replayed:
                    self.stopped_by = self.stopped_by or "callback"
            except Exception as error:  # a user's callback may raise anything
                self._listeners = [other for other in self._listeners if other is not listener]
                _report(listener, event, error)

    __call__ = emit


def checked_callbacks(given: object, name: str = "callbacks") -> tuple[Listener, ...]:
    """The functions that a user gave to be called with every event.

    Raises:
        SettingsError: one of them cannot be called, or they are no list.

    Example:
        >>> checked_callbacks([print])
        (<built-in function print>,)
    """
    found = tuple(cast("Iterable[object]", given)) if isinstance(given, Iterable) else None
    if found is None or not all(map(callable, found)):
        raise SettingsError(
            f"{name}={given!r}: give a list of functions that take an event (dspy_greater.run.events). DSPy's own "
            "callback objects go to dspy.configure(callbacks=[...])."
        )
    return cast("tuple[Listener, ...]", found)


def _report(listener: Listener, event: Event, error: Exception) -> None:
    name = getattr(listener, "__qualname__", type(listener).__qualname__)
    warn_caller(
        f"The callback {name} raised {type(error).__name__}: {error} (at {type(event).__name__}). "
        "It is not called again in this run; the search goes on.",
        RuntimeWarning,
    )
