"""GSM8K: 100 rows to search on, 100 to choose on, both out of train; all 1,319 rows of test, as in the paper."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.tasks import answers
from benchmarks.tasks.task import SEED_INSTRUCTION, Task, from_hub, question_program, read_lines, row, shuffled

HUB = "openai/gsm8k"
TRAIN, DEV = 100, 100
ABOUT = {"gsm8k": "GSM8K, grade school arithmetic in words"}


def load(name: str, data_dir: Path | None, seed: int) -> Task:
    """`gsm8k` from `data_dir/gsm8k/{train,test}.jsonl` or the hub; raises `DataError` where neither can be read."""
    train, test = _split(data_dir, "train"), _split(data_dir, "test")
    rows = shuffled(train, name, seed)
    return Task(
        name=name,
        about=ABOUT[name],
        make_program=question_program,
        metric=answers.metric_of(answers.number),
        train=tuple(rows[:TRAIN]),
        dev=tuple(rows[TRAIN : TRAIN + DEV]),
        test=tuple(shuffled(test, name, 0)),  # the same rows for every seed, also under a limit
        seed_instruction=SEED_INSTRUCTION,
        source=f"GSM8K, {'gsm8k/{train,test}.jsonl' if data_dir else HUB + ' on the Hugging Face hub'}",
    )


def _split(data_dir: Path | None, split: str) -> list[Any]:
    if data_dir is None:
        raw = from_hub(HUB, "main", split)
    else:
        raw = [json.loads(line) for line in read_lines(data_dir / "gsm8k" / f"{split}.jsonl").splitlines()]
    return [row(str(each["question"]), final_number(str(each["answer"]))) for each in raw]


def final_number(solution: str) -> str:
    """The answer that a solution of the data set ends in.

    Example:
        >>> final_number("She sold 48/2 = <<48/2=24>>24 clips.\\\\n#### 1,024")
        '1,024'
    """
    return solution.rpartition("####")[2].strip()
