"""Digests of the code that a run depends on: the metric, the program's modules, its adapters.

A run that goes on takes the scores that are recorded. Under edited code they may be another metric's, or another
program's, and nothing else of a run would tell.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any

from dspy_greater.program.predictors import Predictor

_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def code_of_run(metric: Any, program: Any, predictors: Iterable[Predictor]) -> dict[str, str]:
    """A digest by what the code is of, and the Python that compiled it, without which digests cannot be compared.

    Example:
        >>> import dspy
        >>> list(code_of_run(lambda row, prediction: 1.0, dspy.ChainOfThought("question -> answer"), ()))
        ['Python', 'metric `<lambda>`']
    """
    found: dict[str, str] = {"Python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    if metric is not None:
        found[f"metric `{getattr(metric, '__qualname__', type(metric).__qualname__)}`"] = code_digest(metric)
    for _, module in program.named_sub_modules():
        held = {name: value for name, value in vars(module).items() if inspect.isfunction(value)}
        for name, thing in {type(module).__qualname__: type(module), **held}.items():
            if not _is_installed(thing):
                found[f"module `{name}`"] = code_digest(thing)
    for adapter in {type(predictor.adapter) for predictor in predictors}:
        if not _is_installed(adapter):
            found[f"adapter `{adapter.__qualname__}`"] = code_digest(adapter)
    return found


def code_digest(thing: Any) -> str:
    """Of a function, a method, a class or a callable object, with the functions and classes that it names or holds.

    Comments, docstrings and line numbers do not count. Data outside of the code is not looked at, since a metric may
    count there; code of installed packages is known by its name.

    Example:
        >>> code_digest(lambda row, prediction: 1.0) == code_digest(lambda row, prediction: 1.0)
        True
        >>> code_digest(lambda row, prediction: 1.0) == code_digest(lambda row, prediction: 0.5)
        False
    """
    digest, seen, left = hashlib.sha256(), dict[int, Any](), [thing]
    while left:
        now = left.pop()
        if id(now) in seen:
            continue
        seen[id(now)] = now
        told, named = _told(now)
        digest.update("\n".join([*told, ""]).encode())
        left += named
    return digest.hexdigest()[:16]


def _told(thing: Any) -> tuple[list[str], list[Any]]:
    """What a digest is made from, and what else belongs to it."""
    if isinstance(thing, functools.partial):
        return [_data(thing.args), _data(thing.keywords), _data(thing.keywords.values())], [thing.func]
    if inspect.ismethod(thing):
        return [], [thing.__func__, type(thing.__self__)]
    if not inspect.isfunction(thing) and not inspect.isclass(thing):
        return [], [getattr(thing, "__wrapped__", type(thing))]
    name = f"{thing.__module__}.{thing.__qualname__}"
    if _is_installed(thing):
        return [name], []
    told, named = _of_function(thing) if inspect.isfunction(thing) else ([], _in_class(thing))
    return [name, *told], named


def _of_function(function: FunctionType) -> tuple[list[str], list[Any]]:
    defaults = [_data(function.__defaults__ or ()), _data((function.__kwdefaults__ or {}).values())]
    named = [function.__globals__.get(name) for name in sorted(_names(function.__code__))]
    named += _contents(function)
    return [*_code(function.__code__, function.__doc__), *defaults], [thing for thing in named if _is_code(thing)]


def _in_class(kind: type) -> list[Any]:
    parts: list[Any] = []
    for _, value in sorted(vars(kind).items()):
        parts += (value.fget, value.fset) if isinstance(value, property) else (getattr(value, "__func__", value),)
    return [*kind.__mro__[1:], *filter(inspect.isfunction, parts)]


def _is_code(thing: Any) -> bool:
    kinds = (inspect.isfunction, inspect.isclass, inspect.ismethod)
    return any(kind(thing) for kind in kinds) or isinstance(thing, functools.partial | functools._lru_cache_wrapper)


def _data(values: Iterable[Any]) -> str:
    """Numbers and texts as they are; of anything else the type, since its text may have an address in it."""
    plain = (bool, int, float, str, bytes, type(None))
    return repr([value if isinstance(value, plain) else type(value).__qualname__ for value in values])


def _code(code: CodeType, doc: str | None = None) -> Iterator[str]:
    yield code.co_code.hex()
    yield repr((code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars))
    for place, value in enumerate(code.co_consts):
        if isinstance(value, CodeType):
            yield from _code(value)
        elif isinstance(value, frozenset):  # in another order in each process
            yield repr(sorted(map(repr, value)))
        else:
            yield repr(None if place == 0 and value == doc else value)


def _names(code: CodeType) -> set[str]:
    """Names in the code and in what is defined inside it."""
    inside = [_names(value) for value in code.co_consts if isinstance(value, CodeType)]
    return set(code.co_names).union(*inside)


def _contents(function: FunctionType) -> Iterator[Any]:
    """What it closes over."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            continue


def _is_installed(thing: Any) -> bool:
    """Whether a package brought it, whose version is on record, or Python itself."""
    if inspect.isfunction(thing):
        return thing.__code__.co_filename.startswith(("<frozen", *_INSTALLED))
    module = sys.modules.get(thing.__module__)
    file = getattr(module, "__file__", None)
    return thing.__module__ == "builtins" or (file is not None and file.startswith(_INSTALLED))
