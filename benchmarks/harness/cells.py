"""`cells.jsonl`: one line for each finished cell of a comparison, on disk before its end is told."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness.lines import append_line, read_lines
from dspy_greater.errors import RunDirectoryError

FILE = "cells.jsonl"
SELF = "self"  # the proposer that is the task model


@dataclass(frozen=True)
class CellKey:
    """What makes a cell this cell and no other; a finished one is not run again.

    Attributes:
        task: as on the command line.
        optimizer: as on the command line.
        seed: of the splits and of the optimizer.
        model: the task model's name as on the command line.
        model_args: how it was loaded and sampled, as `key=value` joined by commas.
        proposer: the model that wrote proposals.
        budget: charged tokens.
        limit: the most rows of each split; None for all.
    """

    task: str
    optimizer: str
    seed: int
    model: str
    model_args: str
    proposer: str
    budget: int
    limit: int | None

    @property
    def proposes_for_itself(self) -> bool:
        """Whether the task model wrote the proposals, which are charged then."""
        return self.proposer.partition(",")[0] == SELF

    @property
    def text(self) -> str:
        """For people and progress lines."""
        return f"{self.task} · {self.optimizer} · seed {self.seed}"


@dataclass(frozen=True)
class Accuracy:
    """How many rows a program got right, and which.

    Attributes:
        accuracy: share of right answers, 0 to 1.
        low: lower end of its 95 % interval (Wilson).
        high: upper end.
        correct: 1 or 0 for each row, in the order of the split, for paired tests.
        failed: rows on which the program raised or wrote nothing that parses; they count as wrong.
    """

    accuracy: float
    low: float
    high: float
    correct: tuple[int, ...]
    failed: int = 0

    @classmethod
    def of(cls, correct: Sequence[int], failed: int = 0) -> Accuracy:
        """From the rows.

        Example:
            >>> some = Accuracy.of([1, 0, 1, 1])
            >>> some.accuracy, round(some.low, 3), round(some.high, 3)
            (0.75, 0.301, 0.954)
        """
        share = sum(correct) / len(correct)
        low, high = wilson(share, len(correct))
        return cls(share, low, high, tuple(correct), failed)


@dataclass(frozen=True)
class Contender:
    """A candidate that was judged on the dev split.

    Attributes:
        origin: `seed`, `returned` by the optimizer, or `recorded` while it ran.
        instructions: predictor -> instruction.
        demos: predictor -> how many demonstrations.
        dev_accuracy: on the dev split, uncharged.
        own_score: the mean score that the optimizer saw for it, if it was recorded.
        own_rows: on how many rows.
    """

    origin: str
    instructions: Mapping[str, str]
    demos: Mapping[str, int]
    dev_accuracy: float
    own_score: float | None = None
    own_rows: int | None = None


@dataclass(frozen=True)
class Cell:
    """One line of `cells.jsonl`.

    Attributes:
        key: which cell.
        test: the chosen program on the test split; None where there is an error.
        seed_test: the seed instruction on the same rows.
        instructions: of the chosen program, predictor -> text.
        chosen: the origin of the chosen program: `seed`, `returned` or `recorded`.
        contenders: all that met on the dev split, the seed first.
        tokens: `charged` = `generated` + `prefilled` + 2 x `backward`, of the optimizer alone.
        proposer_tokens: `calls`, `prompt_tokens`, `completion_tokens`; not charged.
        seconds: what the optimizer took, without judging.
        judging_seconds: dev and test.
        peak_memory_bytes: of the process, or of the accelerator where there is one, while the optimizer ran; 0 where
            cells ran together, since the weights are in another process then.
        stopped: `tokens` or `seconds` where the optimizer was stopped; None where it came to its end.
        scored_candidates: how many different candidates were recorded.
        error: `Type: message` where the cell failed.
        rows: `train`, `dev`, `test` and `source`.
        model_identity: which weights, exactly.
        versions: libraries and machine.
        finished: when, in UTC.
        together: how many cells were under way at a time, at most; `seconds` depends on it.
    """

    key: CellKey
    test: Accuracy | None = None
    seed_test: Accuracy | None = None
    instructions: Mapping[str, str] = field(default_factory=dict)
    chosen: str = ""
    contenders: tuple[Contender, ...] = ()
    tokens: Mapping[str, int] = field(default_factory=dict)
    proposer_tokens: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    judging_seconds: float = 0.0
    peak_memory_bytes: int = 0
    stopped: str | None = None
    scored_candidates: int = 0
    error: str | None = None
    rows: Mapping[str, Any] = field(default_factory=dict)
    model_identity: str = ""
    versions: Mapping[str, Any] = field(default_factory=dict)
    finished: str = ""
    together: int = 1

    def as_json(self) -> dict[str, Any]:
        """The line, with the key's fields beside the others."""
        fields = asdict(self)
        return {**fields.pop("key"), **fields}

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Cell:
        """The cell of a line; raises `KeyError` or `TypeError` where it is none."""
        fields = dict(line)
        key = CellKey(**{name: fields.pop(name) for name in CellKey.__dataclass_fields__})
        for name in ("test", "seed_test"):
            if fields.get(name) is not None:
                fields[name] = Accuracy(**{**fields[name], "correct": tuple(fields[name]["correct"])})
        fields["contenders"] = tuple(Contender(**each) for each in fields.get("contenders", ()))
        return cls(key=key, **fields)


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count` rows."""
    z = 1.959964
    middle = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


class Cells:
    """The finished cells of a run directory.

    Example:
        >>> cells = Cells(Path("runs/x"))  # doctest: +SKIP
        >>> cells.finished(key) is None  # doctest: +SKIP
        True
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / FILE
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunDirectoryError(f"{directory} cannot be made ({error.strerror}); give another --out.") from error
        self._cells = {cell.key: cell for cell in read(self.path)}

    def finished(self, key: CellKey) -> Cell | None:
        """The latest line of this cell, if there is one."""
        return self._cells.get(key)

    def __iter__(self) -> Iterator[Cell]:
        """The latest line of every cell."""
        return iter(self._cells.values())

    def append(self, cell: Cell) -> None:
        """Write one line and wait until it is on disk.

        Raises:
            RunDirectoryError: it cannot be written.
        """
        try:
            append_line(self.path, cell.as_json())
        except OSError as error:
            raise RunDirectoryError(f"{self.path} cannot be written ({error.strerror}); the cell is lost.") from error
        self._cells[cell.key] = cell


def read(path: Path) -> list[Cell]:
    """All cells of a file, oldest first; of a cell that was run again both. A torn last line is left out.

    Raises:
        RunDirectoryError: a line in the middle is damaged; says which.
    """
    return read_lines(path, Cell.from_json, "Line {line} of {path} is not a cell ({error}); remove it and run again.")
