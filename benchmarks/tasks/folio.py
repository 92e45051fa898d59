"""FOLIO: 50 rows to search on and 100 to choose on, out of train; all 204 rows of validation are the test.

A story has several conclusions, and no story is in both train and dev. Its third label is written Unknown in train and
Uncertain in validation; here it is Uncertain, which every question lists among its options.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.tasks import answers
from benchmarks.tasks.task import SEED_INSTRUCTION, Task, from_hub, question_program, read_lines, row, shuffled

HUB = "yale-nlp/FOLIO"
TRAIN, DEV = 50, 100
ABOUT = {"folio": "FOLIO, whether a conclusion follows from premises"}
_LABEL = answers.label(("True", "False", "Uncertain"), {"Unknown": "Uncertain"})


def load(name: str, data_dir: Path | None, seed: int) -> Task:
    """`folio` from `data_dir/folio/{train,validation}.jsonl` or the hub; `DataError` where neither can be read."""
    train, dev = _two_of_train(_split(data_dir, "train"), name, seed)
    return Task(
        name=name,
        about=ABOUT[name],
        make_program=question_program,
        metric=answers.metric_of(_LABEL),
        train=train,
        dev=dev,
        test=tuple(shuffled([_row(each) for each in _split(data_dir, "validation")], name, 0)),
        seed_instruction=SEED_INSTRUCTION,
        source=f"FOLIO, {'folio/{train,validation}.jsonl' if data_dir else HUB + ' on the Hugging Face hub'}",
    )


def _two_of_train(raw: list[dict[str, Any]], name: str, seed: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Rows for train and dev that share no story."""
    stories: dict[str, list[dict[str, Any]]] = {}
    for each in raw:
        stories.setdefault(_premises(each), []).append(each)
    train: list[Any] = []
    dev: list[Any] = []
    for premises in shuffled(list(stories), name, seed):
        split = train if len(train) < TRAIN else dev
        split.extend(_row(each) for each in stories[premises])
    return tuple(shuffled(train[:TRAIN], name, seed)), tuple(shuffled(dev[:DEV], name, seed))


def _split(data_dir: Path | None, split: str) -> list[dict[str, Any]]:
    if data_dir is None:
        return from_hub(HUB, None, split)
    return [json.loads(line) for line in read_lines(data_dir / "folio" / f"{split}.jsonl").splitlines()]


def _premises(raw: dict[str, Any]) -> str:
    given = raw["premises"]  # a list in the files, one text in the hub's set
    return "\n".join(given) if isinstance(given, list) else str(given)


def _row(raw: dict[str, Any]) -> Any:
    question = (
        f"Premises:\n{_premises(raw)}\nConclusion: {raw['conclusion']}\n"
        "Does the conclusion follow from the premises?\nOptions:\n- True\n- False\n- Uncertain"
    )
    return row(question, "Uncertain" if raw["label"] == "Unknown" else str(raw["label"]))
