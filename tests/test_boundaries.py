"""Which part of the package may import what, read from the source and tried in fresh interpreters.

A module that is named below on neither side is held to the strictest rule, so a new or moved file
is caught until somebody says here what it may import.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import dspy_greater

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "dspy_greater"
IMPORT_NAME = {"dspy-ai": "dspy"}  # where the distribution is called otherwise

DSPY_FAMILY = {"dspy", "litellm"}
TORCH_FAMILY = {"torch", "transformers", "tokenizers", "safetensors", "accelerate"}

# From the ground up: a folder imports itself and those before it. What stands in no folder is on the ground.
FLOORS = (
    "pocket",
    "prompt",
    "model",
    "workers",
    "lm",
    "program",
    "served",
    "objective",
    "estimators",
    "run",
    "report",
    "search",
    "estimate",
    "gradsum",
)
ROOF = {
    f"{PACKAGE}.optimizer",
    f"{PACKAGE}.reference",
    f"{PACKAGE}.__main__",
}  # import any folder; no folder imports them

TOKEN_CORE = ("model", "workers", "estimators", "pocket")  # runs on machines that have these packages and no others
# What trained the pocket model runs there as well.
TRAINING = [f"benchmarks.pocket.{path.stem}" for path in sorted((ROOT / "benchmarks" / "pocket").glob("[a-z]*.py"))]
TOKEN_CORE_MAY_IMPORT = {"torch", "transformers", "tokenizers", "safetensors", "numpy"}
OPTIONAL = {"gguf", "accelerate"}  # the extra `gguf`; asked for by a function that says what to install
CLUSTER = {"ray"}  # the extra `ray`, in the same way
PLOTS = {"matplotlib"}  # the extra `plots`, in the same way
TRACKERS = {"mlflow", "wandb"}  # extras of their own, imported by name where a tracker opens its run
NO_TORCH_UNTIL_USED = ("program", "served", "prompt", "lm", "gradsum")
NEITHER = ("run", "report")
NEITHER_MODULES = {f"{PACKAGE}.{name}" for name in ("errors", "settings", "metric", "stats", "search.state")}

# Plain torch over the program's rows, to be read and to be tested against: nothing of the package needs it.
FRONT_DOOR = ("reference",)


@dataclass(frozen=True)
class Import:
    """One imported module, by its full dotted name."""

    target: str
    line: int
    when: str  # "load": as the module is imported; "call": inside a function

    @property
    def top(self) -> str:
        return self.target.partition(".")[0]


def module_paths() -> dict[str, Path]:
    """Full dotted name -> file, for every module of the package."""
    folder = ROOT / PACKAGE
    names = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = module_paths()


def folder(name: str) -> str:
    """The folder that a module stands in; "" where it stands in none."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and (ROOT / PACKAGE / parts[1]).is_dir() else ""


def of_folders(*folders: str) -> list[str]:
    return [name for name in MODULES if folder(name) in folders]


def of_neither() -> list[str]:
    return [*of_folders(*NEITHER), *sorted(NEITHER_MODULES & set(MODULES))]


def is_type_checking(test: ast.expr) -> bool:
    return "TYPE_CHECKING" in (getattr(test, "id", ""), getattr(test, "attr", ""))


def statements(node: ast.AST, when: str = "load") -> Iterator[tuple[ast.AST, str]]:
    """Every node that can run, with when it runs; what only a type checker reads is left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and is_type_checking(child.test):
            for other in child.orelse:
                yield other, when
                yield from statements(other, when)
            continue
        inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield child, when
        yield from statements(child, "call" if inside else when)


def names_imported(node: ast.AST, module: str, is_package: bool) -> list[str]:
    """The dotted names that an import statement, or a call of import_module with a literal, asks for."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parts = module.split(".")
            parts = parts[: len(parts) - node.level + is_package]
            base = ".".join([*parts, base] if base else parts)
        submodules = [f"{base}.{alias.name}" for alias in node.names]
        inner = [name for name in submodules if name in MODULES]
        return [base, *inner]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = getattr(node.func, "id", "") or getattr(node.func, "attr", "")
        if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
            name = node.args[0].value
            return [f"{module if is_package else module.rpartition('.')[0]}{name}" if name.startswith(".") else name]
    return []


def imports_in(source: str, module: str, is_package: bool) -> list[Import]:
    found = []
    for node, when in statements(ast.parse(source)):
        for name in names_imported(node, module, is_package):
            found.append(Import(name, getattr(node, "lineno", 0), when))
    return found


