"""The best program so far, readable, on disk: whoever waits for a long run can use what it has found."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
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
from dspy_greater.run.files import replace_text, warn_unwritten

NAME = "best.json"
PROGRAM_NAME = "best_program.json"
_LOG = logging.getLogger("dspy_greater")


class BestFile(AbstractContextManager["BestFile"]):
    """A listener that writes `best.json` into a run's directory after every new best; without a directory, nothing.

    The file holds `instructions` by predictor, those of predictors whose turn is over included; `score`, the metric's
    mean over the training rows; `validation_score`, once there is one; and where the search stood: `predictor` and
    `step`, or `iteration`. Beside it lies `best_program.json`, the program with these instructions. Before
    `validation_score` is there, they are the best on the training rows, and may be worse than the student's on others.
    Both files are replaced as a whole, so a reader never sees half of one. What cannot be written is a warning, once:
    it is tried again at every event, and by `close`, which a `with` statement calls.

    Args:
        log_dir: the run's directory.
        program: the text that DSPy saves for the program with these instructions; without it no program is written. If
            it raises, that is logged once, and the run goes on.

    ```python
    best = json.loads(Path("runs/navigate/best.json").read_text())["instructions"]
    program.load("runs/navigate/best_program.json")
    ```
    """

    def __init__(
        self, log_dir: str | os.PathLike[str] | None, program: Callable[[Mapping[str, str]], str] | None = None
    ) -> None:
        self._folder = None if log_dir is None else Path(log_dir).expanduser()
        self._program = program
        self._instructions: dict[str, str] = {}
        self._best: Evaluation | None = None
        self._where: dict[str, Any] | None = None  # the search stood, of what is not on disk yet
        self._told = False

    def __call__(self, event: Event) -> None:
        """Write what is better than what was known, and what could not be written before."""
        self._hear(event)
        self._write(again=True)

    def close(self) -> None:
        """Write what is missing."""
        self._write(again=False)

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _hear(self, event: Event) -> None:
        if isinstance(event, SearchStarted):
            self._better(event.seed, event.predictor, 0)
        elif isinstance(event, StepTaken):
            best = min(event.evaluated, key=lambda evaluation: evaluation.objective)
            if self._best is None or best.objective < self._best.objective:
                self._better(best, event.predictor, event.step + 1)
        elif isinstance(event, Validated):
            self._instructions[event.predictor] = event.winner
            self._where = {"predictor": event.predictor, "validation_score": event.scores[event.winner]}
        elif isinstance(event, BeamStarted):
            self._instructions = dict(event.prompts)
            self._where = {"iteration": 0}
        elif isinstance(event, IterationTaken):
            scores = {tuple(scored.prompts.items()): scored.score for scored in event.compared}
            self._instructions = dict(event.beam[0])
            best_scores = scores.get(tuple(event.beam[0].items()), ())
            self._where = {"iteration": event.iteration + 1, "score": next(iter(best_scores), None)}
        elif isinstance(event, BeamValidated):
            self._instructions = dict(event.finalists[event.winner])
            self._where = {"validation_score": event.scores[event.winner][0]}

    def settle(self, instructions: Mapping[str, str], validation_score: float) -> None:
        """Write what is returned in the end, where a last comparison decided."""
        self._instructions, self._where = dict(instructions), {"validation_score": validation_score}
        self.close()

    def _better(self, best: Evaluation, predictor: str, step: int) -> None:
        self._best = best
        self._instructions[predictor] = best.instruction
        self._where = {"predictor": predictor, "step": step, "score": best.score}

    def _write(self, *, again: bool) -> None:
        if self._folder is None or self._where is None:
            return
        try:
            self._replace(self._folder, self._where, again=again)
        except KeyboardInterrupt:  # between the two files; they have to tell of one state
            self._replace(self._folder, self._where, again=again)
            raise

    def _replace(self, folder: Path, where: dict[str, Any], *, again: bool) -> None:
        text = json.dumps({"instructions": self._instructions, **where}, indent=2, ensure_ascii=False)
        path = folder / NAME
        try:
            replace_text(path, text + "\n")
            program = self._saved()
            if program is not None:
                path = folder / PROGRAM_NAME
                replace_text(path, program)
            self._where = None
        except OSError as error:
            if not self._told:
                self._told = True
                warn_unwritten(path, error, again=again)

    def _saved(self) -> str | None:
        if self._program is None:
            return None
        try:
            return self._program(self._instructions)
        except Exception as error:  # a program may hold anything
            self._program = None
            _LOG.warning(
                "The best program cannot be saved as JSON: %s: %s. %s/%s holds its instructions.",
                type(error).__name__,
                error,
                self._folder,
                NAME,
            )
            return None
