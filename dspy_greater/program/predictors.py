"""Walking a DSPy program: its predictors, what each can be supervised on, and one traced run per example."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import dspy
from dspy.adapters.types import Type as CustomType
from dspy.adapters.types.base_type import CUSTOM_TYPE_START_IDENTIFIER
from dspy.adapters.utils import serialize_for_json

from dspy_greater.errors import OUTCOMES, DataError, ProgramError
from dspy_greater.program.failures import Failure
from dspy_greater.program.tracing import CallRecorder, PredictorCall, described

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_ROWS_NAMED = 10
# Custom types that every adapter writes into the prompt as ordinary text.
_TEXT_TYPES = ("Code", "Reasoning", "Tool", "ToolCalls", "ToolCallResults")
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
    own_lm: bool = True  # False: it has none and uses that of DSPy's settings


@dataclass(frozen=True)
class CallTrace:
    """One run of a program on one example; `failure` says what kind of error ended it, None for none.

    `source` says in words who raised it, and `exception` is the error itself.
    """

    calls: tuple[PredictorCall, ...]
    prediction: Any = None
    error: str | None = None
    failure: Failure | None = None
    source: str | None = None
    exception: BaseException | None = field(default=None, compare=False, repr=False)


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
                own_lm=predictor.lm is not None,
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


def refuse_unsupported(site: PredictorSite, examples: Sequence[Any] = ()) -> None:
    """Raises `ProgramError` when a predictor's prompt is not all text, saying why and what to do.

    A type that DSPy does not know as text is taken for an input that is text in each of the `examples`.
    """
    for name, info in site.signature.fields.items():
        unusual = _unusual_types(info)
        if unusual and not (name in site.input_fields and _are_texts([each.get(name) for each in examples])):
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
    overrides: dict[str, Any] = {
        "trace": [],
        "adapter": (adapter or dspy.settings.adapter) if deployed else search_adapter(adapter),
    }
    if lm is not None:
        overrides["lm"] = lm
    recorder = CallRecorder(predictor_names(program) if names is None else names, overrides.get("lm", dspy.settings.lm))
    # First of all: what other callbacks change, they change again when a prompt is laid out.
    overrides["callbacks"] = [recorder, *dspy.settings.get("callbacks", [])]
    with dspy.context(**overrides):
        try:
            prediction = run_program(program, example.inputs())
        except OUTCOMES as error:  # whatever a program raises is an outcome of the run
            failure, source = recorder.failure_of(error), recorder.source_of(error)
            return CallTrace(recorder.calls(), None, described(error), failure, source, error)
    return CallTrace(recorder.calls(), prediction)


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


def _lists_tools(signature: Any) -> bool:
    """Whether the instruction tells the model which tools there are, as ReAct's does."""
    annotations = [str(info.annotation) for info in signature.output_fields.values()]
    names = set(signature.output_fields)
    return {"next_tool_name", "next_tool_args"} <= names or any("ToolCalls" in text for text in annotations)


def _are_texts(values: Sequence[Any]) -> bool:
    """Whether there are values of such a type, and an adapter writes every one of them as text."""
    if not values or any(value is None or isinstance(value, str) for value in values):
        return False
    return not any(CUSTOM_TYPE_START_IDENTIFIER in json.dumps(serialize_for_json(value)) for value in values)


def _unusual_types(info: Any) -> list[str]:
    found = CustomType.extract_custom_type_from_annotation(info.rebuild_annotation())
    names = [kind.__name__ for kind in found]
    return [name for name in names if name.split("[")[0].split("_")[0] not in _TEXT_TYPES]


def _are(rows: Sequence[int]) -> str:
    return "are" if len(rows) > 1 else "is"


def _do(rows: Sequence[int]) -> str:
    return "do" if len(rows) > 1 else "does"