@cache
def imports_of(module: str) -> list[Import]:
    path = MODULES[module]
    return imports_in(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")


def reached(module: str, when: set[str]) -> dict[str, str]:
    """Third-party top-level package -> the chain of imports by which `module` comes to it."""
    outside: dict[str, str] = {}
    seen = {module}
    stack = [(module, module)]
    while stack:
        here, chain = stack.pop()
        for entry in imports_of(here):
            if entry.when not in when:
                continue
            step = f"{chain} (line {entry.line}) -> {entry.target}"
            if entry.top != PACKAGE:
                outside.setdefault(entry.top, step)
                continue
            # Importing a.b.c imports a.b too; the root itself is lazy and has a test of its own.
            parts = entry.target.split(".")
            for name in (".".join(parts[:n]) for n in range(2, len(parts) + 1)):
                if name in MODULES and name not in seen:
                    seen.add(name)
                    stack.append((name, step))
    return {top: chain for top, chain in outside.items() if top not in sys.stdlib_module_names}


def run_python(code: str) -> str:
    """The standard output of a fresh interpreter that finds the package where this test found it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def loaded_after(statement: str, families: set[str]) -> list[str]:
    code = f"import sys\n{statement}\nprint(*sorted(set(sys.modules) & {families!r}))"
    return run_python(code).split()


# --- the check itself ---


def test_there_is_a_package_to_check() -> None:
    assert (ROOT / PACKAGE / "__init__.py").is_file(), f"no package at {ROOT / PACKAGE}"
    assert Path(dspy_greater.__file__).resolve() == ROOT / PACKAGE / "__init__.py"
    assert f"{PACKAGE}.errors" in MODULES
    folders = {path.name for path in (ROOT / PACKAGE).iterdir() if (path / "__init__.py").is_file()}
    assert folders == set(FLOORS), "a folder without a floor, or a floor without a folder"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch.nn as nn", [("torch.nn", "load")]),
        ("def f():\n    from torch import nn", [("torch", "call")]),
        ("class A:\n    import torch", [("torch", "load")]),
        ("try:\n    import torch\nexcept ImportError:\n    pass", [("torch", "load")]),
        ("if TYPE_CHECKING:\n    import torch", []),
        ("if typing.TYPE_CHECKING:\n    import torch\nelse:\n    import json", [("json", "load")]),
        ("if not TYPE_CHECKING:\n    import torch", [("torch", "load")]),
        ("async def f():\n    import torch", [("torch", "call")]),
        ("import_module('torch')", [("torch", "load")]),
        ("from .errors import GreaterError", [("dspy_greater.errors", "load")]),
        ("from . import errors", [("dspy_greater", "load"), ("dspy_greater.errors", "load")]),
        ("from .. import errors", [("", "load")]),
    ],
)
def test_imports_are_read_as_python_runs_them(source: str, expected: list[tuple[str, str]]) -> None:
    found = imports_in(source, "dspy_greater.settings", is_package=False)
    assert [(entry.target, entry.when) for entry in found] == expected


def test_relative_imports_of_a_subpackage_resolve_against_it() -> None:
    inside = imports_in("from ..errors import X\nfrom .. import errors", "dspy_greater.pocket.tasks", False)
    package = imports_in("from ..errors import X\nfrom .tasks import Y", "dspy_greater.pocket", True)
    assert {entry.target for entry in inside} == {"dspy_greater.errors", "dspy_greater"}
    assert [entry.target for entry in package] == ["dspy_greater.errors", "dspy_greater.pocket.tasks"]


# --- what the source says ---


@pytest.mark.parametrize("module", of_folders(*TOKEN_CORE))
def test_the_token_level_core_imports_only_what_a_bare_machine_has(module: str) -> None:
    allowed = TOKEN_CORE_MAY_IMPORT | OPTIONAL | CLUSTER
    extra = {top: how for top, how in reached(module, {"load", "call"}).items() if top not in allowed}
    assert not (OPTIONAL | CLUSTER) & set(reached(module, {"load"}))
    assert not extra, "\n".join(extra.values())


@pytest.mark.parametrize("module", of_folders(*NO_TORCH_UNTIL_USED))
def test_the_dspy_side_loads_without_torch(module: str) -> None:
    heavy = {top: how for top, how in reached(module, {"load"}).items() if top in TORCH_FAMILY}
    assert not heavy, "\n".join(heavy.values())


@pytest.mark.parametrize("module", of_neither())
def test_what_is_on_both_sides_knows_neither_dspy_nor_torch(module: str) -> None:
    found = {top: how for top, how in reached(module, {"load", "call"}).items() if top in DSPY_FAMILY | TORCH_FAMILY}
    assert not found, "\n".join(found.values())


def test_the_nouns_of_a_search_import_nothing_so_that_every_part_may_speak_of_them() -> None:
    assert {entry.top for entry in imports_of(f"{PACKAGE}.objective.types")} <= {"__future__", "dataclasses"}
    assert f"{PACKAGE}.objective.types" in {entry.target for entry in imports_of(f"{PACKAGE}.run.events")}


@pytest.mark.parametrize("module", list(MODULES))
def test_imports_run_downwards(module: str) -> None:
    here = folder(module)
    allowed = {"", here, *(FLOORS[: FLOORS.index(here)] if here else FLOORS if module in ROOF else ())}
    upwards = [
        f"{module}, line {entry.line}: {entry.target}"
        for entry in imports_of(module)
        if entry.top == PACKAGE and module != PACKAGE
        if folder(entry.target) not in allowed or (entry.target in ROOF and module not in ROOF)
    ]
    assert not upwards, "\n".join(upwards)


def test_no_modules_import_each_other_in_a_circle() -> None:
    def parts(module: str) -> set[str]:
        return {entry.target for entry in imports_of(module) if entry.target in MODULES and entry.when == "load"}

    waiting = {module: parts(module) - {module, PACKAGE} for module in MODULES if module != PACKAGE}
    while free := [module for module, needs in waiting.items() if not needs & waiting.keys()]:
        waiting = {module: needs for module, needs in waiting.items() if module not in free}
    assert not waiting, "\n".join(f"{module} -> {sorted(needs & waiting.keys())}" for module, needs in waiting.items())


@pytest.mark.parametrize("module", list(MODULES))
def test_no_module_goes_through_the_lazy_root(module: str) -> None:
    through = [
        f"{module}, line {node.lineno}: from the package root: {alias.name}"
        for node, _ in statements(ast.parse(MODULES[module].read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name in set(dspy_greater.__all__) - {"__version__"}
        and PACKAGE in names_imported(node, module, MODULES[module].name == "__init__.py")
    ]
    assert not through, "\n".join(through)


def test_every_third_party_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.split(r"[^\w-]", requirement)[0] for requirement in project["dependencies"]}
    names = {IMPORT_NAME.get(name, name) for name in names}
    extra = {re.split(r"[^\w-]", requirement)[0] for requirement in project["optional-dependencies"]["gguf"]}
    assert extra >= OPTIONAL
    assert any(each.startswith("matplotlib") for each in project["optional-dependencies"]["plots"])
    assert any(each.startswith("ray") for each in project["optional-dependencies"]["ray"])
    assert TRACKERS <= set(project["optional-dependencies"])
    assert not (PLOTS | TRACKERS) & {top for module in MODULES for top in reached(module, {"load"})}
    undeclared = [
        f"{module}, line {entry.line}: {entry.target}"
        for module in MODULES
        for entry in imports_of(module)
        if entry.top not in sys.stdlib_module_names | names | {PACKAGE} | OPTIONAL | PLOTS | CLUSTER
    ]
    assert not undeclared, "\n".join(undeclared)


# --- the benchmarks ---


@cache
def benchmarks() -> dict[str, list[str]]:
    """Full dotted name -> every module that it imports, by whatever is read or run, in order."""
    paths = {}
    for path in sorted((ROOT / "benchmarks").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found: dict[str, list[str]] = {}
    for module, path in paths.items():
        found[module] = []
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found[module] += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = "." * node.level + (node.module or "")
                inner = [name for alias in node.names if (name := f"{base}.{alias.name}") in paths]
                found[module] += inner or [base]
    return found


def test_benchmarks_import_each_other_by_their_full_names() -> None:
    relative = [f"{module}: {name}" for module, names in benchmarks().items() for name in names if name.startswith(".")]
    assert not relative, "\n".join(relative)


def test_no_benchmarks_import_each_other_in_a_circle() -> None:
    waiting = {module: set(names) & benchmarks().keys() for module, names in benchmarks().items()}
    assert sum(map(len, waiting.values())) > len(waiting) / 2
    while free := [module for module, needs in waiting.items() if not needs & waiting.keys()]:
        waiting = {module: needs for module, needs in waiting.items() if module not in free}
    assert not waiting, "\n".join(f"{module} -> {sorted(needs & waiting.keys())}" for module, needs in waiting.items())


# --- what a fresh interpreter does ---


def test_importing_the_package_brings_in_neither_torch_nor_dspy() -> None:
    assert loaded_after(f"import {PACKAGE}; dir({PACKAGE})", DSPY_FAMILY | TORCH_FAMILY) == []


@pytest.mark.slow
def test_the_dspy_side_brings_in_no_torch() -> None:
    assert (
        loaded_after(
            "import " + ", ".join([*of_folders(*NO_TORCH_UNTIL_USED), *of_neither()]), {"torch", "transformers"}
        )
        == []
    )


@pytest.mark.slow
def test_the_token_level_core_works_where_dspy_is_not_installed() -> None:
    core = of_folders(*TOKEN_CORE) + TRAINING
    code = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {DSPY_FAMILY | {"datasets"}!r}:
            raise ModuleNotFoundError(f"{{name}} is not installed here", name=name)

sys.meta_path.insert(0, Missing())
import {", ".join(core)}
print("loaded", {len(core)})
"""
    assert run_python(code) == f"loaded {len(core)}"


# --- the public names ---


def test_every_public_name_is_listed_and_resolves() -> None:
    assert set(dspy_greater.__all__) <= set(dir(dspy_greater))
    for name in dspy_greater.__all__:
        assert getattr(dspy_greater, name) is not None


def test_an_unknown_name_is_an_ordinary_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'dspy_greater' has no attribute 'GreaterTeleprompter'"):
        _ = dspy_greater.GreaterTeleprompter
