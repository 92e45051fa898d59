"""Walking a DSPy program: its predictors, what each can be supervised on, and one traced run per example."""

from __future__ import annotations

import contextvars
import copy
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, ParamSpec, TypeVar

import dspy
from dspy.adapters.types import Type as CustomType
from dspy.utils.callback import BaseCallback
from dspy.utils.exceptions import AdapterParseError, DSPyError

from dspy_greater.errors import DataError, ProgramError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_ROWS_NAMED = 10
# Custom types that every adapter writes into the prompt as ordinary text.
_TEXT_TYPES = ("Code", "Reasoning")
# What the optimizers attach to the program that they return.
_ATTACHED = {"candidate_programs", "detailed_results", "score"}


@dataclass(frozen=True)
class PredictorSite:
    """One predictor of a program, and everything that shapes its prompt.

    `name` is its path in `named_predictors()`; a predictor that is reachable by several paths is listed
    once. `adapter` is the one in force (`dspy.settings.adapter`, or ChatAdapter), without the fallback to
    JSON, which would answer a parse error with another prompt than the one that is being searched.
    """

    name: str
    signature: Any
    instruction: str
    adapter: Any
    lm: Any
    demos: tuple[Any, ...]
    input_fields: tuple[str, ...]
    output_fields: tuple[str, ...]
    lists_tools: bool = False


@dataclass(frozen=True)
class PredictorCall:
    """One call of one predictor: its inputs, and its parsed outputs or what the model wrote instead.

    `completion` is the model's text where an adapter parsed one; `outputs` holds the fields that could be
    parsed; `error` is None for a call that succeeded.
    """

    predictor: str
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]
    completion: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class CallTrace:
    """One run of a program on one example; `failure` says what kind of error ended it, None for none.

    Failures are "parse" (the model's text did not parse), "lm" (the language model could not be
    called) and "program" (anything else). `exception` is the error itself.
    """

    calls: tuple[PredictorCall, ...]
    prediction: Any = None
    error: str | None = None
    failure: Literal["parse", "lm", "program"] | None = None
    exception: Exception | None = field(default=None, compare=False, repr=False)


def search_adapter(adapter: Any = None) -> Any:
    """The adapter to search with: the given one, or `dspy.settings.adapter`, or ChatAdapter.

    A copy without the fallback to JSON is returned where the adapter has one.
    """
    chosen = adapter or dspy.settings.adapter
    if chosen is None:
        return dspy.ChatAdapter(use_json_adapter_fallback=False)
    if getattr(chosen, "use_json_adapter_fallback", False):
        chosen = copy.copy(chosen)
        chosen.use_json_adapter_fallback = False
    return chosen


def predictors_of(program: Any, *, adapter: Any = None) -> tuple[PredictorSite, ...]:
    """The predictors of a program, in the order of `named_predictors()`, each once.

    Raises `ProgramError` when it is not a program.

    ```python
    [site.name for site in predictors_of(dspy.ChainOfThought("question -> answer"))]  # ["predict"]
    ```
    """
    _refuse_stranger(program)
    chosen = search_adapter(adapter)
    sites: list[PredictorSite] = []
    seen: set[int] = set()
    for name, predictor in program.named_predictors():
        if id(predictor) in seen:
            continue
        seen.add(id(predictor))
        signature = predictor.signature
        sites.append(
            PredictorSite(
                name=name,
                signature=signature,
                instruction=signature.instructions,
                adapter=chosen,
                lm=predictor.lm or dspy.settings.lm,
                demos=tuple(predictor.demos),
                input_fields=tuple(signature.input_fields),
                output_fields=tuple(signature.output_fields),
                lists_tools=_lists_tools(signature),
            )
        )
    return tuple(sites)


def check_examples(examples: Sequence[Any], *, name: str = "trainset") -> None:
    """Raises `DataError` when there are no examples, or some do not say which fields are inputs."""
    if not examples:
        raise DataError(f"The {name} is empty. Pass at least one dspy.Example.")
    strangers = [row for row, example in enumerate(examples) if not isinstance(example, dspy.Example)]
    if strangers:
        raise DataError(
            f"{name_rows(strangers)} of the {name} {_are(strangers)} not dspy.Example. "
            "Build them as dspy.Example(question=..., answer=...).with_inputs('question')."
        )
    bare = [row for row, example in enumerate(examples) if example._input_keys is None]
    if bare:
        raise DataError(
            f"{name_rows(bare)} of the {name} {_do(bare)} not say which fields are inputs. "
            "Call .with_inputs('question', ...) on each example."
        )


