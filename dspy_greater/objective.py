"""The task loss of one predictor's instruction: reasoning of its own for every row, then exact losses.

`evaluate` is what the search minimises; `supervised` and `proposal_contexts` are the two
views on its rows that the gradient and the proposals are taken from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
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

_MOST_CUTS = 8  # attempts to make a row fit the context by shortening its reasoning
_MARK = "\ue000value\ue000"


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
        found = [self._supervise(evaluated.instruction, row) for row in evaluated.rows]
        return [each for each in found if each is not None]

    def proposal_contexts(self, evaluated: Evaluation, position: int) -> list[tuple[int, ...]]:
        """x_j ⊙ p_<i of every row on which the predictor was called, in the paper's layout."""
        before = evaluated.token_ids[:position]
        return [(*self.layout.proposal_prefix(row.inputs), *before) for row in evaluated.rows if row.inputs]

    def _score(self, instructions: Sequence[Instruction], drafts: Sequence[Sequence[RowOutcome]]) -> None:
        """Exact losses for all rows of all instructions in one pass; remember the evaluations."""
        laid_out = [
            [self._supervise(instruction.text, row) for row in rows]
            for instruction, rows in zip(instructions, drafts, strict=True)
        ]
        flat = [each for group in laid_out for each in group if each is not None]
        losses = self._losses(flat)
        taken = iter(zip(losses.cross_entropy, losses.fluency_nll, strict=True))
        for instruction, rows, group in zip(instructions, drafts, laid_out, strict=True):
            pairs = [(math.nan, math.nan) if each is None else next(taken) for each in group]
            fluency = [nll for _, nll in pairs if math.isfinite(nll)]
            self._known[instruction.text] = evaluation(
                instruction.token_ids,
                instruction.text,
                [replace(row, cross_entropy=loss) for row, (loss, _) in zip(rows, pairs, strict=True)],
                sum(fluency) / len(fluency) if fluency else math.nan,
                score_fluency_weight=self._settings.score_fluency_weight,
            )

    def _losses(self, supervised: Sequence[Supervised]) -> Losses:
        if not supervised:
            return Losses((), ())
        return teacher_forced_losses(
            self.engine,
            supervised,
            answer_temperature=self._settings.answer_temperature,
            max_batch_tokens=self._settings.max_batch_tokens,
        )

    def _supervise(self, instruction: str, row: RowOutcome) -> Supervised | None:
        """The row's tokens, its reasoning cut to what fits the context; None when it was not called or cannot fit."""
        if not row.inputs:
            return None
        gold, limit = self._rows[row.row].labels()[self._field], self.engine.context_length
        written, preamble = dict(row.written), row.preamble
        for _ in range(_MOST_CUTS):
            found = self.layout.supervised(instruction, row.inputs, written, self._field, gold, preamble=preamble)
            surplus = 0 if limit is None else len(found.token_ids) - limit
            if surplus <= 0:
                return found
            texts = {name: text for name, text in written.items() if isinstance(text, str)}
            longest = max(texts, key=lambda name: len(texts[name]), default=None)
            kept = 1 - min(1.0, (surplus + 8) / max(1, len(found.reasoning)))
            preamble = preamble[: int(kept * len(preamble))]
            if longest is not None:
                written[longest] = texts[longest][: int(kept * len(texts[longest]))]
        return None

    def _outcome(self, index: int, rollout: Rollout) -> RowOutcome:
        call = rollout.calls.get(self._site.name)
        if call is None:
            why = rollout.error or f"predictor `{self._site.name}` was not called"
            return RowOutcome(index, rollout.score, {}, {}, math.nan, why)
        names = self._site.output_fields
        earlier = names[: names.index(self._field)]
        written = {name: plain(call.outputs.get(name, "")) for name in earlier}
        preamble, body = split_completion(self._site, call.completion or "")
        if call.error is not None and earlier and not any(written.values()):
            written[earlier[0]] = body  # what did not parse is still what the model reasoned
        inputs = {name: plain(value) for name, value in call.inputs.items()}
        return RowOutcome(index, rollout.score, inputs, written, math.nan, rollout.error, preamble)


def split_completion(site: PredictorSite, completion: str) -> tuple[str, str]:
    """What a model wrote before the header of its first field (a native <think> block), and what after it.

    A completion without that header is all body.
    """
    values = dict.fromkeys(site.output_fields, _MARK)
    header = str(site.adapter.format_assistant_message_content(site.signature, values)).partition(_MARK)[0].strip()
    for opening in filter(None, dict.fromkeys([header, *header.split()[:1]])):  # models space JSON in their own way
        before, found, after = completion.partition(opening)
        if found:
            return before, after.lstrip("\n")
    return "", completion
