"""Algorithm 1 on models whose best instruction is known; `test_reference` holds it to its plain form."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from scripted_engine import (
    BEST,
    PlantedModel,
    instruction_of,
    planted_engine,
    planted_rows,
    program_on,
    shared_tokenizer,
    worth_of,
)
from scripted_engine import optimizer as optimizer_of

from dspy_greater import GReaTerTeleprompter
from dspy_greater.errors import LossError
from dspy_greater.model.engine import Engine
from dspy_greater.objective.types import Evaluation
from dspy_greater.search.paper_step import PaperRanking, PaperStep, Ranked, by_paper_gradient
from dspy_greater.search.state import ends_sentence
from dspy_greater.search.step import StepContext

SEEDS = range(6)
ROWS = planted_rows(24)


def optimizer(rank: PaperRanking = by_paper_gradient, **settings: Any) -> GReaTerTeleprompter:
    return optimizer_of(variant=PaperStep(rank=rank), **settings)


def compiled(seed: int = 0, engine: Any = None, **settings: Any) -> Any:
    program = program_on(engine or planted_engine())
    chosen = {"train_rows": 8, "validation_rows": 8, "seed": seed, **settings}
    return optimizer(**chosen).compile(program, ROWS[:8], valset=ROWS[8:16])


def tried(program: Any) -> list[int]:
    """How many candidates got reasoning of their own at each step; the current token is not one."""
    details = program.detailed_results
    before = [instruction_of_step(details, index - 1) for index in range(len(details.steps))]
    return [
        sum(each.evaluation is not None and each.evaluation.instruction != current for each in step.candidates)
        for step, current in zip(details.steps, before, strict=True)
    ]


def instruction_of_step(details: Any, index: int) -> str:
    return details.steps[index].chosen.instruction if index >= 0 else details.predictors[0].seed_instruction


# ---- a planted optimum


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_the_planted_word_is_found_within_one_round(seed: int) -> None:
    better = compiled(seed, steps=4)
    assert BEST in instruction_of(better).split()
    assert (better.detailed_results.seed_score, better.score) == (0.0, 1.0)


def test_the_gradient_ranks_the_words_as_the_model_obeys_them() -> None:
    [first] = compiled(steps=1).detailed_results.steps
    slopes = {each.text.strip(): each.gradient for each in first.candidates}
    told = [word for word in sorted(slopes, key=lambda word: slopes[word]) if worth_of(word)]
    assert told == sorted(told, key=lambda word: -worth_of(word))
    assert len(told) >= 4


def by_chance(at: StepContext, current: Evaluation, stands: int, candidates: Sequence[int]) -> Ranked:
    """The twin without a gradient: the same candidates in a random order."""
    rng = random.Random(f"{at.state.position}{candidates}{current.token_ids}")
    return Ranked(tuple(rng.sample(list(candidates), len(candidates))), {})


def without_current(at: StepContext, current: Evaluation, stands: int, candidates: Sequence[int]) -> Ranked:
    """The gradient's order, without the current token, so that each step tries one."""
    found = by_paper_gradient(at, current, stands, candidates)
    return replace(found, tokens=tuple(each for each in found.tokens if each != stands))


@pytest.mark.slow
def test_at_equal_budget_the_gradient_beats_random_choices_among_the_same_proposals() -> None:
    budget = {"steps": 3, "selections": 1, "train_rows": 4}
    guided = [compiled(seed, rank=without_current, **budget) for seed in SEEDS]
    blind = [compiled(seed, rank=by_chance, **budget) for seed in SEEDS]

    assert [tried(each) for each in guided] == [tried(each) for each in blind] == [[1, 1, 1]] * len(SEEDS)
    first = [[step.candidates[0].token for step in each.detailed_results.steps[:1]] for each in guided]
    assert first == [[step.candidates[0].token for step in each.detailed_results.steps[:1]] for each in blind]
    guided_scores, blind_scores = [each.score for each in guided], [each.score for each in blind]
    assert all(better >= worse for better, worse in zip(guided_scores, blind_scores, strict=True))
    assert sum(guided_scores) > sum(blind_scores) + 2.0  # of 6


# ---- lines 14 to 18: p moves on, p* is the best that was seen


def upside_down(at: StepContext, current: Evaluation, stands: int, candidates: Sequence[int]) -> Ranked:
    """The worst tokens look best."""
    found = by_paper_gradient(at, current, stands, candidates)
    return replace(found, tokens=found.tokens[::-1])