def name_rows(rows: Sequence[int]) -> str:
    """The first of these row numbers, for a message.

    Example:
        >>> name_rows([3]), name_rows(range(12))
        ('Row 3', 'Rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more')
    """
    named = ", ".join(str(row) for row in rows[:_ROWS_NAMED])
    more = f" and {len(rows) - _ROWS_NAMED} more" if len(rows) > _ROWS_NAMED else ""
    return f"Row{'s' if len(rows) > 1 else ''} {named}{more}"


def refuse_unsupported(site: PredictorSite) -> None:
    """Raises `ProgramError` when a predictor's prompt is not all text, saying why and what to do."""
    for name, info in site.signature.fields.items():
        unusual = _unusual_types(info)
        if unusual:
            raise ProgramError(
                f"Predictor `{site.name}` has the field `{name}` of type {unusual[0]}, which is not written into the "
                "prompt as plain text. Use a text field, or leave the predictor out: predictors=[...] names those "
                "that are optimised."
            )


def refuse_unusable(sites: Sequence[PredictorSite]) -> None:
    """Raises `ProgramError` when there is no predictor, or one has no language model to call."""
    if not sites:
        raise ProgramError(
            "The program has no predictors to optimise. Pass a dspy.Module that holds a dspy.Predict; "
            "a module whose `_compiled` is True is frozen and has to be unfrozen first."
        )
    for site in sites:
        where = f"Predictor `{site.name}`"
        if site.lm is None:
            raise ProgramError(f"{where} has no language model. Call dspy.configure(lm=...) or set_lm(...).")
        if isinstance(site.lm, str):
            raise ProgramError(f"{where} has the string {site.lm!r} as its language model. Pass a dspy.LM.")


def copy_program(program: Any) -> Any:
    """A deep copy of a program that shares its language models: weights are never copied.

    What an optimizer attached to it stays behind: a program that is compiled again would carry all the
    candidates of every earlier time, each with candidates of its own.
    """
    instead: dict[int, Any] = {}
    originals = {id(module): module for _, module in program.named_sub_modules()}
    for module in originals.values():
        instead |= {id(value): value for value in vars(module).values() if isinstance(value, dspy.BaseLM)}
        if _is_compiled(module):
            instead[id(module.candidate_programs)] = []
    try:
        copied = copy.deepcopy(program, instead)
    except Exception:  # parts that cannot be copied: DSPy shares those
        copied = program.deepcopy()
    for module in [module for _, module in copied.named_sub_modules()]:
        if id(module) not in originals and _is_compiled(module):
            for name in _ATTACHED:
                delattr(module, name)
    return copied


def with_instruction(program: Any, name: str, text: str) -> Any:
    """A copy of the program in which predictor `name` has the instruction `text`.

    Raises `ProgramError` when there is no such predictor.
    """
    return with_instructions(program, {name: text})


def with_instructions(program: Any, texts: Mapping[str, str]) -> Any:
    """A copy of the program with new instructions for the predictors named in `texts`.

    Raises `ProgramError` when there is no such predictor.
    """
    copied = copy_program(program)
    predictors = dict(copied.named_predictors())
    for name, text in texts.items():
        if name not in predictors:
            known = ", ".join(f"`{known}`" for known in predictors) or "none"
            raise ProgramError(f"The program has no predictor `{name}`; it has {known}.")
        predictors[name].signature = predictors[name].signature.with_instructions(text)
    return copied


def predictor_names(program: Any) -> dict[int, str]:
    """The name of each predictor object by its `id`; of one that is reachable by several paths, the last."""
    return {id(predictor): name for name, predictor in program.named_predictors()}


