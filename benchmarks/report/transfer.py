"""Instructions that were found on one model, evaluated on another: `transfer.jsonl` and its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.harness.cells import Accuracy, Cell, CellKey
from benchmarks.harness.lines import append_line, read_lines
from benchmarks.report.comparison import SEED_ROW, Result
from benchmarks.report.tables import Table, best_of, percent, result_text
from dspy_greater.errors import RunDirectoryError

TRANSFER_FILE = "transfer.jsonl"


@dataclass(frozen=True)
class Transferred:
    """One line of `transfer.jsonl`.

    Attributes:
        source: the cell in which the instructions were found.
        model: the model they were evaluated on, as on the command line.
        model_args: how it was loaded and sampled.
        identity: which weights, exactly.
        instructions: predictor -> text. Demonstrations, which some optimizers add, are not carried over.
        test: on the test rows of the source cell.
        seed_test: the seed instruction on the same rows and model.
        source_accuracy: of the source cell's program on its own model.
        finished: when, in UTC.
    """

    source: CellKey
    model: str
    model_args: str
    identity: str
    instructions: Mapping[str, str]
    test: Accuracy
    seed_test: Accuracy
    source_accuracy: float
    finished: str = ""

    @property
    def key(self) -> tuple[CellKey, str, str]:
        """What makes this line this one and no other."""
        return self.source, self.model, self.model_args

    def is_of(self, cell: Cell) -> bool:
        """Whether these are the instructions that the cell ended with."""
        return self.source == cell.key and dict(self.instructions) == dict(cell.instructions)

    @classmethod
    def from_json(cls, line: Mapping[str, object]) -> Transferred:
        """The line of a file; raises `KeyError` or `TypeError` where it is none."""
        fields: dict = dict(line)
        fields["source"] = CellKey(**fields["source"])
        for name in ("test", "seed_test"):
            fields[name] = Accuracy(**{**fields[name], "correct": tuple(fields[name]["correct"])})
        return cls(**fields)


def append_transfer(path: Path, line: Transferred) -> None:
    """Write one line at once.

    Raises:
        RunDirectoryError: it cannot be written.
    """
    try:
        append_line(path, asdict(line))
    except OSError as error:
        raise RunDirectoryError(f"{path} cannot be written ({error.strerror}).") from error


def read_transfer(path: Path) -> list[Transferred]:
    """The latest line of each; nothing where there is no file. A torn last line is left out.

    Raises:
        RunDirectoryError: a line is damaged; says which.
    """
    refused = (
        "Line {line} of {path} is no result of a transfer ({error}); remove it and run "
        "`python -m benchmarks transfer` again."
    )
    return list({line.key: line for line in read_lines(path, Transferred.from_json, refused)}.values())


def transfer_tables(lines: Sequence[Transferred]) -> list[Table]:
    """One table for each way from a model to another, at one budget and with one proposer."""
    groups: dict[tuple[str, str, str], list[Transferred]] = {}
    for line in lines:
        source = line.source
        conditions = f"found with proposer {source.proposer} on a budget of {source.budget:,} tokens"
        if source.limit:
            conditions += f", at most {source.limit} rows a split"
        models = _named(source.model, source.model_args), _named(line.model, line.model_args)
        groups.setdefault((*models, conditions), []).append(line)
    return [_table(*names, group) for names, group in groups.items()]


def _named(model: str, arguments: str) -> str:
    return f"{model} ({arguments})" if arguments else model


def _table(source: str, target: str, conditions: str, lines: Sequence[Transferred]) -> Table:
    tasks = list(dict.fromkeys(line.source.task for line in lines))
    names = list(dict.fromkeys(line.source.optimizer for line in lines))
    results = {(name, task): _result(lines, name, task) for name in (SEED_ROW, *names) for task in tasks}
    shown = {pair: (result_text(result), None if result is None else result.pooled) for pair, result in results.items()}
    rows = [(SEED_ROW, *(shown[SEED_ROW, task][0] for task in tasks))]
    for name in names:
        rows.append((name, *(shown[name, task][0] + _before(lines, name, task) for task in tasks)))
    strong = {
        (row, column)
        for column, task in enumerate(tasks, start=1)
        for row in best_of([shown[name, task][1] for name in (SEED_ROW, *names)])
    }
    return Table(
        title=f"Transfer from {source} to {target}",
        caption=(
            f"Instructions {conditions}, evaluated on {target} with the same test rows: percent right, [95 % Wilson "
            "interval], least..most over seeds, and what they reached where they were found. Instructions alone: "
            "demonstrations are not carried over."
        ),
        columns=("optimizer", *tasks),
        rows=tuple(rows),
        strong=frozenset(strong),
    )


def _result(lines: Sequence[Transferred], name: str, task: str) -> Result | None:
    if name == SEED_ROW:
        found = list({line.source.seed: line.seed_test for line in lines if line.source.task == task}.values())
    else:
        found = [line.test for line in lines if (line.source.task, line.source.optimizer) == (task, name)]
    return Result.of(found) if found else None


def _before(lines: Sequence[Transferred], name: str, task: str) -> str:
    before = [line.source_accuracy for line in lines if (line.source.task, line.source.optimizer) == (task, name)]
    return f" (was {percent(sum(before) / len(before))})" if before else ""
