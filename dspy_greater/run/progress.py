"""Who hears of a search while it runs: the progress bar, and any number of listeners at once."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, cast

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
from dspy_greater.run.log import edit_parts
from dspy_greater.run.outlook import UNPLANNED, Outlook, Plan
from dspy_greater.run.stop import BY_FILE, StopFile

if TYPE_CHECKING:
    from tqdm import tqdm

_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
_LONGEST = 24  # characters of an edit, on either side


class ProgressBar(contextlib.AbstractContextManager["ProgressBar"]):
    """A listener that draws one bar per predictor: steps taken, position, best score and its loss, the edit, speed.

    `show` is True for always, False for never, and None for only on a terminal or in a notebook; `file` is
    standard error unless given. "best" is the metric's mean over the training rows of the instruction
    with the lowest objective so far, and "loss" its mean cross-entropy in nats. Tokens per second are those written;
    the time that is left is that of the whole run, as far as `plan` says what it is.

    Example:
        >>> from dspy_greater.run.events import Warned
        >>> with ProgressBar(show=False) as bar:
        ...     bar(Warned("careful"))
    """

    def __init__(self, show: bool | None = None, file: TextIO | None = None, plan: Plan = UNPLANNED) -> None:
        self._notebook = file is None and in_notebook()
        self._disable = (None if not self._notebook else False) if show is None else not show
        self._file = file
        self._outlook = Outlook(plan)
        self._bar: tqdm[NoReturn] | None = None
        self._predictor = ""
        self._best: Evaluation | None = None

    def __call__(self, event: Event) -> None:
        self._outlook(event)
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

    def __exit__(self, *raised: object) -> None:
        with contextlib.suppress(OSError, ValueError):  # whatever it is drawn on may be gone by then
            self.close()

    def _begin(self, predictor: str, steps: int | None, *, unit: str = "step") -> None:
        self.close()
        self._predictor = predictor
        self._bar = _kind_of_bar(notebook=self._notebook)(
            total=steps,
            desc=predictor,
            unit=unit,
            file=self._file,
            disable=self._disable,
            dynamic_ncols=True,
            **({} if steps is None else {"bar_format": _BAR}),
        )

    def _step(self, event: StepTaken) -> None:
        if self._bar is None or event.predictor != self._predictor:
            self._begin(event.predictor, None)
        for evaluation in event.evaluated:
            self._better(evaluation)
        if self._bar is not None:
            self._bar.update(max(0, event.step + 1 - self._bar.n))
        self._describe(
            {"position": str(event.position), "best": _best_score(self._best), "loss": _loss(self._best)},
            _edit(event),
            *self._speed(),
        )

    def _speed(self) -> list[str]:
        rate, left = self._outlook.tokens_per_second, self._outlook.seconds_left
        found = [] if rate is None else [f"{rate:.3g} tokens/s"]
        if left is not None and self._bar is not None:
            found.append(f"{self._bar.format_interval(round(left))} left")
        return found

    def _iteration(self, event: IterationTaken) -> None:
        if self._bar is not None:
            self._bar.update(max(0, event.iteration + 1 - self._bar.n))
        candidates = sum(len(member.candidates) for member in event.members)
        best = max((scored.score for scored in event.compared), default=())
        calls = sum(part.get("calls", 0) for part in event.spent.values())
        self._describe({"best": _first(best), "candidates": str(candidates), "LM calls": str(calls)}, *self._speed())

    def _validated(self, event: Validated) -> None:
        if event.predictor == self._predictor and event.winner in event.scores:
            seed = next(iter(event.scores.values()))
            self._describe({"validation": f"{event.scores[event.winner]:.3g}", "seed": f"{seed:.3g}"})
        self.close()

    def _better(self, evaluation: Evaluation) -> None:
        if self._best is None or evaluation.objective < self._best.objective:
            self._best = evaluation

    def _describe(self, values: dict[str, str], *more: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join([*(f"{name}={value}" for name, value in values.items()), *more]))


def in_notebook() -> bool:
    """Whether this is the kernel of a notebook, which is no terminal and shows a bar all the same.

    >>> in_notebook()
    False
    """
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return "IPKernelApp" in getattr(shell, "config", ())


def _kind_of_bar(*, notebook: bool) -> Any:
    if not notebook:
        from tqdm import tqdm

        return tqdm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without ipywidgets it is a line of text
        from tqdm.auto import tqdm

    return tqdm


def _edit(step: StepTaken) -> str:
    """`old -> new`, on one line and cut."""
    parts = edit_parts(step)
    if parts is None:
        return f"{_cut(step.current_text)} kept"
    return f"{_cut(parts[0])} -> {_cut(parts[1])}"


def _cut(text: str) -> str:
    return repr(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...")


def _first(score: tuple[float, ...]) -> str:
    return f"{score[0]:.3g}" if score else ""


def _best_score(evaluation: Evaluation | None) -> str:
    return "" if evaluation is None else f"{evaluation.score:.3g}"


def _loss(evaluation: Evaluation | None) -> str:
    return "" if evaluation is None else f"{evaluation.cross_entropy:.3g}"


class Listeners:
    """Several listeners as one.

    A listener that raises is reported in a warning and not called again: no fault of a callback ends a search.
    Ctrl-C passes once all have been told of what has happened, a second one at once. One that returns exactly `False`
    asks for the end of the search, and so does a `StopFile`; `stopped_by` tells which of them did.

    Example:
        >>> from dspy_greater.run.events import Warned
        >>> heard = []
        >>> listeners = Listeners([heard.append])
        >>> listeners.emit(Warned("careful"))
        >>> heard
        [Warned(message='careful')]
    """

    def __init__(self, listeners: Iterable[Listener] = (), stop_file: StopFile | None = None) -> None:
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
        interrupted: KeyboardInterrupt | None = None
        for listener in tuple(self._listeners):
            try:
                if listener(event) is False and not replayed:
                    self.stopped_by = self.stopped_by or "callback"
            except KeyboardInterrupt as interrupt:
                if interrupted is not None:
                    raise
                interrupted = interrupt
            except Exception as error:  # a user's callback may raise anything
                self._listeners = [other for other in self._listeners if other is not listener]
                _report(listener, event, error)
        if interrupted is not None:
            raise interrupted

    __call__ = emit


def checked_callbacks(given: object, name: str = "callbacks") -> tuple[Listener, ...]:
    """The functions that a user gave to be called with every event.

    Raises:
        SettingsError: one of them cannot be called, or they are no list.

    Example:
        >>> checked_callbacks([len])
        (<built-in function len>,)
    """
    if given is None:
        return ()
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
