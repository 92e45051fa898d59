"""The predictors of a DSPy program: what shapes the prompt of each, and which of them can be searched."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dspy
from dspy.adapters.types import Type as CustomType
from dspy.adapters.types.base_type import CUSTOM_TYPE_START_IDENTIFIER
from dspy.adapters.utils import serialize_for_json

from dspy_greater.errors import ProgramError

_TOOL: Any = dspy.Tool
_RLM: Any = dspy.RLM
# Custom types that every adapter writes into the prompt as ordinary text.
_TEXT_TYPES = ("Code", "Reasoning", "Tool", "ToolCalls", "ToolCallResults")


@dataclass(frozen=True)
class Predictor:
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


def search_adapter() -> Any:
    """The adapter to search with: `dspy.settings.adapter`, or ChatAdapter.

    A copy without the fallback to JSON is returned where the adapter has one.
    """
    chosen = dspy.settings.adapter
    if chosen is None:
        return dspy.ChatAdapter(use_json_adapter_fallback=False)
    if getattr(chosen, "use_json_adapter_fallback", False):
        chosen = copy.copy(chosen)
        chosen.use_json_adapter_fallback = False
    return chosen


def predictors_of(program: Any) -> tuple[Predictor, ...]:
    """The predictors of a program, in the order of `named_predictors()`, each once.

    Raises `ProgramError` when it is not a program.

    ```python
    [predictor.name for predictor in predictors_of(dspy.ChainOfThought("question -> answer"))]  # ["predict"]
    ```
    """
    _refuse_stranger(program)
    chosen = search_adapter()
    predictors: list[Predictor] = []
    seen: set[int] = set()
    described = _with_described_tools(program)
    for name, module in program.named_predictors():
        if id(module) in seen:
            continue
        seen.add(id(module))
        signature = module.signature
        predictors.append(
            Predictor(
                name=name,
                signature=signature,
                instruction=signature.instructions,
                adapter=chosen,
                lm=module.lm or dspy.settings.lm,
                demos=tuple(module.demos),
                input_fields=tuple(signature.input_fields),
                output_fields=tuple(signature.output_fields),
                lists_tools=id(module) in described or _asks_for_tools(signature),
                own_lm=module.lm is not None,
            )
        )
    return tuple(predictors)


def refuse_unsupported(predictor: Predictor, examples: Sequence[Any] = ()) -> None:
    """Raises `ProgramError` when a predictor's prompt is not all text, saying why and what to do.

    A type that DSPy does not know as text is taken for an input that is text in each of the `examples`.
    """
    for name, info in predictor.signature.fields.items():
        unusual = _unusual_types(info)
        if unusual and not (name in predictor.input_fields and _are_texts([example.get(name) for example in examples])):
            raise ProgramError(
                f"Predictor `{predictor.name}` has the field `{name}` of type {unusual[0]}, which is not written into "
                "the prompt as plain text. Use a text field, or leave the predictor out: predictors=[...] names those "
                "that are optimised."
            )


def refuse_unusable(predictors: Sequence[Predictor]) -> None:
    """Raises `ProgramError` when there is no predictor, or one has no language model to call."""
    if not predictors:
        raise ProgramError(
            "The program has no predictors to optimise. Pass a dspy.Module that holds a dspy.Predict; "
            "a module whose `_compiled` is True is frozen and has to be unfrozen first."
        )
    for predictor in predictors:
        where = f"Predictor `{predictor.name}`"
        if predictor.lm is None:
            raise ProgramError(f"{where} has no language model. Call dspy.configure(lm=...) or set_lm(...).")
        if isinstance(predictor.lm, str):
            raise ProgramError(f"{where} has the string {predictor.lm!r} as its language model. Pass a dspy.LM.")


def predictor_names(program: Any) -> dict[int, str]:
    """The name of each predictor object by its `id`; of one that is reachable by several paths, the last."""
    return {id(predictor): name for name, predictor in program.named_predictors()}


def samples(predictor: Any) -> bool:
    """Whether a predictor asks at a temperature, or for several samples, by its own settings or those of its LM.

    >>> samples(dspy.Predict("question -> answer", temperature=0.7)), samples(dspy.Predict("question -> answer"))
    (True, False)
    """
    options = {**getattr(predictor.lm, "kwargs", {}), **predictor.config}
    return bool(options.get("temperature")) or (options.get("n") or 1) > 1


def _refuse_stranger(program: Any) -> None:
    if not isinstance(program, dspy.Module):
        kind = f"the class {program.__name__}" if isinstance(program, type) else f"a {type(program).__name__}"
        raise ProgramError(
            f"The student is {kind}, not a program. Pass an instance of a dspy.Module, such as "
            "dspy.ChainOfThought('question -> answer')."
        )


def _asks_for_tools(signature: Any) -> bool:
    """Whether an output is the call of a tool, as ReAct's is, so that the instruction tells which there are."""
    annotations = [str(info.annotation) for info in signature.output_fields.values()]
    names = set(signature.output_fields)
    return {"next_tool_name", "next_tool_args"} <= names or any("ToolCalls" in text for text in annotations)


def _with_described_tools(program: Any) -> set[int]:
    """Predictors, by `id`, whose instruction describes the tools of a module that they belong to, as CodeAct's does.

    An RLM's instruction also describes the interpreter in which they are called.
    """
    found: set[int] = set()
    for _, module in program.named_sub_modules():
        tools = getattr(module, "tools", None)
        listed = list(tools.values()) if isinstance(tools, Mapping) else tools if isinstance(tools, list) else []
        described = [tool for tool in listed if isinstance(tool, _TOOL)]
        told = [(tool.name, " ".join((tool.desc or "").split())) for tool in described]
        told += [("llm_query", "")] if isinstance(module, _RLM) else []
        for _, predictor in module.named_predictors():
            text = " ".join(predictor.signature.instructions.split())
            if told and all(name in text and description in text for name, description in told):
                found.add(id(predictor))
    return found


def _are_texts(values: Sequence[Any]) -> bool:
    """Whether there are values of such a type, and an adapter writes every one of them as text."""
    if not values or any(value is None or isinstance(value, str) for value in values):
        return False
    return not any(CUSTOM_TYPE_START_IDENTIFIER in json.dumps(serialize_for_json(value)) for value in values)


def _unusual_types(info: Any) -> list[str]:
    found = CustomType.extract_custom_type_from_annotation(info.rebuild_annotation())
    names = [kind.__name__ for kind in found]
    return [name for name in names if name.split("[")[0].split("_")[0] not in _TEXT_TYPES]
