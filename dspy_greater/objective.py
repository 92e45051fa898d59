"""The task loss of one predictor's instruction: reasoning of its own for every row, then exact losses.

`evaluate` is what the search minimises; `supervised` and `proposal_contexts` are the two
views on its rows that the gradient and the proposals are taken from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .engine import Engine
from .layout import Layout, Supervised
from .loss import Losses, teacher_forced_losses
from .metric import RowMetric
from .program import PredictorSite
from .rollout import Rollout, plain, roll_out, searching_copy
from .run.events import Evaluation, RowOutcome
from .select import evaluation
from .settings import Settings


@dataclass(frozen=True)
class Instruction:
    """An instruction as text and as the token ids that it is deployed with."""

    token_ids: tuple[int, ...]
    text: str


class Objective:
    """Evaluates instructions of one predictor; the same instruction is never evaluated twice.

    Args:
        program: the program, with the other predictors' instructions as they are now.
        site: the predictor that is optimised.
        field: its output field with gold values.
        rows: the training rows; each has a gold value for `field`.
        metric: the user's metric on the whole program's prediction.
        engine: the predictor's weights.
        settings: the search's knobs.
    """

    def __init__(
        self,
        *,
        program: Any,
        site: PredictorSite,
        field: str,
        rows: Sequence[Any],
        metric: RowMetric,
        engine: Engine,
        settings: Settings,
        extractor: str | None = None,
    ) -> None:
        self.engine = engine
        self.layout = Layout(engine.tokenizer, site.adapter, site.signature, demos=site.demos, extractor=extractor)
        self._program, self._site, self._field = program, site, field
        self._rows, self._metric, self._settings = tuple(rows), metric, settings
        self._known: dict[str, Evaluation] = {}

    def seed(self) -> Instruction:
        """The instruction that the predictor has now."""
        text = self._site.instruction
        return Instruction(self.layout.instruction_ids(text), text)

    def evaluate(self, instructions: Sequence[Instruction]) -> list[Evaluation]:
        """Let every instruction reason on all rows, score it with the metric and take the exact losses.

        All new instructions and rows are generated in one go.

        Raises:
            MetricError: the metric returned something that is not a score.
        """
        new = {each.text: each for each in instructions if each.text not in self._known}
        if new:
            programs = [searching_copy(self._program, {self._site.name: text}) for text in new]
            rollouts = roll_out(programs, self._rows, self._metric, threads=self._settings.threads)
            drafts = [[self._outcome(index, each) for index, each in enumerate(group)] for group in rollouts]
            self._score(list(new.values()), drafts)
        return [self._known[each.text] for each in instructions]

    def recall(self, evaluations: Sequence[Evaluation]) -> None:
        """Take over evaluations of an interrupted run, so that they are not made again."""
        self._known.update({each.instruction: each for each in evaluations})

    def supervised(self, evaluated: Evaluation) -> list[Supervised]:
        """x ⊙ p ⊙ r ⊙ p_extract ⊙ y of every row on which the predictor was called."""
        return [self._supervise(evaluated.instruction, row) for row in evaluated.rows if row.inputs]

    def proposal_contexts(self, evaluated: Evaluation, position: int) -> list[tuple[int, ...]]:
        """x_j ⊙ p_<i of every row on which the predictor was called, in the paper's layout."""
        before = evaluated.token_ids[:position]
        return [(*self.layout.proposal_prefix(row.inputs), *before) for row in evaluated.rows if row.inputs]

    def _score(self, instructions: Sequence[Instruction], drafts: Sequence[Sequence[RowOutcome]]) -> None:
        """Exact losses for all rows of all instructions in one pass; remember the evaluations."""
        called = [[row for row in rows if row.inputs] for rows in drafts]
        flat = [
            self._supervise(each.text, row) for each, rows in zip(instructions, called, strict=True) for row in rows
        ]
        losses = (
            teacher_forced_losses(
                self.engine,
                flat,
                answer_temperature=self._settings.answer_temperature,
                max_batch_tokens=self._settings.max_batch_tokens,
            )
            if flat
            else Losses((), ())
        )
        taken = iter(zip(losses.cross_entropy, losses.fluency_nll, strict=True))
        for instruction, rows in zip(instructions, drafts, strict=True):
            pairs = [next(taken) if row.inputs else (math.nan, math.nan) for row in rows]
            fluency = [nll for _, nll in pairs if math.isfinite(nll)]
            self._known[instruction.text] = evaluation(
                instruction.token_ids,
                instruction.text,
                [_with_loss(row, loss) for row, (loss, _) in zip(rows, pairs, strict=True)],
                sum(fluency) / len(fluency) if fluency else math.nan,
                score_fluency_weight=self._settings.score_fluency_weight,
            )

    def _supervise(self, instruction: str, row: RowOutcome) -> Supervised:
        gold = self._rows[row.row].labels()[self._field]
        return self.layout.supervised(instruction, row.inputs, row.written, self._field, gold)

    def _outcome(self, index: int, rollout: Rollout) -> RowOutcome:
        call = rollout.calls.get(self._site.name)
        if call is None:
            why = rollout.error or f"predictor `{self._site.name}` was not called"
            return RowOutcome(index, rollout.score, {}, {}, math.nan, why)
        names = self._site.output_fields
        earlier = names[: names.index(self._field)]
        written = {name: plain(call.outputs.get(name, "")) for name in earlier}
        if call.error is not None and earlier and not any(written.values()):
            written[earlier[0]] = call.completion or ""  # what did not parse is still what the model reasoned
        inputs = {name: plain(value) for name, value in call.inputs.items()}
        return RowOutcome(index, rollout.score, inputs, written, math.nan, rollout.error)


def _with_loss(row: RowOutcome, cross_entropy: float) -> RowOutcome:
    return RowOutcome(row.row, row.score, row.inputs, row.written, cross_entropy, row.error)
