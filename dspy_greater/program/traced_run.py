"""One run of a DSPy program on one example, with every call of its predictors."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import dspy

from dspy_greater.errors import OUTCOMES
from dspy_greater.program.failures import Failure, FailureListener
from dspy_greater.program.faults import ServerFault
from dspy_greater.program.predictors import predictor_names, search_adapter
from dspy_greater.program.tracing import CallRecorder, PredictorCall, described

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True)
class CallTrace:
    """One run of a program on one example; `failure` says what kind of error ended it, None for none.

    `source` says in words who raised it, and `exception` is the error itself. `faults` are those of servers that
    were asked, whether or not they ended the run.
    """

    calls: tuple[PredictorCall, ...]
    prediction: Any = None
    error: str | None = None
    failure: Failure | None = None
    source: str | None = None
    exception: BaseException | None = field(default=None, compare=False, repr=False)
    faults: tuple[ServerFault, ...] = ()


def trace_calls(
    program: Any, example: Any, *, deployed: bool = False, names: Mapping[int, str] | None = None
) -> CallTrace:
    """Run the program once on an example's inputs and record every call of its predictors.

    With `deployed` the adapter keeps its fallback to JSON, as it will when the program is used. `names` are the
    program's `predictor_names`, for a caller who runs it often: finding them walks over all that the program holds.
    A program that fails is recorded, never raised; interrupts are raised. Calls are in the order in which
    they started. Safe in many threads at once; carry the caller's settings into them with `carrying`.

    ```python
    trace = trace_calls(program, dspy.Example(question="2 + 2?", answer="4").with_inputs("question"))
    trace.calls[-1].outputs["answer"], trace.error
    ```
    """
    recorder = CallRecorder(predictor_names(program) if names is None else names, dspy.settings.lm)
    # First of all: what other callbacks change, they change again when a prompt is laid out.
    callbacks = [recorder, *dspy.settings.get("callbacks", [])]
    with dspy.context(trace=[], adapter=dspy.settings.adapter if deployed else search_adapter(), callbacks=callbacks):
        try:
            prediction = run_program(program, example.inputs())
        except OUTCOMES as error:  # whatever a program raises is an outcome of the run
            failure, source = recorder.failure_of(error), recorder.source_of(error)
            faults = recorder.faults_behind(error)
            return CallTrace(recorder.calls(), None, described(error), failure, source, error, faults)
    return CallTrace(recorder.calls(), prediction, faults=recorder.faults)


def hearing_faults(function: Callable[[], Result]) -> tuple[Result, tuple[ServerFault, ...]]:
    """What a function returns, and what servers that it asked did instead of answering.

    >>> hearing_faults(lambda: 1)
    (1, ())
    """
    listener = FailureListener()
    with dspy.context(callbacks=[*dspy.settings.get("callbacks", []), listener]):
        return function(), listener.faults


def run_program(program: Any, inputs: Mapping[str, Any]) -> Any:
    """Call the program with these inputs; one that has only `aforward` runs in an event loop of its own.

    ```python
    run_program(dspy.Predict("question -> answer"), {"question": "2 + 2?"}).answer
    ```
    """
    # Asked of class and attributes: DSPy warns of every look at an instance's own `forward`.
    is_sync = hasattr(type(program), "forward") or "forward" in vars(program)
    if is_sync or not hasattr(type(program), "aforward"):
        return program(**inputs)

    def run() -> Any:
        return asyncio.run(program.acall(**inputs))

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return run()
    with ThreadPoolExecutor(1) as elsewhere:  # this thread's loop is running, in a notebook for one
        return elsewhere.submit(carrying(run)).result()


def calls_of(calls: Iterable[PredictorCall], name: str) -> tuple[PredictorCall, ...]:
    """All calls of predictor `name` in one run, in the order in which they started.

    A predictor in a loop has several, one that the run did not come to has none, and one that is reachable by
    several paths has the calls of all of them.

    Example:
        >>> steps = [PredictorCall("react", {}, {}), PredictorCall("extract", {}, {}), PredictorCall("react", {}, {})]
        >>> len(calls_of(steps, "react")), calls_of(steps, "draft")
        (2, ())
    """
    return tuple(call for call in calls if call.predictor == name)


def carrying(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function, bound to the current DSPy settings, for use in threads that DSPy did not start.

    `dspy.context` is local to a thread: a plain thread pool sees the global settings only.

    ```python
    pool.map(carrying(lambda example: trace_calls(program, example)), trainset)
    ```
    """
    context = contextvars.copy_context()

    def bound(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        # A context can be entered by one thread at a time only: each call takes a copy.
        return context.copy().run(function, *args, **kwargs)

    return bound
