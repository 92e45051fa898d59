"""The best program so far, readable, on disk: whoever waits for a long run can use what it has found."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dspy_greater.objective.types import Evaluation
from dspy_greater.run.events import (
    BeamStarted,
    BeamValidated,
    Event,
    IterationTaken,
    SearchStarted,
    StepTaken,
    Validated,
)

NAME = "best.json"


class BestFile:
    """A listener that writes `best.json` into a run's directory after every new best; without a directory, nothing.

    The file holds `instructions` by predictor, those of predictors whose turn is over included; `score`, the metric's
    mean over the training rows; `validation_score`, once there is one; and where the search stood: `predictor` and
    `step`, or `iteration`. It is replaced as a whole, so a reader never sees half of it.

    ```python
    best = json.loads(Path("runs/navigate/best.json").read_text())["instructions"]
    ```
    """

    def __init__(self, log_dir: str | os.PathLike[str] | None) -> None:
        """Writes nothing yet."""
        self._folder = None if log_dir is None else Path(log_dir)
        self._instructions: dict[str, str] = {}
        self._best: Evaluation | None = None

    def __call__(self, event: Event) -> None:
        """Write what is better than what was known.

        Raises:
            OSError: the file could not be written.
        """
        if isinstance(event, SearchStarted):
            self._better(event.seed, event.predictor, 0)
        elif isinstance(event, StepTaken):
            tried = [each.evaluation for each in event.candidates if each.evaluation is not None]
            best = min([event.chosen, *tried], key=lambda each: each.objective)
            if self._best is None or best.objective < self._best.objective:
                self._better(best, event.predictor, event.step + 1)
        elif isinstance(event, Validated):
            self._instructions[event.predictor] = event.winner
            self._write({"predictor": event.predictor, "validation_score": event.scores[event.winner]})
        elif isinstance(event, BeamStarted):
            self._instructions = dict(event.prompts)
            self._write({"iteration": 0})
        elif isinstance(event, IterationTaken):
            scores = {tuple(each.prompts.items()): each.score for each in event.compared}
            self._instructions = dict(event.beam[0])
            best_scores = scores.get(tuple(event.beam[0].items()), ())
            self._write({"iteration": event.iteration + 1, "score": next(iter(best_scores), None)})
        elif isinstance(event, BeamValidated):
            self._instructions = dict(event.finalists[event.winner])
            self._write({"validation_score": event.scores[event.winner][0]})

    def _better(self, best: Evaluation, predictor: str, step: int) -> None:
        self._best = best
        self._instructions[predictor] = best.instruction
        self._write({"predictor": predictor, "step": step, "score": best.score})

    def _write(self, where: dict[str, Any]) -> None:
        if self._folder is None:
            return
        text = json.dumps({"instructions": self._instructions, **where}, indent=2, ensure_ascii=False)
        partial = self._folder / f".{NAME}.{os.getpid()}"
        partial.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
        os.replace(partial, self._folder / NAME)
