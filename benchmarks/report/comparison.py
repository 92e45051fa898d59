"""Cells -> comparisons: which optimizers met under the same conditions, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.harness.cells import Accuracy, Cell, wilson
from benchmarks.report.statistics import Spread, average_ranks, holm, mcnemar_exact

SEED_ROW = "(seed instruction)"


@dataclass(frozen=True)
class Setting:
    """What has to be the same for two cells to be compared, apart from the budget."""

    model: str
    model_args: str
    proposer: str
    limit: int | None

    @classmethod
    def of(cls, cell: Cell) -> Setting:
        """The setting of a cell."""
        key = cell.key
        return cls(key.model, key.model_args, key.proposer, key.limit)

    @property
    def text(self) -> str:
        """For captions; names the proposer, which is part of what was measured."""
        parts = [
            f"model {self.model}" + (f" ({self.model_args})" if self.model_args else ""),
            f"proposer {self.proposer}",
        ]
        return ", ".join([*parts, f"at most {self.limit} rows a split"] if self.limit else parts)


@dataclass(frozen=True)
class Result:
    """One optimizer on one task.

    Attributes:
        pooled: right answers over the test rows of all seeds.
        low: lower end of their 95 % interval (Wilson).
        high: upper end.
        seeds: accuracy over seeds; None where no cell was finished.
        failed: cells that ended in an error.
    """

    pooled: float
    low: float
    high: float
    seeds: Spread | None
    failed: int = 0

    @classmethod
    def of(cls, accuracies: Sequence[Accuracy], failed: int = 0) -> Result:
        """From the test accuracies of each seed."""
        rows = [row for each in accuracies for row in each.correct]
        if not rows:
            return cls(0.0, 0.0, 1.0, None, failed)
        share = sum(rows) / len(rows)
        return cls(share, *wilson(share, len(rows)), Spread.of([each.accuracy for each in accuracies]), failed)


@dataclass(frozen=True)
class Paired:
    """The baseline against one peer, on the test rows that both have answered.

    Attributes:
        peer: its name.
        wins: cells in which the baseline's accuracy is higher.
        draws: cells with the same accuracy.
        losses: cells in which the peer's is.
        only_baseline: rows that only the baseline has right.
        only_peer: rows that only the peer has right.
        rows: all shared rows.
        p: McNemar's exact test, two-sided.
        p_holm: the same, corrected for the number of peers.
    """

    peer: str
    wins: int
    draws: int
    losses: int
    only_baseline: int
    only_peer: int
    rows: int
    p: float
    p_holm: float = 1.0

    @property
    def difference(self) -> float:
        """Accuracy of the baseline minus the peer's, over the shared rows."""
        return (self.only_baseline - self.only_peer) / self.rows


