"""Comparisons -> tables of text, the same for Markdown and HTML."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.harness.cells import Cell, Contender
from benchmarks.report.comparison import SEED_ROW, Comparison, Result
from benchmarks.report.statistics import Spread

NOT_RUN, FAILED = "not run", "failed"


@dataclass(frozen=True)
class Table:
    """A table of plain text.

    Attributes:
        title: a heading.
        caption: what is in it, under which conditions; names the proposer.
        columns: their headings.
        rows: as wide as the columns.
        strong: (row, column) of entries that stand out.
    """

    title: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: frozenset[tuple[int, int]] = frozenset()


def accuracy_table(comparison: Comparison) -> Table:
    """Task by task: pooled accuracy, its interval, and the spread over seeds; the best of a task stands out."""
    tasks, names = comparison.tasks, _with_seed(comparison)
    columns = [[comparison.result(name, task) for name in names] for task in tasks]
    several = len(tasks) > 1
    means = [comparison.task_mean(name, tasks) for name in names]
    rows = []
    for index, name in enumerate(names):
        mean = means[index]
        last = (percent(mean) if mean is not None else "incomplete",) if several else ()
        rows.append((name, *(result_text(column[index]) for column in columns), *last))
    strong = {
        (row, place + 1) for place, column in enumerate(columns) for row in best_of([_share(each) for each in column])
    }
    if several:
        strong |= {(row, len(tasks) + 1) for row in best_of(means)}
    return Table(
        title="Accuracy on the test split",
        caption=(
            f"{comparison.text}. Percent of the test rows of all seeds ({len(comparison.seeds)}) that are right, "
            "[95 % Wilson interval], and the least..most over the seeds where there are several. Seeds draw their "
            "splits from the same rows, so that the pooled rows are not wholly independent."
        ),
        columns=("optimizer", *tasks, *(("mean of tasks",) if several else ())),
        rows=tuple(rows),
        strong=frozenset(strong),
    )


def paired_table(comparison: Comparison, baseline: str) -> Table | None:
    """The baseline against each peer over all tasks; None where there is nothing to pair."""
    pairs = comparison.paired(baseline)
    if not pairs:
        return None
    return Table(
        title=f"{baseline} against each peer",
        caption=(
            f"{comparison.text}. On the same test rows. A win is a cell (task and seed) in which {baseline} is right "
            "more often; p is McNemar's exact test over the rows that only one of the two has right, and then "
            "corrected after Holm for the number of peers."
        ),
        columns=(
            "peer",
            "wins / draws / losses",
            "rows",
            f"only {baseline} right",
            "only peer right",
            "difference, points",
            "p",
            "p (Holm)",
        ),
        rows=tuple(
            (
                pair.peer,
                f"{pair.wins} / {pair.draws} / {pair.losses}",
                str(pair.rows),
                str(pair.only_baseline),
                str(pair.only_peer),
                points(pair.difference),
                p_value(pair.p),
                p_value(pair.p_holm),
            )
            for pair in pairs
        ),
    )


def task_table(comparison: Comparison, baseline: str) -> Table | None:
    """The baseline's lead over each peer, task by task; a minus is a loss."""
    by_task = {task: {pair.peer: pair for pair in comparison.paired(baseline, task)} for task in comparison.tasks}
    peers = [name for name in comparison.optimizers if any(name in pairs for pairs in by_task.values())]
    if not peers or len(by_task) < 2:
        return None

    def entry(task: str, peer: str) -> str:
        pair = by_task[task].get(peer)
        return f"{points(pair.difference)} (p {p_value(pair.p)})" if pair else "no pair"

    return Table(
        title=f"Lead of {baseline}, task by task",
        caption=f"{comparison.text}. Points of accuracy on shared rows; a minus is a loss. p as above, not corrected.",
        columns=("peer", *by_task),
        rows=tuple((peer, *(entry(task, peer) for task in by_task)) for peer in peers),
    )