def trace_calls(
    program: Any,
    example: Any,
    *,
    adapter: Any = None,
    lm: Any = None,
    deployed: bool = False,
    names: Mapping[int, str] | None = None,
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
    recorder = _Recorder(predictor_names(program) if names is None else names)
    overrides: dict[str, Any] = {
        "trace": [],
        "adapter": (adapter or dspy.settings.adapter) if deployed else search_adapter(adapter),
        "callbacks": [*dspy.settings.get("callbacks", []), recorder],
    }
    if lm is not None:
        overrides["lm"] = lm
    with dspy.context(**overrides):
        try:
            prediction = program(**example.inputs())
        except Exception as error:  # whatever a program raises is an outcome of the run
            return CallTrace(recorder.calls(), None, _describe(error), _failure(error), error)
    return CallTrace(recorder.calls(), prediction)


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


class _Recorder(BaseCallback):
    """Collects the predictor calls of one run; the program may call predictors from several threads."""

    def __init__(self, names: Mapping[int, str]) -> None:
        self._names = names
        self._lock = threading.Lock()
        self._open: dict[str, tuple[str, dict[str, Any]]] = {}
        self._done: dict[str, PredictorCall | None] = {}
        self._completions: dict[str, str] = {}

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        name = self._names.get(id(instance))
        if name is None:
            return
        arguments = dict(inputs.get("kwargs", inputs))
        with self._lock:
            fields = instance.signature.input_fields
            self._open[call_id] = (name, {key: value for key, value in arguments.items() if key in fields})
            self._done[call_id] = None

    def on_adapter_parse_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        parent = _active_call()
        with self._lock:
            if parent in self._open:
                self._completions[parent] = str(inputs.get("completion"))

    def on_module_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        with self._lock:
            if call_id not in self._open:
                return
            name, inputs = self._open.pop(call_id)
            completion = self._completions.pop(call_id, None)
            parsed = dict(outputs.items()) if isinstance(outputs, dspy.Prediction) else {}
            if isinstance(exception, AdapterParseError):
                failed: Any = exception
                completion, partial = str(failed.lm_response), failed.parsed_result
                parsed = dict(partial) if isinstance(partial, Mapping) else {}
            error = None if exception is None else _describe(exception)
            self._done[call_id] = PredictorCall(name, inputs, parsed, completion, error)

    def calls(self) -> tuple[PredictorCall, ...]:
        with self._lock:
            return tuple(call for call in self._done.values() if call is not None)


def _is_compiled(module: Any) -> bool:
    """Whether an optimizer attached its results; a program may have a `score` of its own."""
    attached = vars(module)
    return attached.keys() >= _ATTACHED and isinstance(attached["candidate_programs"], list)


def _refuse_stranger(program: Any) -> None:
    if not isinstance(program, dspy.Module):
        kind = f"the class {program.__name__}" if isinstance(program, type) else f"a {type(program).__name__}"
        raise ProgramError(
            f"The student is {kind}, not a program. Pass an instance of a dspy.Module, such as "
            "dspy.ChainOfThought('question -> answer')."
        )


def _active_call() -> str:
    from dspy.utils.callback_context import ACTIVE_CALL_ID

    return ACTIVE_CALL_ID.get() or ""


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _failure(error: Exception) -> Literal["parse", "lm", "program"]:
    if isinstance(error, AdapterParseError):
        return "parse"
    return "lm" if isinstance(error, DSPyError) else "program"


def _lists_tools(signature: Any) -> bool:
    """Whether the instruction tells the model which tools there are, as ReAct's does."""
    annotations = [str(info.annotation) for info in signature.output_fields.values()]
    names = set(signature.output_fields)
    return {"next_tool_name", "next_tool_args"} <= names or any("ToolCalls" in text for text in annotations)


def _unusual_types(info: Any) -> list[str]:
    found = CustomType.extract_custom_type_from_annotation(info.rebuild_annotation())
    names = [kind.__name__ for kind in found]
    if info.annotation is dspy.History:
        names.append("History")
    return [name for name in names if name.split("[")[0].split("_")[0] not in _TEXT_TYPES]


def _are(rows: Sequence[int]) -> str:
    return "are" if len(rows) > 1 else "is"


def _do(rows: Sequence[int]) -> str:
    return "do" if len(rows) > 1 else "does"
