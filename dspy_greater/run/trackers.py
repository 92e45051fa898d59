"""A run in an experiment tracker: MLflow and Weights & Biases hear the events that everybody hears.

A tracker gets the settings as parameters, the numbers of each step as metrics, and `report.html` as an artifact. None
of its faults ends a search: one while the run is opened or closed is a warning, and one at an event is treated as a
callback's is.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
from abc import abstractmethod
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

from dspy_greater.errors import MissingExtraError, SettingsError
from dspy_greater.notices import warn_caller
from dspy_greater.objective.types import Evaluation
from dspy_greater.run.estimate import TOKENS
from dspy_greater.run.events import BeamValidated, Event, IterationTaken, SearchStarted, StepTaken, Validated
from dspy_greater.run.serialise import leaves

ARTIFACTS = ("report.html", "best_program.json")
_LONGEST = 500  # characters of a parameter, which every version of MLflow takes


class Tracker(AbstractContextManager["Tracker"]):
    """A listener that hands a run's numbers to an experiment tracker; a `with` statement opens and closes the run.

    Args:
        parameters: what the run depends on, by name; nested mappings get dotted names.
        folder: where `report.html` and `best_program.json` are when the run ends.
    """

    name = ""  # of the package

    def __init__(self, parameters: Mapping[str, Any], folder: Path | None = None) -> None:
        self._parameters, self._folder = flattened(parameters), folder
        self._numbers = Numbers()
        self._opened = False

    def __call__(self, event: Event) -> None:
        """Record the event's numbers, if it has any."""
        numbers = self._numbers.of(event)
        if numbers and self._opened:
            self._log(numbers, self._numbers.step)

    def __enter__(self) -> Tracker:
        """The tracker, with its run opened, if that could be done."""
        with self._warning("opened"):
            self._open(self._parameters)
            self._opened = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Hands over the artifacts and closes the run, as failed where an error ends it."""
        if not self._opened:
            return
        paths = [self._folder / name for name in ARTIFACTS] if self._folder is not None else []
        for path in paths:
            if path.is_file():
                with self._warning(f"given {path.name}"):
                    self._add(path)
        with self._warning("closed"):
            self._close(failed=error is not None)

    @contextmanager
    def _warning(self, what: str) -> Generator[None, None, None]:
        try:
            yield
        except Exception as error:  # a server that cannot be reached, a full disk: whatever it is
            warn_caller(
                f"The run in {self.name} could not be {what}: {type(error).__name__}: {error}. The search goes on.",
                RuntimeWarning,
            )

    @abstractmethod
    def _open(self, parameters: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def _log(self, numbers: Mapping[str, float], step: int) -> None: ...

    @abstractmethod
    def _add(self, path: Path) -> None: ...

    @abstractmethod
    def _close(self, *, failed: bool) -> None: ...


class MLflow(Tracker):
    """A run in the tracking store that MLflow is set to; nested, where a run of the caller's is active."""

    name = "mlflow"

    def _open(self, parameters: Mapping[str, Any]) -> None:
        self._mlflow: Any = importlib.import_module(self.name)
        run = self._mlflow.start_run(run_name="dspy_greater", nested=self._mlflow.active_run() is not None)
        self._id = run.info.run_id
        self._opened = True  # from here on it has to be closed
        self._mlflow.log_params({name: str(value)[:_LONGEST] for name, value in parameters.items()})

    def _log(self, numbers: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(numbers), step=step, run_id=self._id)

    def _add(self, path: Path) -> None:
        self._mlflow.log_artifact(str(path), run_id=self._id)

    def _close(self, *, failed: bool) -> None:
        active = self._mlflow.active_run()
        if active is not None and active.info.run_id == self._id:  # a callback may have ended it
            self._mlflow.end_run("FAILED" if failed else "FINISHED")


class WandB(Tracker):
    """A run of Weights & Biases: the caller's, where one is active, and a new one otherwise."""

    name = "wandb"

    def _open(self, parameters: Mapping[str, Any]) -> None:
        wandb: Any = importlib.import_module(self.name)
        self._own = wandb.run is None
        self._run = wandb.init(project="dspy_greater") if self._own else wandb.run
        self._opened = True
        self._run.config.update(dict(parameters), allow_val_change=True)

    def _log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log({"step": step, **numbers})  # its own count of steps may be the caller's

    def _add(self, path: Path) -> None:
        self._run.log_artifact(str(path), name=f"{path.stem}-{self._run.id}", type=path.stem)

    def _close(self, *, failed: bool) -> None:
        if self._own:
            self._run.finish(exit_code=int(failed))


