"""One predictor after the other, each with the instructions that were found for those before it.

What was found is not lost. Until an instruction besides the student's own has been tried, any error is raised: there
is nothing to lose, and something to mend. From then on an error of any kind ends the search where Ctrl-C would have
ended it: what was found meets the student on the validation rows, and the best is returned with a loud warning.
Only where not even that is possible, and no earlier predictor was validated, an error is raised; it carries what
was found.
"""

from __future__ import annotations

import logging
import math
import traceback
from dataclasses import dataclass

from dspy_greater.errors import CallMismatchError, UnusedPredictorError
from dspy_greater.notices import warn_caller
from dspy_greater.program.called import called_as, scored_calls
from dspy_greater.program.faults import causes
from dspy_greater.program.rollout import searching_copy
from dspy_greater.program.sent import differences, refuse_context_lms, refuse_differences
from dspy_greater.report.result import PredictorResult
from dspy_greater.run.events import NotCalled, Warned
from dspy_greater.run.journal import Journal
from dspy_greater.run.progress import Listeners
from dspy_greater.run.stop import by_signal
from dspy_greater.search.predictor_search import PredictorSearch
from dspy_greater.search.problem import Problem, Target
from dspy_greater.search.seed_run import SeedRun, check_seed_run, kept_as_they_are, refuse_nameless_inputs, unused_error
from dspy_greater.search.state import UNUSED

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """What the searches of all predictors came to.

    `out_of_budget` and `error` say in words what ended them early, if one of these did; `interrupted` and `called_off`
    what it was, "interrupt", "SIGTERM", "callback" or "STOP file". `unvalidated` is the error that kept what was found
    from being validated, if nothing was.
    """

    predictors: tuple[PredictorResult, ...]
    interrupted: str | None = None
    out_of_budget: str | None = None
    error: str | None = None
    called_off: str | None = None
    unvalidated: Exception | None = None