@dataclass(frozen=True)
class Comparison:
    """All cells of one setting and one budget."""

    setting: Setting
    budget: int
    cells: tuple[Cell, ...]

    @property
    def text(self) -> str:
        """For captions."""
        return f"{self.setting.text}, budget {self.budget:,} tokens"

    @property
    def tasks(self) -> list[str]:
        """In the order in which they were first finished."""
        return list(dict.fromkeys(cell.key.task for cell in self.cells))

    @property
    def optimizers(self) -> list[str]:
        """In the order in which they were first finished."""
        return list(dict.fromkeys(cell.key.optimizer for cell in self.cells))

    @property
    def seeds(self) -> list[int]:
        """All of them."""
        return sorted({cell.key.seed for cell in self.cells})

    @property
    def failures(self) -> list[Cell]:
        """The cells that ended in an error."""
        return [cell for cell in self.cells if cell.test is None]

    def of(self, optimizer: str, task: str | None = None) -> list[Cell]:
        """An optimizer's cells, on one task or all, by seed."""
        found = [each for each in self.cells if each.key.optimizer == optimizer and task in (None, each.key.task)]
        return sorted(found, key=lambda cell: cell.key.seed)

    def result(self, optimizer: str, task: str | None = None) -> Result | None:
        """What an optimizer reached; None where it was not run. `SEED_ROW` stands for the seed instruction."""
        if optimizer == SEED_ROW:
            return self._seed_result(task)
        cells = self.of(optimizer, task)
        finished = [cell.test for cell in cells if cell.test is not None]
        return Result.of(finished, len(cells) - len(finished)) if cells else None

    def _seed_result(self, task: str | None) -> Result | None:
        found = {
            (cell.key.task, cell.key.seed): cell.seed_test
            for cell in self.cells
            if cell.seed_test is not None and task in (None, cell.key.task)
        }
        return Result.of(list(found.values())) if found else None

    def task_mean(self, optimizer: str, tasks: Sequence[str]) -> float | None:
        """Mean over the tasks of the mean over the seeds; None unless every task has a finished cell."""
        results = [self.result(optimizer, task) for task in tasks]
        means = [result.seeds.mean for result in results if result is not None and result.seeds is not None]
        return sum(means) / len(means) if means and len(means) == len(tasks) else None

    def ranks(self) -> dict[str, Spread]:
        """Optimizer -> its rank over the tasks on which it was run; one whose every cell failed comes last there."""
        collected: dict[str, list[float]] = {name: [] for name in self.optimizers}
        for task in self.tasks:
            results = {name: self.result(name, task) for name in self.optimizers}
            scores = {
                name: result.seeds.mean if result.seeds is not None else -1.0
                for name, result in results.items()
                if result is not None
            }
            for name, rank in average_ranks(scores).items():
                collected[name].append(rank)
        return {name: Spread.of(ranks) for name, ranks in collected.items() if ranks}

    def paired(self, baseline: str, task: str | None = None) -> list[Paired]:
        """The baseline against each peer, on one task or all; peers without a shared cell are left out."""
        own = _by_cell(self.of(baseline, task))
        found = [_pair(name, own, _by_cell(self.of(name, task))) for name in self.optimizers if name != baseline]
        pairs = [pair for pair in found if pair is not None]
        return [
            Paired(**{**vars(pair), "p_holm": adjusted})
            for pair, adjusted in zip(pairs, holm([pair.p for pair in pairs]), strict=True)
        ]


def comparisons(cells: Sequence[Cell]) -> list[Comparison]:
    """Group cells by what they may be compared under; of a cell that was run again the latest counts."""
    latest = {cell.key: cell for cell in cells}
    groups: dict[tuple[Setting, int], list[Cell]] = {}
    for cell in latest.values():
        groups.setdefault((Setting.of(cell), cell.key.budget), []).append(cell)
    return [Comparison(setting, budget, tuple(group)) for (setting, budget), group in groups.items()]


def shared_tasks(group: Sequence[Comparison]) -> list[str]:
    """The tasks on which every optimizer has a finished cell; optimizers without any are left out of the question."""
    kept = list(dict.fromkeys(task for each in group for task in each.tasks))
    for comparison in group:
        for name in comparison.optimizers:
            done = {cell.key.task for cell in comparison.of(name) if cell.test is not None}
            kept = [task for task in kept if task in done] if done else kept
    return kept


def _by_cell(cells: Sequence[Cell]) -> dict[tuple[str, int], Accuracy]:
    return {(cell.key.task, cell.key.seed): cell.test for cell in cells if cell.test is not None}


def _pair(peer: str, own: dict[tuple[str, int], Accuracy], theirs: dict[tuple[str, int], Accuracy]) -> Paired | None:
    shared = [key for key in own if key in theirs and len(own[key].correct) == len(theirs[key].correct)]
    if not shared:
        return None
    rows = [pair for key in shared for pair in zip(own[key].correct, theirs[key].correct, strict=True)]
    only_own, only_theirs = sum(a > b for a, b in rows), sum(a < b for a, b in rows)
    leads = [own[key].accuracy - theirs[key].accuracy for key in shared]
    return Paired(
        peer=peer,
        wins=sum(lead > 0 for lead in leads),
        draws=sum(lead == 0 for lead in leads),
        losses=sum(lead < 0 for lead in leads),
        only_baseline=only_own,
        only_peer=only_theirs,
        rows=len(rows),
        p=mcnemar_exact(only_own, only_theirs),
    )
