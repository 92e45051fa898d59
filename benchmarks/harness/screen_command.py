"""`python -m benchmarks screen`: on which tasks does an instruction matter to this model? Only training rows are read.

    python -m benchmarks screen --tasks 'bbh:*' --model FILE.gguf --model-args max_tokens=300 --limit 24 \\
        --data-dir DIR --out runs/screen

Each task is run with the seed instruction and with a few plain ones that say nothing of the task. A task is worth
optimising where the seed leaves room, and where what the instruction says moves the score. One line a task goes to
OUT/screen.jsonl, and a table to OUT/screen.md; the same command goes on where it was, and another model, split or
instruction is screened anew.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import dspy

from benchmarks.harness import config
from benchmarks.harness.bench import quiet, seeded
from benchmarks.harness.judging import accuracy
from benchmarks.harness.lines import append_line, read_lines
from benchmarks.harness.models import TaskModel, task_model
from benchmarks.tasks.registry import load, names
from benchmarks.tasks.task import Task
from dspy_greater.errors import GreaterError
from dspy_greater.program.copies import with_instructions

FILE, TABLE = "screen.jsonl", "screen.md"
_REFUSED = "Line {line} of {path} is no screening of a task ({error}); remove it and run again."
PLAIN = (
    "Given the fields `question`, produce the fields `answer`.",  # what DSPy writes where nobody wrote an instruction
    "Think step by step, then give only the final answer.",
)


@dataclass(frozen=True)
class Screened:
    """One task on training rows.

    Attributes:
        task: its name.
        rows: how many training rows it was run on.
        seed: of the split.
        accuracies: instruction -> share of rows that are right, the task's seed instruction first.
        unreadable: instruction -> share of rows without an answer that could be read.
        read: tokens of prompts, of all runs together.
        written: tokens generated.
        seconds: of all runs.
        model: as on the command line.
        model_args: how it was loaded and sampled, as `key=value` joined by commas.
        limit: the most rows.
    """

    task: str
    rows: int
    seed: int
    accuracies: Mapping[str, float]
    unreadable: Mapping[str, float]
    read: int
    written: int
    seconds: float
    model: str = ""
    model_args: str = ""
    limit: int = 0

    @property
    def at_first(self) -> float:
        """The seed instruction's accuracy."""
        return next(iter(self.accuracies.values()))

    @property
    def spread(self) -> float:
        """Between the best and the worst of the instructions."""
        return max(self.accuracies.values()) - min(self.accuracies.values())


def main(argv: Sequence[str]) -> int:
    """Screen the tasks: 0 when all were, 2 for settings that cannot work."""
    flags = _parser().parse_args(argv)
    try:
        _screen_all(flags)
    except GreaterError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def screen(task: Task, model: TaskModel, *, seed: int, threads: int, instructions: Sequence[str] = PLAIN) -> Screened:
    """The task's training rows with its seed instruction and with the others."""
    read = model.counters()
    started = time.monotonic()
    accuracies: dict[str, float] = {}
    unreadable: dict[str, float] = {}
    adapter = dspy.ChatAdapter(use_json_adapter_fallback=False)
    student = task.make_program()
    for instruction in (task.seed_instruction, *instructions):
        program = with_instructions(student, {name: instruction for name, _ in student.named_predictors()})
        with dspy.context(lm=model.judge, adapter=adapter, num_threads=threads), seeded(seed):
            found = accuracy(program, task.train, task.metric, threads)
        accuracies[instruction] = found.accuracy
        unreadable[instruction] = found.failed / len(task.train)
    spent = model.counters() - read
    return Screened(
        task=task.name,
        rows=len(task.train),
        seed=seed,
        accuracies=accuracies,
        unreadable=unreadable,
        read=spent.prefilled_tokens,
        written=spent.generated_tokens,
        seconds=round(time.monotonic() - started, 1),
    )


def table(found: Sequence[Screened]) -> str:
    """Markdown, the task on which instructions matter most first."""
    lines = [
        "| task | rows | seed instruction | best one | spread | no answer found | tokens written a row |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in sorted(found, key=lambda each: (-each.spread, each.task)):
        written = f"{each.written / (each.rows * len(each.accuracies)):.0f}" if each.written else "not known"
        lines.append(
            f"| {each.task} | {each.rows} | {each.at_first:.0%} | {max(each.accuracies.values()):.0%} "
            f"| {each.spread:.0%} | {next(iter(each.unreadable.values())):.0%} | {written} |"
        )
    return "\n".join(lines) + "\n"


def _screen_all(flags: argparse.Namespace) -> None:
    chosen = config.chosen(flags.tasks, names(), "task")
    flags.out.mkdir(parents=True, exist_ok=True)
    path = flags.out / FILE
    instructions = tuple(flags.instruction or PLAIN)
    arguments = config.arguments(flags.model_args)
    asked = {
        "model": flags.model,
        "model_args": config.arguments_text(arguments),
        "seed": flags.seed,
        "limit": flags.limit,
    }
    found = {
        each.task: each
        for each in read_lines(path, lambda line: Screened(**line), _REFUSED)
        if tuple(each.accuracies)[1:] == instructions and {name: getattr(each, name) for name in asked} == asked
    }
    model: TaskModel | None = None
    missing = [name for name in chosen if name not in found]  # rows that are not there are found out before any is run
    for task in [load(name, data_dir=flags.data_dir, seed=flags.seed, limit=flags.limit) for name in missing]:
        name, model = task.name, model or task_model(flags.model, arguments)
        with quiet(flags.out):
            new = screen(task, model, seed=flags.seed, threads=flags.threads, instructions=instructions)
        found[name] = each = replace(new, **asked)
        append_line(path, asdict(each))
        sys.stdout.write(f"{name}: {each.at_first:.0%}, spread {each.spread:.0%}, {each.seconds:.0f} s\n")
        sys.stdout.flush()
    (flags.out / TABLE).write_text(table([found[name] for name in chosen]), encoding="utf-8")
    sys.stdout.write((flags.out / TABLE).read_text(encoding="utf-8"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks screen", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", default="bbh:*", help="names with commas between; patterns too (default: bbh:*)")
    parser.add_argument("--model", default="pocket", help="'pocket', a directory, a GGUF file or a hub id")
    parser.add_argument("--model-args", default={}, help="key=value with commas between: dtype, max_tokens, ...")
    parser.add_argument(
        "--instruction", action="append", metavar="TEXT", help="instead of the plain ones; may be repeated"
    )
    parser.add_argument("--limit", type=int, default=24, help="training rows of a task (default 24)")
    parser.add_argument("--seed", type=int, default=0, help="of the split (default 0)")
    parser.add_argument("--threads", type=int, default=32, help="rows under way at a time (default 32)")
    parser.add_argument("--data-dir", type=Path, help="directory with bbh/, gsm8k/ and folio/; the hub without it")
    parser.add_argument("--out", type=Path, default=Path("runs/screen"), help="where the lines and the table go")
    return parser
