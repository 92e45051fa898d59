"""The tasks by name."""

from __future__ import annotations

from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from benchmarks.tasks import bbh, folio, gsm8k, pocket, two_step
from benchmarks.tasks.task import Task
from dspy_greater.errors import SettingsError

TWO_STEP = "two-step:"


def names() -> tuple[str, ...]:
    """Every task by name; `two-step:NAME` makes a two-predictor program of any other one as well.

    Example:
        >>> {"bbh:navigate", "gsm8k", "folio", "pocket:navigate", "two-step:gsm8k"} <= set(names())
        True
    """
    return tuple(about_all())


def about_all() -> dict[str, str]:
    """name -> one line, for all tasks."""
    plain = {**bbh.ABOUT, **gsm8k.ABOUT, **folio.ABOUT, **pocket.ABOUT}
    twice = [name for name in plain if name.startswith("pocket:") or name == "gsm8k"]
    return {**plain, **{TWO_STEP + name: f"{plain[name]}; decomposed first, then answered" for name in twice}}


def load(name: str, *, data_dir: Path | None, seed: int, limit: int | None = None) -> Task:
    """A task with its rows.

    Args:
        name: one of `names()`.
        data_dir: a directory with `bbh/NAME.json`, `gsm8k/{train,test}.jsonl` and `folio/{train,validation}.jsonl`;
            the Hugging Face hub when there is none.
        seed: decides which rows are in which split.
        limit: the most rows of each split.

    Raises:
        SettingsError: there is no such task, or the limit is below one.
        DataError: the rows are not there, or the hub cannot be reached.

    Example:
        >>> import dspy
        >>> task = load("pocket:navigate", data_dir=None, seed=0, limit=3)
        >>> len(task.train), task.metric(task.train[0], dspy.Prediction(answer=task.train[0].answer))
        (3, 1.0)
    """
    if limit is not None and limit < 1:
        raise SettingsError(f"limit={limit} leaves no rows; give at least 1.")
    plain = name.removeprefix(TWO_STEP)
    for module in (bbh, gsm8k, folio, pocket):
        if plain in module.ABOUT:
            task = module.load(plain, data_dir, seed)
            break
    else:
        close = get_close_matches(name, names(), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise SettingsError(f"There is no task {name!r}.{hint} `python -m benchmarks ls` lists them.")
    if name != plain:
        task = two_step.of(task, name)
    return replace(task, train=task.train[:limit], dev=task.dev[:limit], test=task.test[:limit])
