"""The task loss of one predictor's instruction: reasoning of its own for every row, then exact losses.

`evaluate` is what the search minimises; `supervised` and `proposal_contexts` are the two
views on its rows that the gradient and the proposals are taken from; `spent` is what it cost.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from dataclasses import field as made_by
from functools import partial
from random import Random
from typing import Any

from dspy_greater.errors import CallMismatchError, LayoutError
from dspy_greater.metric import RowMetric
from dspy_greater.model.counters import Counters
from dspy_greater.model.engine import Engine
from dspy_greater.model.interface import Model
from dspy_greater.objective.loss import losses
from dspy_greater.objective.replay import ReasonedSequence, Reasoning
from dspy_greater.objective.score import DEFAULT_CRITERION, Criterion, evaluation, likeliest
from dspy_greater.objective.sequences import Examples, written_key
from dspy_greater.objective.types import Evaluation, RowOutcome
from dspy_greater.program.called import CalledAs, brings_a_signature, called_as, scored_calls
from dspy_greater.program.copies import with_instructions
from dspy_greater.program.predictors import Predictor
from dspy_greater.program.rollout import (
    Rollout,
    answered,
    asks_servers,
    engines_behind,
    refuse_dead_lm,
    run_pairs,
    run_uncached,
    searching_copy,
    spent_on_servers,
)
from dspy_greater.program.sent import differences, refuse_differences, refuse_ignored_signature, warn_of_lost_thoughts
from dspy_greater.program.servers import Servers, Spent
from dspy_greater.prompt.layout import Layout, Supervised
from dspy_greater.settings import Settings
from dspy_greater.stats import mean

_MORE = "Please."  # an instruction that is another one with this after it


@dataclass(frozen=True)
class Instruction:
    """An instruction as text and as the token ids that it is deployed with."""

    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Objective:
    """What is minimised: the loss of a program on rows, as a function of one predictor's instruction.

    Attributes:
        program: the program, with the other predictors' instructions as they are now.
        predictor: the one that is optimised.
        field: its output field with gold values; None: the loss of a row is 1 - score.
        rows: the training rows; each has a gold value for `field`.
        metric: the user's metric on the whole program's prediction.
        extractor: text between reasoning and answer.
        fixed: the leading text of the instruction that may not change.
        servers: waits for answers that do not come, and counts them.
        heard: told of all runs, and whether they are the first ones; it raises where they cannot be trusted.
    """

    program: Any
    predictor: Predictor
    field: str | None
    rows: Sequence[Any]
    metric: RowMetric
    extractor: str | None = None
    fixed: str = ""
    servers: Servers = made_by(default_factory=Servers)
    heard: Callable[..., None] | None = None


class Evaluator:
    """Evaluates instructions of one predictor; the same instruction never runs twice on the same row.

    Args:
        objective: what is minimised.
        engine: the predictor's weights.
        settings: the search's knobs.
        criterion: by what instructions are compared.
        model: what reads with these weights, such as workers; the engine itself when not given.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        engine: Engine,
        settings: Settings,
        criterion: Criterion = DEFAULT_CRITERION,
        model: Model | None = None,
    ) -> None:
        self.engine, self.model = engine, engine if model is None else model
        self._program, self._predictor, self._field = objective.program, objective.predictor, objective.field
        self._rows, self._metric, self._settings = tuple(objective.rows), objective.metric, settings
        self._extractor, self._fixed, self._heard = objective.extractor, objective.fixed, objective.heard
        # An extractor asks for the answer itself.
        self._header_counts = criterion.counts_missing_header and objective.extractor is None
        self._uncertainty_weight = settings.uncertainty_weight if criterion.counts_uncertainty else 0.0
        self._lay_out(CalledAs(objective.predictor))
        self._known: dict[str, Evaluation] = {}
        self._laid_out: dict[Any, tuple[ReasonedSequence, ...]] = {}
        self._engines = list({id(used): used for used in [engine, *engines_behind(objective.program)]}.values())
        self._first: Evaluation | None = None
        self._runs, self._served, self._servers = 0, Spent(), objective.servers
        self._asks_servers, self.alone = asks_servers(objective.program), len(objective.program.predictors()) == 1

    def _lay_out(self, called: CalledAs) -> None:
        self.called = called
        self.layout: Layout = called.layout(self.engine.tokenizer, extractor=self._extractor, fixed=self._fixed)
        self.examples = Examples(
            self.layout,
            called.predictor,
            self._field,
            self._rows,
            self.engine.context_length,
            header_counts=self._header_counts,
        )

    def seed(self) -> Instruction:
        """The instruction that the predictor has now."""
        text = self._predictor.instruction
        return Instruction(self.layout.edits.instruction_ids(text), text)

    def evaluate_seed(self) -> tuple[Evaluation, list[Rollout]]:
        """The seed's evaluation, as `evaluate` makes it, and its runs; what these really sent is what is laid out.

        Raises:
            CallMismatchError: what the predictor's calls send cannot be laid out.
            MetricError, ProgramError: as `evaluate`.
        """
        with self.model.session() as session:
            rollouts = self._run_seed(self._rows, session)
            refuse_dead_lm(rollouts, len(self._rows))
            self._follow(rollouts)
            seed = self.seed()
            outcomes = [self.examples.outcome(index, rollout) for index, rollout in enumerate(rollouts)]
            [self._first] = self._score([seed], [outcomes], session)
        self.recall([self._first])
        return self._first, rollouts

    def resume(self, seed: Evaluation, called_as: str) -> None:
        """Go on from an interrupted run's seed; where prompts were `called_as` something, one row is run to see it.

        Raises:
            CallMismatchError: the predictor is called in another way.
        """
        if called_as:
            at = next((row.row for row in seed.rows if row.inputs), 0)
            with self.model.session() as session:
                self._follow(self._run_seed(self._rows[at : at + 1], session))
        if self.called.description != called_as:
            raise CallMismatchError(
                f"Predictor `{self._predictor.name}` is called in another way than when this run began: "
                f"{self.called.description or 'as it is'} now, {called_as} then. Start a new run in another log_dir, "
                "or restore the program."
            )
        self.recall([seed])
        self._first = seed

    def _run_seed(self, rows: Sequence[Any], session: Model) -> list[Rollout]:
        copied = searching_copy(self._program, {self._predictor.name: self._predictor.instruction})
        return self._roll_out([(copied, row) for row in rows], session, first=True)

    def _follow(self, rollouts: Sequence[Rollout]) -> None:
        """Lay prompts out as these runs sent them, or refuse."""
        name, calls = self._predictor.name, scored_calls(rollouts, self._predictor.name, every=self._field is None)
        called = called_as(self._predictor, calls, str(self.engine.tokenizer.chat_template), supervised=self._field)
        if called.description:
            self._lay_out(called)
        found = differences(called, self.layout, self.engine, calls, supervised=self._field)
        refuse_differences(name, found, len(calls))
        warn_of_lost_thoughts(name, self.layout, calls)
        at = next((i for i, rollout in enumerate(rollouts) if brings_a_signature(rollout, name)), None)
        if at is not None:  # does it take the predictor's instruction along?
            copied = searching_copy(self._program, {name: f"{self._predictor.instruction} {_MORE}"})
            [again] = self._settled([(copied, self._rows[at])], partial(run_pairs, metric=self._metric, threads=1))
            asked = dict(copied.named_predictors())[name].signature.instructions
            refuse_ignored_signature(name, asked, scored_calls([again], name, every=True))

    def try_out(self, instructions: Sequence[Instruction], rows: Sequence[int], model: Model) -> list[Evaluation]:
        """As `evaluate` does, on some of the rows alone; nothing of it is remembered.

        Raises:
            MetricError, ProgramError: as `evaluate`.
        """
        runs = self._run([(instruction.text, row) for instruction in instructions for row in rows], model)
        return self._score(
            instructions, [[runs[instruction.text, row] for row in rows] for instruction in instructions], model
        )

    def on_rows(self, evaluated: Evaluation, rows: Sequence[int]) -> Evaluation:
        """What an evaluation says of some of its rows, to be compared with what was tried out on them."""
        instruction = Instruction(evaluated.token_ids, evaluated.instruction)
        return self._evaluation(instruction, [row for row in evaluated.rows if row.row in rows], evaluated.fluency_nll)

    def evaluate(
        self, instructions: Sequence[Instruction], model: Model | None = None, tried: Sequence[Evaluation] = ()
    ) -> list[Evaluation]:
        """Let every instruction reason on all rows, score it with the metric and take the exact losses.

        All new instructions and rows are generated in one go, but for those that were `tried` out. `model` is the
        session of a step; without one the evaluation has a session of its own.

        Raises:
            MetricError: the metric returned something that is not a score, on the first instruction; on a later one
                that is a mistake, as where the metric raises.
            ProgramError: the language model could not be called, not even once, nor where it answered before.
        """
        unknown = [instruction for instruction in instructions if instruction.text not in self._known]
        new = list({instruction.text: instruction for instruction in unknown}.values())
        if new:
            with nullcontext(model) if model is not None else self.model.session() as session:
                pairs = [(instruction.text, row) for instruction in new for row in range(len(self._rows))]
                runs = {(evaluated.instruction, row.row): row for evaluated in tried for row in evaluated.rows}
                runs |= self._run([pair for pair in pairs if pair not in runs], session)
                drafts = [[runs[instruction.text, row] for row in range(len(self._rows))] for instruction in new]
                self.recall(self._score(new, drafts, session))
        return [self._known[instruction.text] for instruction in instructions]

    def recall(self, evaluations: Sequence[Evaluation]) -> None:
        """Take over evaluations of an interrupted run, so that they are not made again."""
        self._known.update({evaluated.instruction: evaluated for evaluated in evaluations})

    def fits(self, evaluated: Evaluation) -> bool:
        """Whether any row can be laid out under this instruction; otherwise its loss says nothing of the model."""
        try:
            return any(self.examples.fluency_sequence(evaluated.instruction, row) for row in evaluated.rows)
        except LayoutError:
            return False

    def knows(self, text: str) -> bool:
        """Whether an instruction was tried."""
        return text in self._known

    def spent(self, since: Mapping[str, int] | None = None) -> dict[str, int]:
        """What was computed so far, or since an earlier answer: the counters of all engines, and `runs` on a row.

        What a server wrote counts as generated tokens, too, and where one is asked, `prompt_tokens` are what it read.
        """
        counted = asdict(sum((engine.counters for engine in self._engines), Counters()))
        counted["generated_tokens"] += self._served.generated_tokens
        if self._asks_servers:
            counted["prompt_tokens"] = self._served.prompt_tokens
        counted["runs"] = self._runs
        return {name: count - (since[name] if since else 0) for name, count in counted.items()}

    def supervised(self, evaluated: Evaluation, *, reasoned: bool = True) -> list[Supervised]:
        """x ⊙ p ⊙ r ⊙ p_extract ⊙ y of every row on which the predictor was called, r empty if not `reasoned`."""
        found = [self.examples.supervised(evaluated.instruction, row, reasoned=reasoned) for row in evaluated.rows]
        return [example for example in found if example is not None]

    def replay(self, current: Evaluation, generator: Random, limit: int) -> list[Reasoning]:
        """The reasonings at hand, distinct in each row, at most `limit` of them: the current instruction's own."""
        runs = {(row.row, written_key(row)): row for row in current.rows if row.inputs}
        distinct = dict(sorted(runs.items(), key=lambda pair: pair[0]))
        drawn = generator.sample(list(distinct), min(limit, len(distinct)))
        laid_out = {key: self._under(current, key, distinct[key]) for key in drawn}
        usable = [key for key, sequences in laid_out.items() if sequences]
        in_row = Counter(row for row, _ in usable)
        return [
            Reasoning(row, 1.0 - distinct[row, key].score, 1.0 / in_row[row], laid_out[row, key]) for row, key in usable
        ]

    def generated(self, current: Evaluation) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """After which prompts the predictor generated what, up to a gold answer, as far as this evaluation tells."""
        found: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        for row in (row for row in current.rows if row.inputs):
            for sequence in self._under(current, (row.row, written_key(row)), row):
                stop = self.examples.prompt_length(sequence, current.instruction, row)
                found.append((sequence.token_ids[:stop], sequence.token_ids[stop:]))
        return found

    def _under(self, current: Evaluation, key: tuple[int, str], row: RowOutcome) -> tuple[ReasonedSequence, ...]:
        """Laid out once for all instructions with the same tokens around them, whole; shortened where it has to be."""
        place = (key, self.layout.edits.around(current.instruction))
        if place not in self._laid_out:
            self._laid_out[place] = self.examples.sequences(current.instruction, row, cut=False)
        moved = tuple(sequence.under(current.token_ids) for sequence in self._laid_out[place])
        limit = self.engine.context_length or math.inf
        if all(len(sequence.token_ids) <= limit for sequence in moved):
            return moved
        return self.examples.sequences(current.instruction, row)

    def proposal_contexts(self, evaluated: Evaluation, position: int) -> list[tuple[int, ...]]:
        """x_j ⊙ p_<i of every row on which the predictor was called, in the paper's layout."""
        before = evaluated.token_ids[:position]
        return [(*self.layout.proposal_prefix(row.inputs), *before) for row in evaluated.rows if row.inputs]

    def _run(self, pairs: Sequence[tuple[str, int]], session: Model) -> dict[tuple[str, int], RowOutcome]:
        """Instructions, by their text, on rows."""
        texts = dict.fromkeys(text for text, _ in pairs)
        copies = {text: searching_copy(self._program, {self._predictor.name: text}) for text in texts}
        done = self._roll_out([(copies[text], self._rows[row]) for text, row in pairs], session)
        # A dead language model fails on a row, too, that was answered under the first instruction.
        refuse_dead_lm(done, len(self._rows), None if self._first is None else partial(self._probe, self._first))
        return {pair: self.examples.outcome(pair[1], rollout) for pair, rollout in zip(pairs, done, strict=True)}

    def _roll_out(self, pairs: Sequence[tuple[Any, Any]], session: Model, *, first: bool = False) -> list[Rollout]:
        """Programs on rows; the session generates where they run on the very model whose instruction is evaluated."""
        generate = session.generate if engines_behind(self._program) == [self.engine] else None
        metric = self._metric if self._first is None else self._metric.late
        run = partial(
            run_pairs,
            metric=metric,
            threads=self._settings.num_threads,
            generate=generate,
            failure_score=self._settings.failure_score,
        )
        done = self._settled(pairs, run)
        if self._heard is not None:
            self._heard(done, before=first)
        return done

    def _settled(self, pairs: Sequence[tuple[Any, Any]], run: Callable[..., list[Rollout]]) -> list[Rollout]:
        """The runs of programs on rows, once every row is answered, or is at fault itself."""
        probe = None if self._first is None else partial(self._ask_again, self._first)
        done = answered(pairs, run, self._servers, probe=probe)
        self._runs += len(done)
        self.count(done)
        return done

    def _probe(self, answered: Evaluation) -> Rollout:
        probed = self._ask_again(answered)
        self._runs += 1
        self.count([probed])
        return probed

    def _ask_again(self, answered: Evaluation) -> Rollout:
        """The student's run on a row that it was answered on, past all caches."""
        row = min(answered.rows, key=lambda row: (row.error is not None, not row.written))
        program = with_instructions(self._program, {self._predictor.name: answered.instruction})
        return run_uncached(program, self._rows[row.row], threads=self._settings.num_threads)

    def count(self, rollouts: Sequence[Rollout]) -> None:
        """Count what servers read and wrote in these runs."""
        if self._asks_servers:
            encode = partial(self.engine.tokenizer.encode, add_special_tokens=False)
            spent = spent_on_servers(rollouts, lambda text: len(encode(text)))
            self._served += spent
            self._servers.count(spent)

    def _score(
        self, instructions: Sequence[Instruction], drafts: Sequence[Sequence[RowOutcome]], session: Model
    ) -> list[Evaluation]:
        """Exact losses for all rows and acceptable answers in one pass."""
        laid_out = [
            self._laid_out_rows(instruction.text, rows) for instruction, rows in zip(instructions, drafts, strict=True)
        ]
        flat = [sequence for group in laid_out for answers in group for sequence in answers if sequence is not None]
        taken_losses = losses(session, flat, answer_temperature=self._settings.answer_temperature)
        taken = iter(zip(taken_losses.cross_entropy, taken_losses.fluency_nll, strict=True))
        scored: list[Evaluation] = []
        for instruction, rows, group in zip(instructions, drafts, laid_out, strict=True):
            pairs = [
                [(math.nan, math.nan) if sequence is None else next(taken) for sequence in answers] for answers in group
            ]
            best = [likeliest(loss for loss, _ in answers) for answers in pairs]
            counts = [answers[at] for answers, at in zip(pairs, best, strict=True)]
            fluency = [nll for _, nll in counts if math.isfinite(nll)]
            outcomes = [
                replace(row, cross_entropy=loss if self._field else 1.0 - row.score, answer=answer)
                for row, (loss, _), answer in zip(rows, counts, best, strict=True)
            ]
            scored.append(self._evaluation(instruction, outcomes, mean(fluency)))
        return scored

    def _evaluation(self, instruction: Instruction, rows: Sequence[RowOutcome], fluency_nll: float) -> Evaluation:
        return evaluation(
            instruction.token_ids,
            instruction.text,
            rows,
            fluency_nll,
            score_fluency_weight=self._settings.score_fluency_weight,
            uncertainty_weight=self._uncertainty_weight,
        )

    def _laid_out_rows(self, text: str, rows: Sequence[RowOutcome]) -> list[list[Supervised | None]]:
        """A candidate that cannot be laid out has no loss; where the first instruction cannot, nothing can."""
        try:
            return [self.examples.alternatives(text, row) for row in rows]
        except LayoutError:
            if self._first is None:
                raise
            return [[None] for _ in rows]
