"""What an optimizer of the comparison is, what it is given, and the list of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import dspy

from dspy_greater.errors import SettingsError

if TYPE_CHECKING:
    from benchmarks.harness.budget import Budget

Metric = Callable[..., float]


@dataclass(frozen=True)
class DescribeTask:
    """A task in words, for optimizers whose published prompts ask for a description.

    Attributes:
        name: as on the command line, such as `bbh:navigate`.
        about: one line.
        seed_instruction: where every optimizer starts.
    """

    name: str
    about: str
    seed_instruction: str


@dataclass(frozen=True)
class Context:
    """What the harness gives to an optimizer beside the program and its rows; the same for all of them.

    Attributes:
        metric: metric(example, prediction, trace=None) -> 0.0 or 1.0.
        task_lm: the model that the program runs on; `dspy.settings.lm` already, metered, uncached. Its calls raise
            `BudgetSpent` once the budget is spent. `task_lm_name` reaches the same weights through LiteLLM.
        prompt_lm: the model that writes proposals and critiques; its tokens are counted, and not charged.
        seed: of every random choice.
        log_dir: an empty directory of this cell's own, for the optimizer's journals.
        budget: what is charged and what is left; `budget.record(program, score, rows)` reports a candidate that the
            optimizer scored in another way than `dspy.Evaluate` (whose results the harness sees by itself).
        requests: the task in words.
        task_lm_name: `litellm.completion(model=task_lm_name)` runs on the task model, metered as well.
        prompt_lm_name: `litellm.completion(model=prompt_lm_name)` runs on the proposer.
    """

    metric: Metric
    task_lm: dspy.LM
    prompt_lm: dspy.LM
    seed: int
    log_dir: Path
    budget: Budget
    requests: DescribeTask
    task_lm_name: str = ""
    prompt_lm_name: str = ""


class Optimizer(Protocol):
    """One row of the comparison.

    Attributes:
        name: as on the command line.
        about: one line: what it follows, and where it departs from it.
    """

    name: str
    about: str

    def optimise(
        self, student: dspy.Module, train: Sequence[dspy.Example], dev: Sequence[dspy.Example], context: Context
    ) -> dspy.Module:
        """A better program. The student is a fresh copy that may be changed.

        `BudgetSpent` is let through: the harness then judges the best candidate that was recorded. An optimizer that
        can hold what it found catches it, and returns that.
        """
        ...


# name -> "module:factory"; the factory takes no argument. A module is imported when its optimizer is first made, so
# that a library that is not installed costs only its own row.
OPTIMIZERS: dict[str, str] = {
    "seed": "benchmarks.optimizers.seed:Seed",
    "greater": "benchmarks.optimizers.greater:Greater",
    "greater-paper": "benchmarks.optimizers.greater:GreaterPaper",
    "greater-no-reasoning": "benchmarks.optimizers.greater:GreaterNoReasoning",
    "random-search": "benchmarks.optimizers.greater:RandomSearch",
    "gradsum": "benchmarks.optimizers.gradsum:GradSum",
    "miprov2-0shot": "benchmarks.optimizers.miprov2:MiproZeroShot",
    "miprov2": "benchmarks.optimizers.miprov2:Mipro",
    "gepa": "benchmarks.optimizers.gepa:Gepa",
    "copro": "benchmarks.optimizers.copro:Copro",
    "simba": "benchmarks.optimizers.simba:Simba",
    "textgrad": "benchmarks.optimizers.textgrad:TextGrad",
    "apo": "benchmarks.optimizers.apo:Apo",
    "ape": "benchmarks.optimizers.ape:Ape",
    "pe2": "benchmarks.optimizers.pe2:PE2",
    "opro": "benchmarks.optimizers.opro:Opro",
    "evoprompt": "benchmarks.optimizers.evoprompt:EvoPrompt",
}


def names() -> tuple[str, ...]:
    """Every optimizer of the comparison, as on the command line.

    Example:
        >>> "seed" in names()
        True
    """
    return tuple(OPTIMIZERS)


def make(name: str) -> Optimizer:
    """The optimizer of that name.

    Raises:
        SettingsError: there is none of that name, or a library that it runs on is not installed.

    Example:
        >>> make("seed").name
        'seed'
    """
    if name not in OPTIMIZERS:
        raise SettingsError(f"There is no optimizer {name!r}; there are {', '.join(OPTIMIZERS)}.")
    module, _, factory = OPTIMIZERS[name].partition(":")
    try:
        return getattr(import_module(module), factory)()
    except ImportError as error:
        raise SettingsError(
            f"The optimizer {name!r} cannot be loaded: {error}. What it runs on comes with "
            "`pip install 'dspy_greater[bench]'`."
        ) from error


def needs_weights(name: str) -> bool:
    """Whether the optimizer reads likelihoods or gradients; the others only ask, from any process.

    Such a class says `needs_weights = True`.

    Example:
        >>> needs_weights("seed")
        False
    """
    return getattr(make(name), "needs_weights", False)
