"""Tasks of the comparison: a DSPy program, a metric and three splits, by name."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

import dspy
from dspy.signatures import make_signature

from dspy_greater.errors import DataError, SettingsError

SEED_INSTRUCTION = "Answer the question."
TWO_STEP = "two-step:"

Item = TypeVar("Item")
Rows = tuple[dspy.Example, ...]


@dataclass(frozen=True)
class Task:
    """One task, ready to be optimised.

    Attributes:
        name: as on the command line.
        about: one line.
        make_program: a fresh program whose predictors hold the seed instruction.
        metric: metric(example, prediction, trace=None) -> 0.0 or 1.0.
        train: rows to search on.
        dev: rows to choose on.
        test: rows that are looked at once, at the end.
        seed_instruction: where every optimizer starts.
        source: where the rows came from.
    """

    name: str
    about: str
    make_program: Callable[[], dspy.Module]
    metric: Callable[..., float]
    train: Rows
    dev: Rows
    test: Rows
    seed_instruction: str
    source: str


def names() -> tuple[str, ...]:
    """Every task by name; `two-step:NAME` makes a two-predictor program of any other one as well.

    Example:
        >>> {"bbh:navigate", "gsm8k", "folio", "pocket:navigate", "two-step:gsm8k"} <= set(names())
        True
    """
    return tuple(about_all())


def about_all() -> dict[str, str]:
    """name -> one line, for all tasks."""
    from benchmarks.tasks import bbh, folio, gsm8k, pocket

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
        >>> task = load("pocket:navigate", data_dir=None, seed=0, limit=3)
        >>> len(task.train), task.metric(task.train[0], dspy.Prediction(answer=task.train[0].answer))
        (3, 1.0)
    """
    from benchmarks.tasks import bbh, folio, gsm8k, pocket, two_step

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


def question_program() -> dspy.Module:
    """`dspy.ChainOfThought("question -> answer")` with the seed instruction."""
    return dspy.ChainOfThought(make_signature("question -> answer", SEED_INSTRUCTION))


def row(question: str, answer: str) -> dspy.Example:
    """One row; its input is the question."""
    return dspy.Example(question=question, answer=answer).with_inputs("question")


def shuffled(rows: Sequence[Item], name: str, seed: int) -> list[Item]:
    """Rows, or whatever they are grouped by, in an order that follows from the task's name and the seed."""
    mixed = list(rows)
    random.Random(f"splits/{name}/{seed}").shuffle(mixed)
    return mixed


def from_hub(dataset: str, config: str | None, split: str) -> list[dict[str, object]]:
    """The rows of a data set on the Hugging Face hub.

    Raises:
        DataError: it cannot be read; says how to do without the hub.
    """
    from datasets import load_dataset

    try:
        return [dict(each) for each in load_dataset(dataset, config, split=split)]
    except Exception as error:  # no network, no such set, gated: the hub's client has no common root for these
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(
            f"{dataset} could not be read from the Hugging Face hub ({reason}). Without a network, give a directory "
            "with the files: --data-dir DIR, with DIR/bbh/NAME.json, DIR/gsm8k/{train,test}.jsonl and "
            "DIR/folio/{train,validation}.jsonl."
        ) from error


def read_lines(path: Path) -> str:
    """The text of a data file.

    Raises:
        DataError: there is no such file.
    """
    if not path.is_file():
        raise DataError(f"There is no {path}. --data-dir names the directory that holds bbh/, gsm8k/ and folio/.")
    return path.read_text(encoding="utf-8")
