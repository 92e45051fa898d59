"""A saved DSPy program as messages with named gaps, for those who serve a prompt without DSPy.

`program.save("x.json")` keeps of each predictor the instruction, the demonstrations, and prefix and description of each
field; not the fields' names, their types, or which are inputs. Names are read from what DSPy makes of them by default;
the rest is asked for where it cannot be told. Nothing is unpickled, imported or called on behalf of the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy
from dspy.signatures import ensure_signature

from dspy_greater.errors import ProgramError
from dspy_greater.program.rendering import PredictorPrompt

ADAPTERS = {"chat": dspy.ChatAdapter, "json": dspy.JSONAdapter, "xml": dspy.XMLAdapter}
_NAME_IN_DESCRIPTION = re.compile(r"\$\{(\w+)\}\Z")


@dataclass(frozen=True)
class SavedPredictor:
    """One predictor of a saved program; `fields` are pairs of prefix and description."""

    name: str
    instructions: str
    fields: tuple[tuple[str, str], ...]
    demos: tuple[Mapping[str, Any], ...]
    state: Mapping[str, Any]  # of its signature


def template_of(
    path: str | Path, *, signatures: Mapping[str, str] | None = None, adapter: str = "chat"
) -> dict[str, dict[str, Any]]:
    """By predictor its inputs, its outputs, and its messages with a gap such as `{{question}}` for each input.

    Args:
        path: what `program.save("x.json")` wrote.
        signatures: by predictor, as in "question -> reasoning, answer: bool", where the file does not tell.
        adapter: "chat" (DSPy's default), "json" or "xml".

    Raises:
        ProgramError: the file is no saved program, or does not tell the fields of a predictor.

    ```python
    template_of("navigate.json")["predict"]["messages"]
    ```
    """
    if adapter not in ADAPTERS:
        raise ProgramError(f"The adapter {adapter!r} is not known. Use {', '.join(ADAPTERS)}.")
    saved = saved_predictors(path)
    asked = dict(signatures or {})
    strangers = [name for name in asked if name not in {predictor.name for predictor in saved}]
    if strangers:
        known = ", ".join(f"`{predictor.name}`" for predictor in saved)
        raise ProgramError(f"{path} has no predictor `{strangers[0]}`; it has {known}.")
    found: dict[str, dict[str, Any]] = {}
    for predictor in saved:
        signature = _signature(path, predictor, asked.get(predictor.name))
        demos = tuple(dict(demo) for demo in predictor.demos)
        prompt = PredictorPrompt(predictor.name, signature, demos, ADAPTERS[adapter]())
        outputs = list(signature.output_fields)
        found[predictor.name] = {"inputs": list(prompt.inputs), "outputs": outputs, "messages": prompt.template()}
    return found


def saved_predictors(path: str | Path) -> list[SavedPredictor]:
    """The predictors in a file of DSPy's JSON state.

    Raises:
        ProgramError: it cannot be read, or is no such file.
    """
    try:
        state = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ProgramError(
            f"{path} cannot be read: {error.strerror or error}. Give a file that program.save('x.json') wrote."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ProgramError(
            f"{path} is no JSON file: {str(error)[:200]}. Give one that program.save('x.json') wrote; a "
            "pickled program is not read."
        ) from error
    parts: Mapping[str, Any] = state if isinstance(state, dict) else {}
    if isinstance(parts.get("demos"), list):  # a program that is itself the one predictor
        parts = {"self": parts}
    found = [_saved(path, name, part) for name, part in parts.items() if isinstance(part, dict) and "signature" in part]
    if not found:
        raise ProgramError(f"{path} holds no predictor. Give a file that program.save('x.json') wrote.")
    return found


def _saved(path: str | Path, name: str, state: Mapping[str, Any]) -> SavedPredictor:
    signature, demos = state["signature"], state.get("demos") or []
    fields = signature.get("fields") if isinstance(signature, dict) else None
    if (
        not isinstance(signature, dict)
        or not isinstance(signature.get("instructions"), str)
        or not isinstance(fields, list)
        or not all(isinstance(entry, dict) and {"prefix", "description"} <= set(entry) for entry in fields)
        or not (isinstance(demos, list) and all(isinstance(demo, dict) for demo in demos))
    ):
        raise ProgramError(
            f"Predictor `{name}` in {path} has not the form in which DSPy 3.4 saves one: a signature with "
            "`instructions` and `fields`, and a list of demonstrations. Save it again: program.save('x.json')."
        )
    pairs = tuple((str(entry["prefix"]), str(entry["description"])) for entry in fields)
    return SavedPredictor(name, signature["instructions"], pairs, tuple(demos), signature)


def _signature(path: str | Path, saved: SavedPredictor, asked: str | None) -> Any:
    """The predictor's signature, with what the file says of it."""
    try:
        signature: Any = ensure_signature(asked if asked is not None else _guessed(path, saved))
    except ProgramError:
        raise
    except Exception as error:  # whatever DSPy finds wrong with it
        raise ProgramError(
            f"The signature {asked!r} of predictor `{saved.name}` is none: {error}. Write it as in "
            f"'{saved.name}=question -> reasoning, answer: bool'."
        ) from error
    if len(signature.fields) != len(saved.fields):
        raise ProgramError(
            f"The signature {asked!r} of predictor `{saved.name}` has {len(signature.fields)} fields, and {path} has "
            f"{len(saved.fields)}: {', '.join(prefix for prefix, _ in saved.fields)}. Name each of them, in this order."
        )
    return signature.load_state(saved.state)


def _guessed(path: str | Path, saved: SavedPredictor) -> str:
    names = [_field_name(*pair) for pair in saved.fields]
    inputs = _inputs(names, saved.demos)
    if not all(names) or len(set(names)) != len(names) or inputs is None:
        shown = ", ".join(name or prefix for name, (prefix, _) in zip(names, saved.fields, strict=True))
        raise ProgramError(
            f"{path} does not tell which of the fields of predictor `{saved.name}` are inputs, and how they are "
            f"called: {shown}. Say so: --signature '{saved.name}=question -> answer'."
        )
    return f"{', '.join(names[:inputs])} -> {', '.join(names[inputs:])}"


def _field_name(prefix: str, description: str) -> str:
    """What DSPy made the prefix of, and the description where there is none."""
    found = _NAME_IN_DESCRIPTION.match(description)
    if found:
        return found.group(1)
    name = re.sub(r"\W+", "_", prefix.strip().removesuffix(":")).lower()
    return name if name.isidentifier() else ""


def _inputs(names: Sequence[str], demos: Sequence[Mapping[str, Any]]) -> int | None:
    """How many of the fields, the first ones, are inputs; None where that cannot be told."""
    if "reasoning" in names[1:]:  # which `dspy.ChainOfThought` puts before all outputs
        return names.index("reasoning")
    return 1 if len(names) == 2 else None