class Numbers:
    """What of an event is a number over the steps.

    Scores are means of the metric on the training rows, losses in nats, tokens and seconds those of the step. Steps
    count on from one predictor to the next; the seed's numbers are those of step 0.

    >>> numbers = Numbers()
    >>> seed = Evaluation((1,), "Think.", (), 0.5, 0.25, 1.0, (0.5, 0.25))
    >>> numbers.of(SearchStarted("predict", seed, 4, {"generated_tokens": 9}))
    {'score': 0.5, 'loss': 0.25, 'best_score': 0.5, 'tokens_written': 9.0, 'seconds': 0.0}
    """

    def __init__(self) -> None:
        self.step = 0
        self._best: Evaluation | None = None

    def of(self, event: Event) -> dict[str, float]:
        """The numbers by name, those that are finite."""
        if isinstance(event, SearchStarted):
            self._best = event.seed
            found = {**self._scores(event.seed), **_spent(event)}
        elif isinstance(event, StepTaken):
            self.step += 1
            known = event.evaluated if self._best is None else (self._best, *event.evaluated)
            self._best = min(known, key=lambda evaluation: evaluation.objective)
            found = {**self._scores(event.chosen), **_spent(event), "candidates": float(len(event.evaluated) - 1)}
        elif isinstance(event, Validated):
            seed = next(iter(event.scores.values()))
            found = {"validation_score": event.scores[event.winner], "validation_seed_score": seed}
        elif isinstance(event, IterationTaken):
            self.step += 1
            best = max((scored.score for scored in event.compared), default=())
            calls = sum(part.get("calls", 0) for part in event.spent.values())
            kinds = ("prompt_tokens", "completion_tokens")
            tokens = sum(part.get(kind, 0) for part in event.spent.values() for kind in kinds)
            found = {"lm_calls": float(calls), "lm_tokens": float(tokens), "seconds": event.seconds}
            found |= {"best_score": best[0]} if best else {}
        elif isinstance(event, BeamValidated):
            scores, seed = event.scores[event.winner], event.scores[0]
            found = {"validation_score": scores[0], "validation_seed_score": seed[0]}
        else:
            found = {}
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def _scores(self, now: Evaluation) -> dict[str, float]:
        best = math.nan if self._best is None else self._best.score
        return {"score": now.score, "loss": now.cross_entropy, "best_score": best}


def flattened(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings with dotted names, of letters that every tracker takes.

    >>> flattened({"settings": {"steps": 3}, "predictors": {"hop[0]": {"mode": "append"}}})
    {'settings.steps': 3, 'predictors.hop_0.mode': 'append'}
    """
    named = (
        (".".join(re.sub(r"[^\w\-. /]+", "_", part).strip("_") for part in path), leaf)
        for path, leaf in leaves(parameters)
    )
    return {name: value for name, value in named if value != {}}


def checked_trackers(*, use_mlflow: object, use_wandb: object) -> tuple[type[Tracker], ...]:
    """The trackers that were asked for.

    Raises:
        SettingsError: neither True nor False.
        MissingExtraError: the package of one is not installed.

    >>> checked_trackers(use_mlflow=False, use_wandb=None)
    ()
    """
    found: list[type[Tracker]] = []
    for asked, kind in ((use_mlflow, MLflow), (use_wandb, WandB)):
        if asked not in (True, False, None):
            raise SettingsError(f"use_{kind.name}={asked!r}: give True or False.")
        if asked and not _installed(kind.name):
            raise MissingExtraError(
                f"use_{kind.name}=True needs {kind.name}, which is not installed: "
                f"pip install 'dspy-greater[{kind.name}]'"
            )
        found += [kind] if asked else []
    return tuple(found)


@contextmanager
def tracked(
    kinds: tuple[type[Tracker], ...], parameters: Mapping[str, Any], log_dir: str | Path | None
) -> Generator[tuple[list[Tracker], str | Path | None], None, None]:
    """The trackers with their runs opened, and where the report goes: without a `log_dir`, a directory for a while."""
    if not kinds:
        yield [], log_dir
        return
    with TemporaryDirectory(prefix="dspy_greater-", ignore_cleanup_errors=True) as spare, ExitStack() as stack:
        folder = Path(spare) if log_dir is None else Path(log_dir).expanduser()
        yield [stack.enter_context(kind(parameters, folder)) for kind in kinds], folder


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # a module that somebody put in its place
        return True


def _spent(event: SearchStarted | StepTaken) -> dict[str, float]:
    tokens = {f"tokens_{name}": float(event.spent[key]) for name, key in TOKENS.items() if key in event.spent}
    return {**tokens, "seconds": event.seconds}
