"""`python -m benchmarks transfer`: instructions that were found on one model, evaluated on another.

    python -m benchmarks transfer --cells runs/x/cells.jsonl --model OTHER

appends to runs/x/transfer.jsonl, from which `python -m benchmarks report` makes a table; what is there already is not
evaluated again. The test rows are those on which the instructions were tested, so give the same --data-dir.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

# A hub that cannot be reached should not hold up a run; read when these libraries are imported.
os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "3")
os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "10")
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import dspy

from benchmarks.harness import config
from benchmarks.harness.bench import seeded
from benchmarks.harness.candidates import Candidate
from benchmarks.harness.cells import Accuracy, Cell, CellKey, read
from benchmarks.harness.judging import accuracy
from benchmarks.harness.models import TaskModel, task_model
from benchmarks.report.tables import percent
from benchmarks.report.transfer import TRANSFER_FILE, Transferred, append_transfer, read_transfer
from benchmarks.tasks.registry import load
from dspy_greater.errors import DataError, GreaterError


def main(argv: Sequence[str]) -> int:
    """Evaluate what is not evaluated yet: 0, or 2 for settings that cannot work."""
    options = _parser().parse_args(argv)

    def say(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    try:
        transfer(options, say)
    except GreaterError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def transfer(options: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Evaluate the instructions of every finished cell of another model, one line each.

    Raises:
        DataError: there is nothing to transfer, or the rows are not the ones of the cell.
        GreaterError: settings, model or rows cannot be used.
    """
    cells = [cell for cell in {cell.key: cell for cell in read(options.cells)}.values() if cell.test is not None]
    if not cells:
        raise DataError(f"There are no finished cells in {options.cells}; `python -m benchmarks run` makes them.")
    settings = config.from_flags(
        argparse.Namespace(
            config=None,
            tasks=[cell.key.task for cell in cells],
            optimizers="seed",  # none is run here
            model=options.model,
            model_args=options.model_args,
            data_dir=options.data_dir,
            threads=options.threads,
        )
    )
    arguments = settings.keys()[0].model_args
    out = options.out or options.cells.parent / TRANSFER_FILE
    known = {line.key: line for line in read_transfer(out)}
    target = Target(task_model(options.model, settings.model_args), settings.data_dir, settings.threads)
    for cell in cells:
        before = known.get((cell.key, options.model, arguments))
        if (cell.key.model, cell.key.model_args) == (options.model, arguments) or (before and before.is_of(cell)):
            continue
        line = target.evaluate(cell, options.model, arguments)
        append_transfer(out, line)
        say(f"{cell.key.text}: {percent(line.source_accuracy)} on {cell.key.model}, {percent(line.test.accuracy)} here")
    say(str(out))


@dataclass
class Target:
    """The other model; remembers what it has evaluated, since many cells end with the same instructions."""

    model: TaskModel
    data_dir: Path | None
    threads: int
    _known: dict[Any, Accuracy] = field(default_factory=dict)

    def evaluate(self, cell: Cell, name: str, arguments: str) -> Transferred:
        """A cell's instructions, and the seed instruction, on the cell's test rows."""
        seed = self._accuracy(cell, {})
        return Transferred(
            source=cell.key,
            model=name,
            model_args=arguments,
            identity=self.model.identity,
            instructions=dict(cell.instructions),
            test=self._accuracy(cell, dict(cell.instructions)),
            seed_test=seed,
            source_accuracy=cell.test.accuracy if cell.test is not None else 0.0,
            finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )

    def _accuracy(self, cell: Cell, instructions: dict[str, str]) -> Accuracy:
        key: CellKey = cell.key
        known = (key.task, key.seed, key.limit, tuple(instructions.items()))
        if known not in self._known:
            task = load(key.task, data_dir=self.data_dir, seed=key.seed, limit=key.limit)
            if cell.test is not None and len(cell.test.correct) != len(task.test):
                raise DataError(
                    f"{key.text} was tested on {len(cell.test.correct)} rows, and here are {len(task.test)}; give the "
                    "--data-dir that the run had."
                )
            program = task.make_program()
            if instructions:
                program = Candidate.of(instructions).written_to(program)
            adapter = dspy.ChatAdapter(use_json_adapter_fallback=False)
            with dspy.context(lm=self.model.judge, adapter=adapter), seeded(key.seed):
                self._known[known] = accuracy(program, task.test, task.metric, self.threads)
        return self._known[known]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks transfer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=Path, required=True, metavar="FILE", help="cells.jsonl of a run")
    parser.add_argument("--model", required=True, help="the other model, as for `run`")
    parser.add_argument("--model-args", help="key=value with commas between, as for `run`")
    parser.add_argument("--data-dir", type=Path, help="as for the run")
    parser.add_argument("--threads", type=int, help="rows under way at a time (default 32)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="transfer.jsonl beside the cells")
    return parser
