"""The task loss of one predictor's instruction: reasoning of its own for every row, then exact losses.

`evaluate` is what the search minimises; `supervised` and `proposal_contexts` are the two
views on its rows that the gradient and the proposals are taken from; `spent` is what it cost.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from random import Random
from typing import Any

from dspy_greater.metric import RowMetric
from dspy_greater.model.counters import Counters
from dspy_greater.model.engine import Engine
from dspy_greater.model.fast.scoring import score
from dspy_greater.model.teacher_forcing import Losses
from dspy_greater.objective.replay import ReasonedSequence, Reasoning
from dspy_greater.objective.sequences import Examples, written_key
from dspy_greater.program.predictors import PredictorSite
from dspy_greater.program.rollout import (
    Rollout,
    asked_of_servers,
    engines_behind,
    refuse_dead_lm,
    run_pairs,
    runs_at_once,
    sampling_copy,
    searching_copy,
)
from dspy_greater.prompt.layout import Layout, Supervised
from dspy_greater.run.events import Evaluation, RowOutcome
from dspy_greater.search.select import evaluation, given_up, has_no_chance
from dspy_greater.settings import Settings

_FEWEST_ROWS = 8  # of an instruction that are run before it may be given up
_SURE = 0.99  # of a fluency; in another batch it has other last digits, in half precision more of them


@dataclass(frozen=True)
class Instruction:
    """An instruction as text and as the token ids that it is deployed with."""

    token_ids: tuple[int, ...]
    text: str


class Objective:
    """Evaluates instructions of one predictor; the same instruction never runs twice on the same row.

    Args:
        program: the program, with the other predictors' instructions as they are now.
        site: the predictor that is optimised.
        field: its output field with gold values; None: the loss of a row is 1 - score.
        rows: the training rows; each has a gold value for `field`.
        metric: the user's metric on the whole program's prediction.
        engine: the predictor's weights.
        settings: the search's knobs.
        extractor: text between reasoning and answer.
        fixed: the leading text of the instruction that may not change.
    """

    def __init__(
        self,
        *,
        program: Any,
        site: PredictorSite,
        field: str | None,
        rows: Sequence[Any],
        metric: RowMetric,
        engine: Engine,
        settings: Settings,
        extractor: str | None = None,
        fixed: str = "",
    ) -> None:
        self.engine = engine
        self.layout = Layout(
            engine.tokenizer, site.adapter, site.signature, demos=site.demos, extractor=extractor, fixed=fixed
        )
        self.examples = Examples(
            self.layout,
            site,
            field,
            rows,
            engine.context_length,
            header_counts=settings.header_counts and extractor is None,  # an extractor asks for the answer itself
        )
        self._program, self._site, self._field = program, site, field
        self._rows, self._metric, self._settings = tuple(rows), metric, settings
        self._known: dict[str, Evaluation] = {}
        self._samples: tuple[RowOutcome, ...] = ()
        self._laid_out: dict[tuple[int, str], tuple[ReasonedSequence, ...]] = {}
        self._best_score_holds = True  # no row scored more than the settings say is possible
        self._engines = list({id(each): each for each in [engine, *engines_behind(program)]}.values())
        self._first: Evaluation | None = None
        self._begin_alike: bool | None = None
        self._runs = self._served_tokens = 0

    def seed(self) -> Instruction:
        """The instruction that the predictor has now."""
        text = self._site.instruction
        return Instruction(self.layout.instruction_ids(text), text)

    def evaluate(self, instructions: Sequence[Instruction], *, beat: float | None = None) -> list[Evaluation]:
        """Let every instruction reason on all rows, score it with the metric and take the exact losses.

        Without `beat`, all new instructions and rows are generated in one go. With it they are run in waves of one
        decode batch, and an instruction is given up before the first wave, if its fluency alone, or after a wave,
        if its mistakes too, leave it no chance of an objective whose first number is at most `beat`. Its
        evaluation is then not complete. When it is asked for again it stays given up, unless a looser `beat`
        gives it a chance; then only the missing rows are run.

        Raises:
            MetricError: the metric returned something that is not a score.
            ProgramError: the language model could not be called, not even once.
        """
        wanted = {each.text: each for each in instructions}
        fluency = self._fluency(wanted.values()) if beat is not None else {}
        with self.engine.kept_rows():
            drafts = self._run(wanted, beat, fluency)
            complete = [text for text, rows in drafts.items() if len(rows) == len(self._rows)]
            self._score([wanted[text] for text in complete], [drafts.pop(text) for text in complete])
        for text, rows in drafts.items():
            self._known[text] = given_up(wanted[text].token_ids, text, rows, fluency[text])
        self._first = self._first or next((each for each in self._known.values() if each.complete), None)
        return [self._known[each.text] for each in instructions]

    def recall(self, evaluations: Sequence[Evaluation]) -> None:
        """Take over evaluations of an interrupted run, so that they are not made again."""
        self._known.update({each.instruction: each for each in evaluations})
        self._first = self._first or next((each for each in self._known.values() if each.complete), None)
        self._look_at([row.score for each in evaluations for row in each.rows])

    def knows(self, text: str) -> bool:
        """Whether an instruction was tried, to the end or until it was given up."""
        return text in self._known

    def explore(self, instruction: Instruction, *, seed: int) -> tuple[RowOutcome, ...]:
        """`settings.samples` more runs on every row at the sampling temperature, for variety among the reasonings."""
        runs = range(self._settings.samples)
        heat = self._settings.sampling_temperature
        copies = [sampling_copy(self._program, self._site.name, instruction.text, heat, seed + run) for run in runs]
        pairs = [(copy, row) for copy in copies for row in self._rows]
        rollouts = run_pairs(pairs, self._metric, threads=self._settings.threads, refuse_dead=False)
        self._count(rollouts)
        return tuple(self.examples.outcome(at % len(self._rows), each) for at, each in enumerate(rollouts))

    def remember(self, samples: Sequence[RowOutcome]) -> None:
        """Replay these runs, too, from now on."""
        self._samples = tuple(samples)

    def spent(self, since: Mapping[str, int] | None = None) -> dict[str, int]:
        """What was computed so far, or since an earlier answer: the counters of all engines, and `runs` on a row.

        What a server wrote counts as generated tokens, too.
        """
        counted = asdict(sum((engine.counters for engine in self._engines), Counters()))
        counted["generated_tokens"] += self._served_tokens
        counted["runs"] = self._runs
        return {name: count - (since[name] if since else 0) for name, count in counted.items()}

    def supervised(self, evaluated: Evaluation, *, reasoned: bool = True) -> list[Supervised]:
        """x ⊙ p ⊙ r ⊙ p_extract ⊙ y of every row on which the predictor was called, r empty if not `reasoned`."""
        found = [self.examples.supervised(evaluated.instruction, row, reasoned=reasoned) for row in evaluated.rows]
        return [each for each in found if each is not None]

    def replay(self, current: Evaluation, generator: Random, limit: int) -> list[Reasoning]:
        """The reasonings at hand, distinct in each row, at most `limit` of them: the current instruction's own.

        Samples of the seed instruction come on top, if there are any.
        """
        runs = {(row.row, written_key(row)): row for row in [*self._samples, *current.rows] if row.inputs}
        distinct = dict(sorted(runs.items(), key=lambda pair: pair[0]))
        drawn = generator.sample(list(distinct), min(limit, len(distinct)))
        laid_out = {key: self._under(current, key, distinct[key]) for key in drawn}
        usable = [key for key, sequences in laid_out.items() if sequences]
        in_row = Counter(row for row, _ in usable)
        return [
            Reasoning(row, 1.0 - distinct[row, key].score, 1.0 / in_row[row], laid_out[row, key]) for row, key in usable
        ]

    def drafts(self, current: Evaluation) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """After which prompts the predictor wrote what, up to a gold answer, as far as this evaluation tells."""
        found: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        for row in (row for row in current.rows if row.inputs):
            for each in self._under(current, (row.row, written_key(row)), row):
                stop = self.examples.prompt_length(each, current.instruction, row)
                found.append((each.token_ids[:stop], each.token_ids[stop:]))
        return found

    def _under(self, current: Evaluation, key: tuple[int, str], row: RowOutcome) -> tuple[ReasonedSequence, ...]:
        """Laid out once for all instructions, whole; where that does not fit, for this one and shortened."""
        if key not in self._laid_out:
            self._laid_out[key] = self.examples.sequences(current.instruction, row, cut=False)
        moved = tuple(each.under(current.token_ids) for each in self._laid_out[key])
        limit = self.engine.context_length or math.inf
        if all(len(each.token_ids) <= limit for each in moved):
            return moved
        return self.examples.sequences(current.instruction, row)

    def proposal_contexts(self, evaluated: Evaluation, position: int) -> list[tuple[int, ...]]:
        """x_j ⊙ p_<i of every row on which the predictor was called, in the paper's layout."""
        before = evaluated.token_ids[:position]
        return [(*self.layout.proposal_prefix(row.inputs), *before) for row in evaluated.rows if row.inputs]

    def _fluency(self, instructions: Iterable[Instruction]) -> dict[str, float]:
        """Nats per token of each instruction, from one row; 0 where it cannot be known from one.

        As long as the prompts of all rows begin alike, an instruction is equally fluent on all of them.
        """
        known = {each.text: self._known.get(each.text) for each in instructions}
        fluency = {text: each.fluency_nll if each else math.nan for text, each in known.items()}
        row = self._typical_row()
        new = [text for text, each in known.items() if each is None and row is not None]
        laid_out = {text: self.examples.fluency_sequence(text, row) for text in new if row is not None}
        readable = {text: each for text, each in laid_out.items() if each is not None}
        fluency.update(zip(readable, self._losses(list(readable.values())).fluency_nll, strict=True))
        return {text: nll if math.isfinite(nll) else 0.0 for text, nll in fluency.items()}

    def _typical_row(self) -> RowOutcome | None:
        """A row of the first instruction, if the prompts of all its rows are the same up to the inputs."""
        if self._first is None:
            return None
        called = [row for row in self._first.rows if row.inputs]
        if self._begin_alike is None:
            found = [self.examples.fluency_sequence(self._first.instruction, row) for row in called]
            self._begin_alike = len({each.token_ids[: each.instruction.stop] for each in found if each}) == 1
        return called[0] if self._begin_alike else None

    def _run(
        self, wanted: Iterable[str], beat: float | None, fluency: Mapping[str, float]
    ) -> dict[str, list[RowOutcome]]:
        """The rows of all instructions that are not known completely, those that were run before included."""
        known = {text: self._known.get(text) for text in wanted}
        drafts = {text: list(each.rows) if each else [] for text, each in known.items() if not (each and each.complete)}
        copies: dict[str, Any] = {}
        done: list[Rollout] = []
        while waiting := [text for text, rows in drafts.items() if self._goes_on(rows, beat, fluency.get(text, 0.0))]:
            for text in (each for each in waiting if each not in copies):
                copies[text] = searching_copy(self._program, {self._site.name: text})
            missing = {text: range(len(drafts[text]), len(self._rows)) for text in waiting}
            size = self._wave([len(rows) for rows in missing.values()], beat)
            wave = [(text, index) for text, rows in missing.items() for index in rows[:size]]
            pairs = [(copies[text], self._rows[index]) for text, index in wave]
            rollouts = run_pairs(pairs, self._metric, threads=self._settings.threads, refuse_dead=False)
            for (text, index), rollout in zip(wave, rollouts, strict=True):
                drafts[text].append(self.examples.outcome(index, rollout))
            self._count(rollouts)
            done += rollouts
        refuse_dead_lm(done, len(self._rows))
        return drafts

    def _goes_on(self, rows: Sequence[RowOutcome], beat: float | None, fluency_nll: float) -> bool:
        """Whether an instruction with these rows needs more of them."""
        total, best = len(self._rows), self._settings.best_score
        if len(rows) == total or beat is None or not self._best_score_holds:
            return len(rows) < total
        fluency = _SURE * self._settings.score_fluency_weight * fluency_nll
        return not has_no_chance(rows, total, beat, best_score=best, fluency=fluency)

    def _wave(self, missing: Sequence[int], beat: float | None) -> int:
        """How many more rows each of the instructions is run on: even shares of its missing rows, no small rest."""
        most = max(missing)
        if beat is None or not self._best_score_holds:
            return most
        at_once = runs_at_once(self._program, self._settings.threads) // len(missing)
        return math.ceil(most / math.ceil(most / max(_FEWEST_ROWS, at_once)))

    def _count(self, rollouts: Sequence[Rollout]) -> None:
        self._runs += len(rollouts)
        encode = self.engine.tokenizer.encode
        answers = asked_of_servers(self._program, rollouts)
        self._served_tokens += sum(len(encode(text, add_special_tokens=False)) for text in answers)
        self._look_at([rollout.score for rollout in rollouts])

    def _look_at(self, scores: Sequence[float]) -> None:
        self._best_score_holds &= all(score <= self._settings.best_score for score in scores)

    def _score(self, instructions: Sequence[Instruction], drafts: Sequence[Sequence[RowOutcome]]) -> None:
        """Exact losses for all rows of all instructions in one pass; remember the evaluations."""
        laid_out = [
            [self.examples.fluency_sequence(instruction.text, row) for row in rows]
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
                [
                    replace(row, cross_entropy=loss if self._field else 1.0 - row.score)
                    for row, (loss, _) in zip(rows, pairs, strict=True)
                ],
                sum(fluency) / len(fluency) if fluency else math.nan,
                score_fluency_weight=self._settings.score_fluency_weight,
                doubt_weight=self._settings.objective_doubt_weight,
                loss_first=self._settings.loss_first,
            )

    def _losses(self, supervised: Sequence[Supervised]) -> Losses:
        if not supervised:
            return Losses((), ())
        return score(
            self.engine,
            supervised,
            answer_temperature=self._settings.answer_temperature,
            max_batch_tokens=self._settings.max_batch_tokens,
        )
