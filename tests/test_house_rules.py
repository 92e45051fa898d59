"""The rules of the house that a machine can check, read from the source of the package."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dspy_greater import errors

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = sorted((ROOT / "dspy_greater").rglob("*.py"))
TRAINING = sorted((ROOT / "benchmarks" / "pocket").rglob("*.py"))  # runs on bare machines, as the token-level core does
SIZED = [*LIBRARY, *sorted((ROOT / "benchmarks").rglob("*.py"))]

LONGEST_MODULE = 400
LONGEST_FUNCTION = 60  # without its docstring

BUILTIN_ERRORS = {
    name
    for name, value in vars(builtins).items()
    if isinstance(value, type) and issubclass(value, BaseException) and not issubclass(value, Warning)
}
# What Python itself expects from a protocol or an abstract method, and the user's own interrupt.
MAY_BE_RAISED = {"AttributeError", "StopIteration", "KeyboardInterrupt"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def source(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def parse(text: str) -> ast.Module:
    return ast.parse(text)


def docstring_lines(node: Function) -> int:
    first = node.body[0]
    is_docstring = ast.get_docstring(node) is not None
    return (first.end_lineno or first.lineno) - first.lineno + 1 if is_docstring else 0


def long_functions(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1 - docstring_lines(node)
            if lines > LONGEST_FUNCTION:
                yield node.lineno, f"{node.name} has {lines} lines"


def prints(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
            yield node.lineno, "print()"


def bare_excepts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield node.lineno, "except without a type"


def asserts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            yield node.lineno, "assert, which python -O leaves out"


def undocumented(tree: ast.Module) -> Iterator[tuple[int, str]]:
    if ast.get_docstring(tree) is None:
        yield 1, "the module has no docstring"
    for node in tree.body:
        is_definition = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        if is_definition and not node.name.startswith("_") and ast.get_docstring(node) is None:
            yield node.lineno, f"{node.name} has no docstring"


def foreign_errors(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Builtin errors that are raised, and error classes with no place in the package's own hierarchy."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            called = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = getattr(called, "id", "")
            if name in BUILTIN_ERRORS - MAY_BE_RAISED:
                yield node.lineno, f"raises {name}, not a GreaterError"
        if isinstance(node, ast.ClassDef):
            bases = {getattr(base, "id", "") or getattr(base, "attr", "") for base in node.bases}
            is_root = node.name == errors.GreaterError.__name__
            if bases & BUILTIN_ERRORS and not bases & set(vars(errors)) and not is_root:
                yield node.lineno, f"{node.name} is an error outside the hierarchy of GreaterError"


def errors_away_from_home(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Classes that descend from an error of `errors`, under whatever name that was imported."""
    ours = {
        name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, BaseException)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            ours |= {alias.asname for alias in node.names if alias.name in ours and alias.asname}
        if isinstance(node, ast.ClassDef):
            bases = {getattr(base, "id", "") or getattr(base, "attr", "") for base in node.bases}
            if bases & ours:
                yield node.lineno, f"{node.name} is an error that is not in errors.py"


Rule = Callable[[ast.Module], Iterator[tuple[int, str]]]


def broken(rule: Rule, paths: list[Path]) -> str:
    found = [f"{path.relative_to(ROOT)}:{line}: {what}" for path in paths for line, what in rule(parse(source(path)))]
    return "\n".join(found)


def test_there_is_a_library_to_check() -> None:
    assert ROOT / "dspy_greater" / "errors.py" in LIBRARY


def test_modules_fit_in_four_hundred_lines() -> None:
    lengths = {str(path.relative_to(ROOT)): len(source(path).splitlines()) for path in SIZED}
    assert not {name: length for name, length in lengths.items() if length > LONGEST_MODULE}


@pytest.mark.slow
def test_functions_fit_in_sixty_lines() -> None:
    assert not broken(long_functions, SIZED)


@pytest.mark.parametrize("rule", [prints, bare_excepts, asserts, foreign_errors, undocumented])
def test_the_library_keeps_the_rule(rule: Rule) -> None:
    assert not broken(rule, [*LIBRARY, *TRAINING])


def test_no_error_is_defined_outside_of_errors() -> None:
    assert not broken(errors_away_from_home, [path for path in LIBRARY if path.name != "errors.py"])
    assert len(list(errors_away_from_home(parse(source(ROOT / "dspy_greater" / "errors.py"))))) > 10


def test_no_error_of_a_loaded_module_is_defined_outside_of_errors() -> None:
    """Whatever their source looks like."""
    for path in LIBRARY:
        parts = path.relative_to(ROOT).with_suffix("").parts
        importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    found = descendants(errors.GreaterError)
    assert errors.EngineMemoryError in found and errors.MalformedAnswer in found
    assert not [each for each in found if each.__module__ != errors.__name__]


def descendants(kind: type) -> set[type]:
    below = {each for each in kind.__subclasses__() if each.__module__.startswith("dspy_greater")}
    return below.union(*(descendants(each) for each in below))


@pytest.mark.parametrize(
    ("rule", "text", "line"),
    [
        (prints, "x = 1\nprint(x)", 2),
        (bare_excepts, "try:\n    pass\nexcept:\n    pass", 3),
        (asserts, "def f(x):\n    assert x", 2),
        (foreign_errors, "raise ValueError('no')", 1),
        (foreign_errors, "raise RuntimeError", 1),
        (foreign_errors, "class Lost(Exception):\n    pass", 1),
        (errors_away_from_home, "from .errors import LossError\nclass Odd(LossError):\n    pass", 2),
        (errors_away_from_home, "from .errors import LossError as E\nclass Odd(E):\n    pass", 2),
        (errors_away_from_home, "def f():\n    class Odd(errors.LossError):\n        pass", 2),
        (undocumented, "x = 1", 1),
        (undocumented, "'''A module.'''\ndef f():\n    pass", 2),
        (undocumented, "'''A module.'''\nclass A:\n    pass", 2),
        (long_functions, "def f():\n" + "    x = 1\n" * 60, 1),
    ],
)
def test_each_rule_sees_what_breaks_it(rule: Rule, text: str, line: int) -> None:
    assert [where for where, _ in rule(parse(text))] == [line]


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (bare_excepts, "try:\n    pass\nexcept ValueError:\n    pass"),
        (foreign_errors, "def __getattr__(name):\n    raise AttributeError(name)"),
        (foreign_errors, "class Odd(GreaterError, ValueError):\n    pass\nraise Odd('no')"),
        (foreign_errors, "class Loud(UserWarning):\n    pass"),
        (foreign_errors, "try:\n    pass\nexcept ValueError:\n    raise"),
        (undocumented, "'''A module.'''\ndef _f():\n    pass"),
        (long_functions, "def f():\n    '''" + "text\n" * 60 + "    '''\n" + "    x = 1\n" * 59),
    ],
)
def test_no_rule_sees_what_is_allowed(rule: Rule, text: str) -> None:
    assert list(rule(parse(text))) == []


def test_every_error_has_one_root_and_says_what_it_is() -> None:
    classes = [
        value for value in vars(errors).values() if inspect.isclass(value) and value.__module__ == errors.__name__
    ]
    assert errors.GreaterError in classes
    for error in classes:
        assert issubclass(error, errors.GreaterError), error
        assert "__doc__" in vars(error) and error.__doc__, error