class CoordinateDescent:
    """The searches of a problem's predictors, in their order; a predictor that is never called has none.

    Args:
        problem: what is optimised.
        journal: of the run.
        listeners: hear every event.
    """

    def __init__(self, problem: Problem, journal: Journal, listeners: Listeners) -> None:
        self._problem, self._journal, self._listeners = problem, journal, listeners
        self._program = problem.program
        self._results: list[PredictorResult] = []
        self._usage = UNUSED
        self._interrupted: str | None = None
        self._out_of_budget: str | None = None
        self._error: str | None = None
        self._called_off: str | None = None
        self._unvalidated: Exception | None = None
        recorded = journal.recorded()
        self._student_ran = bool(recorded)
        self._told_before = [event for event in recorded if isinstance(event, NotCalled)]
        self._uncalled = {name for event in self._told_before for name in event.predictors}
        self._unused: UnusedPredictorError | None = None

    def run(self) -> Found:
        """All searches, from where an interrupted run stopped.

        Raises:
            Exception: whatever came before anything was found.
        """
        for event in self._told_before:
            self._listeners.emit(event, replayed=True)
        for target in self._problem.targets:
            if target.predictor.name in self._uncalled:
                continue
            search = self._begin_or_keep(target)
            if search is not None:
                self._search(search, target)
            if self._interrupted or self._out_of_budget or self._error or self._called_off:
                break
        if self._unused is not None and not self._results:
            raise self._unused
        return Found(
            tuple(self._results),
            self._interrupted,
            self._out_of_budget,
            self._error,
            self._called_off,
            self._unvalidated,
        )

    def _begin_or_keep(self, target: Target) -> PredictorSearch | None:
        """A search whose seed is evaluated; None where there is none, and what earlier ones found is kept."""
        try:
            return self._begin(target)
        except KeyboardInterrupt as interrupt:
            if not self._results:
                raise
            self._interrupted = by_signal(interrupt)
        except CallMismatchError as error:  # only what the metric judges can be left out for it
            if error.predictor != target.predictor.name or target.field is not None or self._is_last_chance(target):
                raise
            warn_caller(f"{error} It keeps its instruction.")
        except Exception as error:
            if not self._results:
                raise
            self._stop(error, f"before the first step of predictor `{target.predictor.name}`")
        return None

    def _is_last_chance(self, target: Target) -> bool:
        return not self._results and target is self._problem.targets[-1]

    def _begin(self, target: Target) -> PredictorSearch | None:
        search = PredictorSearch(
            self._problem,
            target,
            self._program,
            self._journal,
            self._listeners,
            usage=self._usage,
        )
        run = search.evaluate_seed()
        if run is not None:
            if not self._student_ran:
                self._heed(run, target)
            self._student_ran = True
            refuse_nameless_inputs(run, [target.predictor])
            if target.predictor.name not in run.called:
                self._pass_over(run, target)
                return None
        search.start(run)
        return search

    def _heed(self, run: SeedRun, first: Target) -> None:
        """What the student's own run says, of predictors too whose turn comes later."""
        problem = self._problem
        check_seed_run(run)
        targets = problem.targets
        refuse_context_lms(problem.borrowed, [call for rollout in run.rollouts for call in rollout.trace])
        for target in targets:
            if target is not first and target.field is not None:  # the others keep their instruction
                _refuse_mismatch(run, target)
        refuse_nameless_inputs(run, [target.predictor for target in targets])
        uncalled = [target.predictor.name for target in targets if target.predictor.name not in run.called]
        if uncalled and (problem.named or len(uncalled) == len(targets)):
            raise unused_error(run, uncalled, problem.program, named=problem.named)
        for target in targets:
            if target is not first:  # whose losses are taken already
                target.refuse_long_answers(run.given_to(target.predictor.name), problem)
        if uncalled:
            self._leave(uncalled, run)

    def _leave(self, uncalled: list[str], run: SeedRun) -> None:
        """Predictors that have no search: recorded, told and warned of, once."""
        self._uncalled.update(uncalled)
        event = NotCalled(tuple(uncalled))
        self._journal.append(event)
        self._listeners.emit(event)
        warn_caller(kept_as_they_are(uncalled, len(run.rows)))

    def _pass_over(self, run: SeedRun, target: Target) -> None:
        """A predictor that is not called, or not any more under the instructions that were found for others."""
        name = target.predictor.name
        self._unused = unused_error(run, [name], self._problem.program)
        if name in self._uncalled:
            return
        if self._results:
            self._leave([name], run)
        else:  # not recorded: where no predictor has a search, a run that goes on has to find that out again
            warn_caller(kept_as_they_are([name], len(run.rows)))

    def _search(self, search: PredictorSearch, target: Target) -> None:
        """Algorithm 1, the validation, and what is kept if one of them fails."""
        search.run()
        error = search.stopped_by
        nothing_to_lose = not self._results and not search.found_something
        if error is not None and nothing_to_lose:
            raise error
        if error is not None:
            self._stop(error, search.steps_taken)
        known_score = self._results[-1].score if self._results else math.nan
        try:
            result = search.validate(known_score)
        except Exception as failed:
            if nothing_to_lose:
                raise
            self._stop(failed, f"in the validation of predictor `{target.predictor.name}`")
            if not self._results:
                self._unvalidated = failed
            result = search.unvalidated(known_score)
        self._results.append(result)
        self._program = searching_copy(self._program, {target.predictor.name: result.instruction})
        self._interrupted, self._usage = search.interrupted, search.usage
        self._called_off = search.called_off
        if error is None and search.stopped_by is not None:
            self._stop(search.stopped_by, search.steps_taken)
        if self._interrupted or self._error or self._called_off:
            return
        self._out_of_budget = search.out_of_budget()
        if self._out_of_budget is not None:
            self._listeners.emit(Warned(self._out_of_budget))

    def _stop(self, error: Exception, where: str) -> None:
        """The search ends here, with what was found."""
        told = f"{where}: {type(error).__name__}: {error}"
        self._error = told if self._error is None else f"{self._error}; then, {told}"
        _LOG.error("The search ended early, %s", where, exc_info=error)
        _let_go(error)
        self._listeners.emit(Warned(f"The search ended early, {told}"))


def _refuse_mismatch(run: SeedRun, target: Target) -> None:
    """Raises `CallMismatchError` where a predictor's calls send something else than would be scored."""
    calls, tokenizer = scored_calls(run.rollouts, target.predictor.name, every=False), target.engine.tokenizer
    called = called_as(target.predictor, calls, str(tokenizer.chat_template), supervised=target.field)
    found = differences(called, called.layout(tokenizer), target.engine, calls, supervised=target.field)
    refuse_differences(target.predictor.name, found, len(calls))


def _let_go(error: Exception) -> None:
    """Give back what the frames of its tracebacks hold: after a lack of memory, the validation needs it."""
    for cause in causes(error):
        traceback.clear_frames(cause.__traceback__)