def rank_table(comparison: Comparison) -> Table:
    """Mean rank over the tasks, the best first."""
    ranks = sorted(comparison.ranks().items(), key=lambda item: (item[1].mean, item[0]))
    return Table(
        title="Mean rank over tasks",
        caption=(
            f"{comparison.text}. 1 is the best; equal accuracies share a rank, and an optimizer whose every cell of a "
            "task failed comes last there. Ranks over different tasks are not comparable."
        ),
        columns=("optimizer", "mean rank", "best..worst", "tasks"),
        rows=tuple(
            (name, f"{rank.mean:.2f}", f"{rank.least:g}..{rank.most:g}", str(rank.count)) for name, rank in ranks
        ),
    )


def cost_table(comparison: Comparison) -> Table:
    """What the optimizers used, the mean over their finished cells."""
    rows = []
    for name in comparison.optimizers:
        cells = [cell for cell in comparison.of(name) if cell.test is not None]
        if not cells:
            rows.append((name, *[FAILED] * 8))
            continue
        stopped = sum(cell.stopped is not None for cell in cells)
        rows.append(
            (
                name,
                _mean(cell.tokens.get("charged", 0) for cell in cells),
                _mean(cell.tokens.get("backward", 0) for cell in cells),
                _mean(
                    sum(map(cell.proposer_tokens.get, ("prompt_tokens", "completion_tokens"), (0, 0))) for cell in cells
                ),
                _mean(cell.seconds for cell in cells),
                f"{peak / 2**20:,.0f}" if (peak := max(cell.peak_memory_bytes for cell in cells)) else "not known",
                _mean(cell.scored_candidates for cell in cells),
                f"{stopped} of {len(cells)}",
                f"{sum(cell.chosen == 'seed' for cell in cells)} of {len(cells)}",
            )
        )
    crowded = {cell.key.optimizer: cell.together for cell in comparison.cells if cell.together > 1}
    shared = ""
    if crowded:
        shared = (
            f" Up to {max(crowded.values())} cells of {', '.join(crowded)} ran at a time; their seconds are of that."
        )
    return Table(
        title="Cost",
        caption=(
            f"{comparison.text}. Mean over finished cells. Charged tokens are generated + prefilled + 2 x backward of "
            f"the task model while the optimizer ran; the proposer's tokens are {_charged(comparison)}.{shared}"
        ),
        columns=(
            "optimizer",
            "charged tokens",
            "of them backward, single",
            "proposer tokens",
            "seconds",
            "peak MiB",
            "candidates scored",
            "stopped by the budget",
            "seed instruction kept",
        ),
        rows=tuple(rows),
    )


def _charged(comparison: Comparison) -> str:
    """A proposer that is the task model is charged with it."""
    itself = all(cell.key.proposes_for_itself for cell in comparison.cells)
    return "charged, too, since it is the same model; judging is not" if itself else "not charged, nor is judging"


def instruction_tables(comparison: Comparison) -> list[Table]:
    """What was found, side by side, one table a task."""
    return [_instructions(comparison, task) for task in comparison.tasks]


def _instructions(comparison: Comparison, task: str) -> Table:
    rows = []
    for name in comparison.optimizers:
        for cell in comparison.of(name, task):
            if cell.test is None:
                rows.append((name, str(cell.key.seed), FAILED, "", ""))
                continue
            winner = _winner(cell)
            rows.append(
                (
                    name,
                    str(cell.key.seed),
                    _instruction_text(cell),
                    percent(winner.dev_accuracy) if winner else "",
                    percent(cell.test.accuracy),
                )
            )
    return Table(
        title=f"Instructions found for {task}",
        caption=f"{comparison.text}.",
        columns=("optimizer", "seed", "instruction", "dev", "test"),
        rows=tuple(rows),
    )


def _winner(cell: Cell) -> Contender | None:
    """The contender that was chosen: the first of the best. Others may have its text with other demonstrations."""
    return max(cell.contenders, key=lambda each: each.dev_accuracy, default=None)


