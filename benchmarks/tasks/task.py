"""A task of the comparison: a DSPy program, a metric and three splits; and what its makers have in common."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import dspy
from dspy.signatures import make_signature

from dspy_greater.errors import DataError

SEED_INSTRUCTION = "Answer the question."

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
