"""What a run is asked to do: a YAML file, and flags on top of it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from benchmarks import optimizers
from benchmarks.harness.cells import CellKey
from benchmarks.harness.phrasebook import PHRASEBOOK
from benchmarks.tasks import registry
from dspy_greater.errors import SettingsError

# Charged tokens. On the pocket model `small` is what GReaTer's auto="light" takes with its validation (400,000 to
# 520,000 were measured, with three candidates a step), and some 50 seconds of one core.
BUDGETS = {"small": 500_000, "medium": 2_000_000, "large": 8_000_000}


@dataclass(frozen=True)
class RunConfig:
    """A run: every task with every optimizer and every seed.

    Attributes:
        tasks: names.
        optimizers: names.
        model: the task model; `pocket`, a directory or a hub id, or a LiteLLM name with `api_base`.
        model_args: how to load and sample it.
        prompt_model: `phrasebook`, `self` for the task model, or any LiteLLM name.
        prompt_args: how to sample it. A small model that proposes for itself rambles to the end of its `max_tokens`.
        budget: charged tokens for each cell.
        seeds: one cell for each.
        limit: the most rows of each split.
        out: the run directory.
        data_dir: files in place of the hub.
        threads: rows under way at a time.
        together: cells under way at a time, of optimizers that only ask the model; they share its batches.
        time_limit: seconds for an optimizer in a cell, as a last resort.
        retry_errors: run cells again that failed.
        dry_run: only say what would be run, and what it takes.
        plan: the model and the device in numbers, for `dry_run`; see `benchmarks.harness.plan`. In the YAML file alone.
    """

    tasks: tuple[str, ...]
    optimizers: tuple[str, ...]
    model: str = "pocket"
    model_args: Mapping[str, Any] = field(default_factory=dict)
    prompt_model: str = PHRASEBOOK
    prompt_args: Mapping[str, Any] = field(default_factory=dict)
    budget: int = BUDGETS["small"]
    seeds: tuple[int, ...] = (0,)
    limit: int | None = None
    out: Path = Path("runs/comparison")
    data_dir: Path | None = None
    threads: int = 32
    together: int = 1
    time_limit: float = 3600.0
    retry_errors: bool = False
    dry_run: bool = False
    plan: Mapping[str, Any] = field(default_factory=dict)

    def keys(self) -> list[CellKey]:
        """The cells, task by task and seed by seed, so that optimizers that are compared run side by side."""
        arguments = arguments_text(self.model_args)
        proposer = ",".join(filter(None, (self.prompt_model, arguments_text(self.prompt_args))))
        return [
            CellKey(task, name, seed, self.model, arguments, proposer, self.budget, self.limit)
            for task in self.tasks
            for seed in self.seeds
            for name in self.optimizers
        ]


def arguments_text(arguments: Mapping[str, Any]) -> str:
    """How arguments stand in a cell's name: in one order, and without secrets."""
    return ",".join(f"{key}={arguments[key]}" for key in sorted(arguments) if key != "api_key")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `run`; each of them may stand in the YAML file as well, with `_` or `-`."""
    budgets = ", ".join(f"{name} = {tokens:,}" for name, tokens in BUDGETS.items())
    parser.add_argument("--config", type=Path, help="YAML file with any of these settings; flags win")
    parser.add_argument("--tasks", help="names with commas between; patterns such as 'pocket:*' too")
    parser.add_argument("--optimizers", help="names with commas between; '*' is all")
    parser.add_argument("--model", help="'pocket' (default), a directory, a hub id, or a LiteLLM name with api_base=")
    parser.add_argument(
        "--model-args", help="key=value with commas between: device, dtype, temperature, max_tokens, ..."
    )
    parser.add_argument(
        "--prompt-model",
        help="proposer of textual optimizers: 'phrasebook' (default), 'self' for the task model, whose tokens are then "
        "charged, or a LiteLLM name",
    )
    parser.add_argument("--prompt-args", help="the same for the proposer, such as max_tokens=300")
    parser.add_argument("--budget", help=f"charged tokens for each cell: {budgets}, or a number (500k, 2M)")
    parser.add_argument("--seeds", help="whole numbers with commas between (default 0)")
    parser.add_argument("--limit", type=int, help="the most rows of each split")
    parser.add_argument("--out", type=Path, help="run directory (default runs/comparison); run again to go on")
    parser.add_argument("--data-dir", type=Path, help="directory with bbh/, gsm8k/ and folio/; the hub without it")
    parser.add_argument("--threads", type=int, help="rows under way at a time (default 32)")
    parser.add_argument(
        "--together",
        type=int,
        help="cells under way at a time (default 1), of optimizers that only ask the model; each has a process of its "
        "own, and all share the model's batches",
    )
    parser.add_argument("--time-limit", type=float, help="seconds an optimizer may take in a cell (default 3600)")
    parser.add_argument("--retry-errors", action="store_true", default=None, help="run cells again that failed")
    parser.add_argument("--dry-run", action="store_true", default=None, help="say what would be run, and what it takes")


def from_flags(flags: argparse.Namespace) -> RunConfig:
    """The settings of the YAML file with the flags on top.

    Raises:
        SettingsError: an unknown setting, task or optimizer, or a value that cannot be read.
    """
    given = {**_of_file(flags.config), **{k: v for k, v in vars(flags).items() if v is not None and k != "config"}}
    for name in ("tasks", "optimizers"):
        if not given.get(name):
            raise SettingsError(f"Which {name}? Give --{name}; `python -m benchmarks ls` lists them.")
    values: dict[str, Any] = dict(given)
    values["tasks"] = chosen(given["tasks"], registry.names(), "task")
    values["optimizers"] = chosen(given["optimizers"], optimizers.names(), "optimizer")
    values |= {name: arguments(given.get(name, {}), name) for name in ("model_args", "prompt_args")}
    values["budget"] = budget_of(given.get("budget", "small"))
    values["seeds"] = _seeds(given.get("seeds", (0,)))
    for name in ("out", "data_dir"):
        if given.get(name) is not None:
            values[name] = Path(given[name]).expanduser()
    for name in ("limit", "threads", "together", "time_limit"):
        if given.get(name) is not None and not given[name] > 0:
            raise SettingsError(f"{name}={given[name]}: give a positive number.")
    return RunConfig(**values)


def budget_of(text: str | int) -> int:
    """Charged tokens of `small`, `medium`, `large`, or a number with `k` or `M`.

    Example:
        >>> budget_of("500k"), budget_of("2M"), budget_of(1000)
        (500000, 2000000, 1000)
    """
    if text in BUDGETS:
        return BUDGETS[str(text)]
    written = str(text).replace("_", "").replace(",", "")
    scale = {"k": 1_000, "M": 1_000_000}.get(written[-1:], 1)
    try:
        tokens = int(float(written.rstrip("kM")) * scale)
    except (ValueError, OverflowError):
        tokens = 0
    if tokens < 1:
        raise SettingsError(f"--budget {text} is neither {', '.join(BUDGETS)} nor a positive number of tokens.")
    return tokens


def _of_file(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    import yaml

    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise SettingsError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(loaded, dict):
        raise SettingsError(f"--config {path} holds a {type(loaded).__name__}; it takes `setting: value` lines.")
    found = {str(key).replace("-", "_"): value for key, value in loaded.items()}
    strangers = sorted(set(found) - set(RunConfig.__dataclass_fields__))
    if strangers:
        raise SettingsError(
            f"--config {path} has {', '.join(strangers)}; it takes {', '.join(RunConfig.__dataclass_fields__)}."
        )
    return found


def _listed(value: Any) -> list[str]:
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    return [str(part).strip() for part in parts if str(part).strip()]


def chosen(value: Any, known: Sequence[str], what: str) -> tuple[str, ...]:
    """Names and patterns -> names, in the order in which they were given, each once."""
    found: list[str] = []
    for part in _listed(value):
        matched = [name for name in known if fnmatchcase(name, part)]
        # Any task can be decomposed, whether or not it is listed so.
        if not matched and what == "task" and part.startswith("two-step:") and part[len("two-step:") :] in known:
            matched = [part]
        if not matched:
            raise SettingsError(f"There is no {what} {part!r}. `python -m benchmarks ls` lists them.")
        found += matched
    return tuple(dict.fromkeys(found))


def _seeds(value: Any) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in _listed(value)))
    except ValueError as error:
        raise SettingsError(f"--seeds {value}: give whole numbers with commas between.") from error


def arguments(value: Any, name: str = "model_args") -> dict[str, Any]:
    """`key=value,key=value` -> a mapping; values are read as JSON where they can be."""
    if isinstance(value, Mapping):
        return dict(value)
    found: dict[str, Any] = {}
    for part in _listed(value):
        key, equals, text = part.partition("=")
        if not equals:
            raise SettingsError(f"--{name.replace('_', '-')} {part!r} is not key=value.")
        try:
            found[key.strip()] = json.loads(text)
        except ValueError:
            found[key.strip()] = text.strip()
    return found