def _instruction_text(cell: Cell) -> str:
    texts = dict(cell.instructions)
    if len(texts) == 1:
        found = next(iter(texts.values()))
    else:
        found = "\n".join(f"{name}: {text}" for name, text in texts.items())
    winner = _winner(cell)
    demos = sum(winner.demos.values()) if winner else 0
    notes = ["the seed instruction"] if cell.chosen == "seed" else []
    notes += [f"with {demos} demonstrations"] if demos else []
    return f"{found} ({', '.join(notes)})" if notes else found


def failure_table(groups: Sequence[Comparison]) -> Table | None:
    """Every cell that ended in an error."""
    failed = [(group, cell) for group in groups for cell in group.failures]
    if not failed:
        return None
    return Table(
        title="Failures",
        caption="Cells that ended in an error. They are in no mean; a task whose every cell failed is ranked last.",
        columns=("task", "optimizer", "seed", "model and proposer", "error"),
        rows=tuple(
            (cell.key.task, cell.key.optimizer, str(cell.key.seed), group.text, cell.error or "no error was written")
            for group, cell in failed
        ),
    )


def environment_table(cells: Sequence[Cell]) -> Table:
    """Weights, rows, versions and machine, as the cells have them; several values where they differ."""
    found: dict[str, dict[str, None]] = {}

    def note(name: str, value: object) -> None:
        text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        if text not in ("", "null"):
            found.setdefault(name, {})[text] = None

    for cell in cells:
        note("task model", cell.model_identity or cell.key.model)
        note("proposer", cell.key.proposer)
        note("seeds", str(cell.key.seed))
        note(f"rows of {cell.key.task}", _rows_text(cell.rows))
        for name, value in cell.versions.items():
            note(name, value)
    finished = sorted(cell.finished for cell in cells if cell.finished)
    if finished:
        note("finished", finished[0] if finished[0] == finished[-1] else f"{finished[0]} to {finished[-1]}")
    return Table(
        title="Environment",
        caption="As written into the cells when they were finished.",
        columns=("what", "value"),
        rows=tuple(
            (name, ", ".join(values) if name == "seeds" else "\n".join(values)) for name, values in found.items()
        ),
    )


def _rows_text(rows: Mapping[str, object]) -> str:
    counts = " / ".join(str(rows[name]) for name in ("train", "dev", "test") if name in rows)
    return "; ".join(part for part in (counts, str(rows.get("source", ""))) if part)


def _with_seed(comparison: Comparison) -> list[str]:
    names = comparison.optimizers
    return names if "seed" in names else [SEED_ROW, *names]


def result_text(result: Result | None) -> str:
    """A result as an entry of a table."""
    if result is None:
        return NOT_RUN
    if result.seeds is None:
        return FAILED
    text = f"{percent(result.pooled)} [{percent(result.low)}, {percent(result.high)}]"
    if result.seeds.count > 1:
        text += f" {percent(result.seeds.least)}..{percent(result.seeds.most)}"
    return f"{text}, {result.failed} failed" if result.failed else text


def _share(result: Result | None) -> float | None:
    return result.pooled if result is not None and result.seeds is not None else None


def best_of(values: Sequence[float | None]) -> list[int]:
    """Where the highest of the values stand."""
    known = [value for value in values if value is not None]
    return [index for index, value in enumerate(values) if value is not None and value == max(known)]


def _mean(values: Iterable[float]) -> str:
    return f"{Spread.of(list(values)).mean:,.0f}"


def percent(share: float) -> str:
    """A share in percent.

    Example:
        >>> percent(0.125), percent(1.0)
        ('12.5', '100.0')
    """
    return f"{100 * share:.1f}"


def points(difference: float) -> str:
    """A difference of two shares in points, with its sign.

    Example:
        >>> points(0.05), points(-0.05), points(0.0)
        ('+5.0', '-5.0', '0.0')
    """
    return f"{100 * difference:+.1f}" if round(difference, 4) else "0.0"


def p_value(p: float) -> str:
    """A p-value with as many digits as anyone reads."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