@pytest.mark.slow
def test_the_instruction_moves_to_the_best_of_those_selected_and_the_best_that_was_seen_is_returned() -> None:
    better = compiled(steps=8, engine=planted_engine(seed=1), rank=upside_down)
    details = better.detailed_results
    objectives = [step.chosen.objective for step in details.steps]
    downhill = [index for index, (a, b) in enumerate(itertools.pairwise(objectives)) if b > a]
    assert downhill, "no step was selected that made it worse, so this test shows nothing"
    seen = [each.evaluation.objective for step in details.steps for each in step.candidates if each.evaluation]
    assert details.predictors[0].finalists[0].objective == min(seen)


def test_a_step_whose_best_token_is_the_current_one_runs_nothing_and_is_no_failure() -> None:
    def stay(at: StepContext, current: Evaluation, stands: int, candidates: Sequence[int]) -> Ranked:
        found = by_paper_gradient(at, current, stands, candidates)
        return replace(found, tokens=(stands, *found.tokens))

    better = compiled(steps=4, selections=1, max_failed_steps=2, rank=stay)
    assert tried(better) == [0, 0, 0, 0]
    assert [step.spent["generated_tokens"] for step in better.detailed_results.steps] == [0, 0, 0, 0]


# ---- positions, growth and failure


def positions(program: Any) -> list[int]:
    return [step.position for step in program.detailed_results.steps]


@pytest.mark.slow
def test_no_step_is_spent_on_a_position_that_cannot_be_edited() -> None:
    program = program_on(planted_engine(), instruction="Look\n  here now.")
    better = optimizer(steps=6, train_rows=4).compile(program, ROWS[:4], valset=ROWS[4:8])
    steps = better.detailed_results.steps
    assert len(steps) == 6
    assert all(step.candidates for step in steps)
    assert all("\n" in step.chosen.instruction for step in steps)
    assert BEST in instruction_of(better).lower()


@pytest.mark.slow
def test_an_open_instruction_grows_by_one_token_until_its_sentence_ends() -> None:
    program = program_on(planted_engine(), instruction="count")
    better = optimizer(steps=7, train_rows=4).compile(program, ROWS[:4], valset=ROWS[4:8])
    lengths = [len(step.chosen.token_ids) for step in better.detailed_results.steps]
    assert lengths[0] == 1 and lengths[-1] > 2
    for step, longer in itertools.pairwise(better.detailed_results.steps):
        grown = len(longer.chosen.token_ids) - len(step.chosen.token_ids)
        appended = longer.position == len(step.chosen.token_ids)
        assert grown == appended
        if ends_sentence(step.chosen.instruction) and step.position + 1 >= len(step.chosen.token_ids):
            assert longer.position == 0


def test_an_instruction_at_its_longest_starts_over_instead_of_growing() -> None:
    program = program_on(planted_engine(), instruction="count")
    better = optimizer(steps=5, train_rows=4, max_instruction_tokens=2).compile(program, ROWS[:4], valset=ROWS[4:8])
    assert max(len(step.chosen.token_ids) for step in better.detailed_results.steps) == 2
    assert positions(better) == [0, 1, 0, 1, 0]


def test_every_step_that_has_candidates_records_what_it_cost() -> None:
    for step in compiled(steps=3).detailed_results.steps:
        assert step.spent["forwards"] > 0
        assert step.spent["backward_tokens"] > 0
        assert step.spent["generated_tokens"] > 0


class BrokenEngine(Engine):
    """Writes as it should, but nothing that it reads is a number."""

    @contextmanager
    def session(self, expected: Any = ()) -> Iterator[Any]:
        with super().session(expected) as opened:
            for name in ("token_logprobs", "logprob_gradient"):
                setattr(opened, name, self._broken(getattr(opened, name)))
            yield opened

    def _broken(self, reads: Any) -> Any:
        return lambda *arguments: reads(*arguments) * math.nan


def test_a_model_without_one_finite_loss_ends_the_search_and_says_what_to_do() -> None:
    tokenizer = shared_tokenizer()
    engine = BrokenEngine(PlantedModel(tokenizer), tokenizer, name="broken")
    with pytest.raises(LossError, match="`predict`: no candidate had a finite loss in 2 steps in a row. .*float32"):
        compiled(engine=engine, steps=6, max_failed_steps=2)
