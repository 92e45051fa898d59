"""The default variant's step: what it finds, what each gate passes on, what it costs, and that it can be repeated."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from any_event import bits
from scripted_engine import (
    BEST,
    SEED,
    ScriptedEngine,
    chat_answer,
    exact_match,
    instruction_in,
    instruction_of,
    optimizer,
    planted_engine,
    planted_rows,
    program_on,
    value_in,
)

from dspy_greater.metric import RowMetric
from dspy_greater.objective.evaluator import Evaluator, Objective
from dspy_greater.objective.replay import Reasoning
from dspy_greater.objective.types import Candidate, Evaluation, RowOutcome
from dspy_greater.program.predictors import predictors_of
from dspy_greater.report.result import PredictorResult
from dspy_greater.run.events import StepTaken
from dspy_greater.run.serialise import from_json, to_json
from dspy_greater.search import default_step
from dspy_greater.search.default_step import DefaultStep
from dspy_greater.search.exploration import baseline_scale
from dspy_greater.search.loop import minimise
from dspy_greater.search.select import realised_change
from dspy_greater.search.state import SearchState, begin
from dspy_greater.search.step import Search, StepContext, step_random
from dspy_greater.settings import Settings

ROWS = planted_rows(24)
FEW = ROWS[:4]


def searching(
    engine: Any = None,
    instruction: str = SEED,
    *,
    rows: Sequence[Any] = FEW,
    metric: Any = exact_match,
    field: str | None = "answer",
    **knobs: Any,
) -> tuple[Evaluator, SearchState, Settings]:
    """An objective, the state before its first step, and the settings."""
    program = program_on(engine or planted_engine(), instruction=instruction)
    [predictor] = predictors_of(program)
    settings = Settings(**{"selections": 3, "phrases": 0, "written": 0, "forecast_share": 0, **knobs})
    objective = Evaluator(
        Objective(program=program, predictor=predictor, field=field, rows=rows, metric=RowMetric(metric)),
        engine=predictor.lm.engine.engine,
        settings=settings,
    )
    [seed] = objective.evaluate([objective.seed()])
    return objective, begin(seed, settings, editable=objective.layout.edits.positions(seed.token_ids)), settings


CHANCE = DefaultStep(rank=None, forecast=None)


def step_of(
    objective: Evaluator, state: SearchState, settings: Settings, *, step: DefaultStep | None = None, seed: int = 0
) -> StepTaken:
    with objective.engine.session(objective.generated(state.current)) as model:
        return (step or DefaultStep()).take(StepContext(objective, model, state, settings, "predict", seed))


def stepped(**options: Any) -> StepTaken:
    return step_of(*searching(**options))


def compiled(engine: Any = None, **settings: Any) -> Any:
    program = program_on(engine or planted_engine())
    return optimizer(**settings).compile(program, FEW, valset=ROWS[8:12])


class Fickle(ScriptedEngine):
    """Answers rightly as often as an instruction happens to be worth, in small batches."""

    max_batch_rows = 24

    def __init__(self, write: Any = None) -> None:
        def fickle(prompt: str) -> str:
            instruction, question = instruction_in(prompt), value_in(prompt)
            right = random.Random(instruction + question).random() < random.Random(instruction).random()
            gold = "yes" if "apples" in question else "no"
            return chat_answer(reasoning=f"I look {'twice' if right else 'once'}.", answer=gold if right else "never")

        super().__init__(write or fickle, model=planted_engine().model)


# --- what it finds ---


def planted_search(engine: Any, seed: int) -> Any:
    return optimizer(steps=3, train_rows=8, seed=seed).compile(program_on(engine), ROWS[:8], valset=ROWS[8:12])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_planted_word_is_found_within_one_round(seed: int) -> None:
    better = planted_search(planted_engine(), seed)
    assert BEST in instruction_of(better).split()
    assert (better.detailed_results.seed_score, better.score) == (0.0, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_model_that_proposes_other_words_is_made_to_obey_too(seed: int) -> None:
    better = planted_search(planted_engine(seed=seed), seed)
    assert (better.detailed_results.seed_score, better.score) == (0.0, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [1, 3])
def test_at_equal_budget_it_beats_random_choices_among_the_same_edits(ahead: int) -> None:
    budget = {"steps": 2, "selections": 1, "positions_ahead": ahead}
    guided = [compiled(planted_engine(seed=seed), seed=seed, **budget) for seed in range(3)]
    blind = [compiled(planted_engine(seed=seed), seed=seed, variant=CHANCE, **budget) for seed in range(3)]
    for one, other in zip(guided, blind, strict=True):
        edits = [[each.text for each in run.detailed_results.steps[0].candidates] for run in (one, other)]
        assert ahead > 1 or edits[0] == edits[1]
        assert [[len(tried(step)) for step in run.detailed_results.steps] for run in (one, other)] == [[1, 1]] * 2
    assert [each.score for each in guided] == [1.0] * 3
    assert sum(each.score for each in blind) < 2.0


def tried(step: StepTaken) -> list[Candidate]:
    return [each for each in step.candidates if each.evaluation is not None]


def test_slopes_and_forecasts_rank_the_words_as_the_model_obeys_them() -> None:
    step = stepped(forecasts=12, minimum_candidates=30)
    for kind in ("replace", "insert"):
        slopes = {each.text.strip(): each.gradient for each in step.candidates if each.edit == kind}
        assert slopes["count"] < slopes["add"] < slopes["list"] < slopes["then"] < slopes["hurry"]
    forecasts = {each.text.strip(): each.forecast for each in step.candidates if each.forecast is not None}
    assert forecasts["count"] < forecasts["add"] < forecasts["list"] < 0.0


def test_where_every_reasoning_was_right_the_gold_answers_tell_candidates_apart() -> None:
    easy = [row for row in ROWS if {"one", "two"} & set(row.question.split())]
    step = stepped(instruction="Add it now.", rows=easy[:4])
    assert {row.score for row in step.chosen.rows} == {1.0}
    slopes = [each.gradient for each in step.candidates if each.gradient is not None]
    assert len(slopes) > 6 and all(map(math.isfinite, slopes)) and len(set(slopes)) > 3


def test_without_gold_values_the_metric_alone_finds_the_word() -> None:
    step = stepped(field=None, rows=ROWS[:8])
    assert BEST in step.chosen.instruction.split() and step.chosen.score == 1.0
    forecasts = [each.forecast for each in step.candidates if each.forecast is not None]
    assert min(forecasts) < 0.0


# --- gates ---


def kinds(candidates: Sequence[Candidate]) -> dict[str, int]:
    return {kind: sum(each.edit == kind for each in candidates) for kind in ("replace", "insert", "delete")}


def test_kinds_pass_the_first_gate_in_turn_and_of_each_the_best() -> None:
    step = stepped(forecasts=7)
    passed = [each for each in step.candidates if each.forecast is not None]
    assert kinds(passed) == {"replace": 3, "insert": 3, "delete": 1}
    for kind in ("replace", "insert"):
        slopes = sorted(each.gradient for each in step.candidates if each.edit == kind)
        assert sorted(each.gradient for each in passed if each.edit == kind) == slopes[:3]


def test_the_best_forecasts_are_tried() -> None:
    step = stepped()
    passed = sorted(each.forecast for each in step.candidates if each.forecast is not None)
    assert len(passed) == 6
    assert sorted(each.forecast for each in tried(step)) == passed[:3]


@pytest.mark.slow
def test_of_the_next_positions_it_takes_the_one_that_promises_most() -> None:
    objective, state, settings = searching(positions_ahead=3)
    here = sorted(objective.layout.edits.positions(state.current.token_ids))[1:4]
    state = replace(state, position=here[0])
    alone = {}
    for position in here:
        one, at, knobs = searching(positions_ahead=1)
        alone[position] = step_of(one, replace(at, position=position), knobs)
    promise = {at: min(each.forecast for each in step.candidates if each.forecast) for at, step in alone.items()}
    best = min(here, key=lambda at: promise[at])
    step = step_of(objective, state, settings)
    assert step.position == best != here[0]
    told = [[(each.text, each.edit, each.forecast) for each in one.candidates] for one in (step, alone[best])]
    assert told[0] == told[1]
    assert step.chosen.instruction == alone[best].chosen.instruction


def test_the_search_goes_on_behind_the_position_that_was_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    promise = property(lambda look: -look.at.state.position)  # the last of the three
    monkeypatch.setattr(default_step._Look, "promise", promise)
    objective, state, settings = searching(positions_ahead=3, selections=1, steps=1)
    assert len(objective.layout.edits.positions(state.current.token_ids)) > 3
    [(after, step, _)] = minimise(Search(objective, settings, DefaultStep(), "predict", 0), state.seed)
    assert (state.position, step.position, after.position) == (0, 2, 3)


def outcome(row: int, *, reasoning: str | None = None, preamble: str = "", unparsed: bool = False) -> RowOutcome:
    written = {} if reasoning is None else {"reasoning": reasoning}
    return RowOutcome(row, 0.0, {"question": "?"}, written, 1.0, preamble=preamble, unparsed=unparsed)


@pytest.mark.parametrize(
    ("rows", "saturates"),
    [
        ([outcome(0, reasoning=""), outcome(1)], True),  # a field for it, though nothing is in it
        ([outcome(0), outcome(1)], False),
        ([outcome(0, preamble="Hm. "), outcome(1, preamble="Well. "), outcome(2)], True),
        ([outcome(0, preamble="Hm. "), outcome(1), outcome(2)], False),  # one that talks does not make it reason
        ([outcome(0, reasoning="One.", unparsed=True)], False),  # the answer's field has to be found first
    ],
)
def test_answers_count_as_doubt_where_the_seed_reasons_and_as_nats_where_it_does_not(
    rows: list[RowOutcome], saturates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    original = default_step.forecast

    def noted(*arguments: Any, **options: Any) -> Any:
        asked.append(options["saturates"])
        return original(*arguments, **options)

    monkeypatch.setattr(default_step, "forecast", noted)
    objective, state, settings = searching(selections=1, positions_ahead=1)
    step_of(objective, replace(state, seed=replace(state.seed, rows=tuple(rows))), settings)
    assert set(asked) == {saturates}


@pytest.mark.parametrize(("now", "scale"), [(0.0, 0.5), (0.05, 0.75), (0.1, 1.0), (0.5, 1.0), (-0.5, 0.5)])
def test_the_baseline_rises_to_the_mean_mistake_once_the_seed_is_outdone(now: float, scale: float) -> None:
    _, state, settings = searching()
    seed = replace(state.seed, score=0.0)
    assert baseline_scale(settings, seed, replace(seed, score=now)) == pytest.approx(scale)


def test_a_seed_that_is_always_right_leaves_nothing_to_hope_for() -> None:
    _, state, settings = searching()
    seed = replace(state.seed, score=1.0)
    assert baseline_scale(settings, seed, seed) == 1.0


def test_without_forecasts_the_best_slopes_of_each_kind_are_tried() -> None:
    step = stepped(forecasts=0)
    assert all(each.forecast is None for each in step.candidates)
    assert kinds(tried(step)) == {"replace": 1, "insert": 1, "delete": 1}


def proven(count: int, *, sign: float = 1.0) -> tuple[Any, ...]:
    """Predictions that all came true, or with sign -1 all the other way round."""
    return tuple((float(n), (sign * n, 0.0)) for n in range(count))


@pytest.mark.slow
def test_once_forecasts_have_proven_themselves_only_what_promises_something_is_tried() -> None:
    objective, state, settings = searching(instruction="count it now.", selections=5)
    passed = [each for each in step_of(objective, state, settings).candidates if each.forecast is not None]
    promising = [each for each in passed if each.forecast < 0]
    assert len(promising) < 5
    for predictions, expected in [
        (proven(8), 5),
        (proven(9), max(1, len(promising))),
        (proven(12, sign=-1.0), 5),
        ((*proven(8), (9.0, (1.0, math.nan))), 5),  # what could not be measured proves nothing
    ]:
        objective, state, settings = searching(instruction="count it now.", selections=5)
        step = step_of(objective, replace(state, predictions=predictions), settings)
        assert len(tried(step)) == expected
        assert min(each.forecast for each in passed) in [each.forecast for each in tried(step)]


@pytest.mark.slow
def test_while_forecasts_do_not_come_true_some_steps_try_an_edit_by_chance() -> None:
    def by_chance(predictions: Any, step: int, **knobs: Any) -> bool:
        objective, state, settings = searching(selections=1, **knobs)
        taken = step_of(objective, replace(state, predictions=predictions, step=step), settings)
        assert len(tried(taken)) == 1
        told = [each.gradient is not None or each.forecast is not None for each in taken.candidates]
        assert any(told) or taken.spent["backward_tokens"] == 0
        return not any(told)

    wrong, right = proven(6, sign=-1.0), proven(6)
    drawn = [step_random(0, "predict", step).random() for step in range(8)]
    chance = [step for step in range(8) if drawn[step] < 0.5]
    assert 2 < len(chance) < 6
    assert [step for step in range(8) if by_chance(wrong, step)] == chance
    first = chance[0]
    assert not by_chance(wrong[:5], first)  # too few to tell
    assert not by_chance(right, first)
    assert not by_chance((*proven(30, sign=-1.0), *proven(12)), first)  # trust is regained
    assert by_chance((*proven(30), *proven(12, sign=-1.0)), first)  # and lost again
    assert by_chance(tuple((float(n), (0.0, 0.0)) for n in range(6)), first)  # nothing changed at all
    assert not by_chance(wrong, first, explore_every=0)
    assert [step for step in range(8) if by_chance(wrong, step, explore_every=4)] == [
        step for step in chance if drawn[step] < 0.25
    ]


def test_chance_tries_as_many_as_were_asked_for() -> None:
    objective, state, settings = searching(selections=3)
    predictions = (*proven(48), *proven(12, sign=-1.0))  # trusted over all, and doubted of late
    step = next(step for step in range(9) if step_random(0, "predict", step).random() < 0.5)
    assert len(tried(step_of(objective, replace(state, predictions=predictions, step=step), settings))) == 3


def test_chance_and_forecasts_do_not_take_turns_in_a_fixed_order() -> None:
    by_chance = {step % 4 for step in range(40) if step_random(0, "predict", step).random() < 0.5}
    forecasting = {step % 4 for step in range(40) if step_random(0, "predict", step).random() >= 0.5}
    assert by_chance == forecasting == {0, 1, 2, 3}


@pytest.mark.slow
def test_chance_differs_from_step_to_step_and_with_the_seed() -> None:
    picked: list[str] = []
    for step, seed in itertools.product(range(8), (0, 1)):
        objective, state, settings = searching(selections=1)
        doubted = replace(state, predictions=proven(6, sign=-1.0), step=step)
        taken = step_of(objective, doubted, settings, seed=seed)
        picked += [each.text + each.edit for each in tried(taken) if each.forecast is None]
    assert len(picked) > 4 and len(set(picked)) > 3


def test_nothing_that_was_tried_is_tried_again() -> None:
    objective, state, settings = searching()
    seen: list[str] = []
    for _ in range(3):
        step = step_of(objective, state, settings)
        seen += [each.evaluation.instruction for each in tried(step)]
    assert len(seen) == len(set(seen)) == 9


def test_with_no_reasoning_at_hand_the_likeliest_edits_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, state, settings = searching()
    monkeypatch.setattr(objective, "replay", lambda *args: [])
    step = step_of(objective, state, settings)
    assert all(each.gradient is None and each.forecast is None for each in step.candidates)
    assert kinds(tried(step)) == {"replace": 1, "insert": 1, "delete": 1}
    assert step.predictions == ()


def test_with_nothing_to_try_the_step_keeps_the_instruction_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_step, "propose_edits", lambda *args, **options: ())
    step = stepped()
    assert (step.candidates, step.chosen.instruction) == ((), SEED)
    assert step.reason == "kept the token: nothing to try at this position"


# --- what a step costs ---


class Counting:
    """Counts the passes of a step and the sequences in them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gradients: list[int] = []
        self.scorings: list[int] = []
        for name, sizes in (("score_gradient", self.gradients), ("likelihoods", self.scorings)):
            original = getattr(default_step, name)

            def counted(
                model: Any, reasonings: Any, *more: Any, _original: Any = original, _sizes: Any = sizes, **options: Any
            ) -> Any:
                _sizes.append(len(getattr(reasonings, "reasonings", reasonings)))
                return _original(model, reasonings, *more, **options)

            monkeypatch.setattr(default_step, name, counted)


@pytest.mark.parametrize(("forecasts", "ahead", "positions"), [(6, 1, 1), (2, 1, 1), (2, 3, 3), (0, 3, 1)])
def test_a_position_costs_two_gradients_and_a_forward_pass_for_each_forecasts_and_a_step_one_for_the_current(
    monkeypatch: pytest.MonkeyPatch, forecasts: int, ahead: int, positions: int
) -> None:
    knobs: dict[str, Any] = {"forecasts": forecasts, "positions_ahead": ahead, "selections": 2, "replayed": 5}
    objective, state, settings = searching(rows=ROWS[:8], **knobs)
    counting = Counting(monkeypatch)
    step = step_of(objective, state, settings)
    assert counting.gradients == [5, 5] * positions
    assert counting.scorings == [5] * (forecasts * positions + 1 if forecasts else 0)
    assert step.spent["backward_tokens"] > 0
    assert step.spent["runs"] == 2 * 8


def test_nothing_is_generated_for_the_current_instruction() -> None:
    engine = Fickle()
    objective, state, settings = searching(engine, rows=ROWS[:8])
    engine.prompts.clear()
    step = step_of(objective, state, settings)
    asked = {instruction_in(prompt) for prompt in engine.prompts}
    assert asked == {each.evaluation.instruction for each in tried(step)} and SEED not in asked
    assert step.spent["runs"] == 3 * 8


def test_replaying_generates_nothing_and_runs_no_model() -> None:
    objective, state, settings = searching()
    before = objective.engine.counters
    assert len(objective.replay(state.current, random.Random(0), settings.replayed)) == 4
    assert objective.engine.counters == before


def test_appending_costs_no_run_of_its_own() -> None:
    objective, state, settings = searching(instruction="count")
    step = step_of(objective, replace(state, position=1), settings)
    assert (step.position, step.current_token) == (1, -1)
    assert {each.edit for each in step.candidates} == {"insert"}
    assert step.spent["runs"] == 3 * len(FEW)


def test_random_choices_cost_proposals_and_scoring_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, state, settings = searching()
    counting = Counting(monkeypatch)
    step = step_of(objective, state, settings, step=CHANCE)
    assert counting.gradients == counting.scorings == []
    assert step.spent["backward_tokens"] == 0
    assert all(each.gradient is None and each.forecast is None for each in step.candidates)
    assert len(tried(step)) == 3 and step.predictions == ()
    again = step_of(*searching(), step=CHANCE)
    assert bits(again.candidates) == bits(step.candidates)


# --- the record ---


def test_each_tried_candidate_tells_what_was_predicted_and_what_came_of_it() -> None:
    objective, state, settings = searching(rows=ROWS[:8])
    step = step_of(objective, state, settings)
    for each in step.candidates:
        assert (each.realised is None) == (each.evaluation is None)
        assert (each.forecast is None) == (each.effective_samples is None)
        assert (each.gradient is None) == (each.edit == "delete")
        if each.evaluation is not None:
            assert each.realised == realised_change(state.current, each.evaluation)
    assert step.predictions == tuple((each.forecast, each.realised) for each in tried(step))


def test_fidelity_is_the_rank_correlation_of_the_record() -> None:
    row = Evaluation((1,), "x", (), 0.5, 0.5, 0.5, (0.5, 0.5))

    def step(*pairs: tuple[float | None, float | None, tuple[float, float] | None]) -> StepTaken:
        candidates = tuple(
            Candidate(1, "x", -1.0, slope, None, forecast=forecast, realised=came) for slope, forecast, came in pairs
        )
        return StepTaken("predict", 0, 0, 1, candidates, row, "", {})

    first = step((9.0, 0.1, (0.0, 1.0)), (9.0, 0.2, (0.0, 2.0)), (9.0, 0.3, (-1.0, 9.0)), (0.5, None, None))
    second = step((0.4, None, (0.5, 0.0)), (9.0, 0.5, (0.5, math.nan)), (None, None, (1.0, 1.0)))
    result = PredictorResult("predict", "answer", row, (first, second), (), {"x": 1.0}, "x", {}, {}, {})
    assert first.predictions == ((0.1, (0.0, 1.0)), (0.2, (0.0, 2.0)), (0.3, (-1.0, 9.0)))
    assert second.predictions == ((0.4, (0.5, 0.0)), (0.5, (0.5, math.nan)))
    # Ranks 0 1 2 against 1 2 0: covariance -1 over a variance of 2. With 0.4, ranks 0 1 2 3 against 1 2 0 3: 2 over 5.
    assert result.fidelity_by_step[0] == pytest.approx(-0.5)
    assert math.isnan(result.fidelity_by_step[1])
    assert result.fidelity == pytest.approx(0.4)


# --- the same again ---


def recorded(objective: Evaluator, state: SearchState, settings: Settings, steps: Sequence[StepTaken] = ()) -> Any:
    return list(minimise(Search(objective, settings, DefaultStep(), "predict", 0), state.seed, recorded=steps))


def same(one: Sequence[Reasoning], other: Sequence[Reasoning]) -> bool:
    return bits(tuple(one)) == bits(tuple(other))


@pytest.mark.slow
@pytest.mark.parametrize("through_json", [False, True])
def test_what_is_replayed_does_not_depend_on_whether_it_was_evaluated_or_recalled(through_json: bool) -> None:
    knobs = {"steps": 3, "finalists": 1, "rows": ROWS}
    first = searching(Fickle(), **knobs)
    history = recorded(*first)
    steps = [step for _, step, _ in history]
    if through_json:
        steps = [from_json(json.loads(json.dumps(to_json(step)))) for step in steps]
    second = searching(Fickle(), **knobs)
    again = recorded(*second, steps)
    assert not any(taken for *_, taken in again)
    assert [bits(state) for state, *_ in again] == [bits(state) for state, *_ in history]
    current = history[-1][0].current
    for limit in (5, 100):
        one, other = (each[0].replay(current, random.Random(7), limit) for each in (first, second))
        assert len(one) == min(limit, 24) and same(one, other)
    one, other = (step_of(each[0], replace(history[-1][0], step=3), each[2]) for each in (first, second))
    assert bits(one.candidates) == bits(other.candidates)


def test_reasonings_that_do_not_fit_the_context_are_shortened_alike_whatever_was_laid_out_before() -> None:
    def long(prompt: str) -> str:
        return chat_answer(reasoning="and so on " * 300, answer="yes")

    objective, _, _ = searching(Fickle(long))
    limit = objective.engine.context_length
    texts = ("Please say it now.", "Please look here and say it now, always.", "Say it.")
    found = {}
    for text in texts:
        found[text] = replayed_under(objective, text)
        assert found[text] and all(len(each.token_ids) <= limit for run in found[text] for each in run.sequences)
    for text in texts:
        fresh, _, _ = searching(Fickle(long))
        assert same(found[text], replayed_under(fresh, text))


def replayed_under(objective: Evaluator, text: str) -> list[Reasoning]:
    """The seed's runs, laid out under another instruction."""
    [seed] = objective.evaluate([objective.seed()])
    moved = replace(seed, instruction=text, token_ids=objective.layout.edits.instruction_ids(text))
    return objective.replay(moved, random.Random(0), 100)


def test_reasonings_are_laid_out_as_the_instruction_would_be_sent() -> None:
    objective, _, _ = searching()
    for text in ("Please count.", "Look here now, please."):
        ids = objective.layout.edits.instruction_ids(text)
        for run in replayed_under(objective, text):
            for each in run.sequences:
                assert each.token_ids[each.instruction.start : each.instruction.stop] == ids
                row = FEW[run.example]
                prompt = objective.layout.prompt(text, {"question": row.question}).token_ids
                assert each.token_ids[: len(prompt)] == prompt


# --- moving on ---


@pytest.mark.slow
def test_a_search_that_walks_moves_to_what_it_tried_though_it_be_worse_and_returns_the_best() -> None:
    details = compiled(Fickle(), steps=8, train_rows=8, validation_rows=4).detailed_results
    before = [details.predictors[0].seed, *(step.chosen for step in details.steps)]
    moves = list(itertools.pairwise(each.objective for each in before))
    assert any(after > now for now, after in moves), "no step made it worse, so this test shows nothing"
    evaluated = [each.evaluation for step in details.steps for each in tried(step)]
    best = min([details.predictors[0].seed, *evaluated], key=lambda each: each.objective)
    assert details.predictors[0].finalists[0].objective == best.objective


@pytest.mark.slow
def test_a_walk_that_leads_nowhere_comes_back_again_and_again_however_it_grows() -> None:
    only_seed = ScriptedEngine(
        lambda prompt: chat_answer(
            reasoning="I look.",
            answer=("yes" if "apples" in value_in(prompt) else "no") if instruction_in(prompt) == SEED else "never",
        ),
        model=planted_engine().model,
    )
    details = compiled(only_seed, steps=30, train_rows=4, validation_rows=4).detailed_results
    lengths = [len(step.chosen.token_ids) for step in details.steps]
    around = len(details.predictors[0].seed.token_ids)
    assert details.predictors[0].finalists[0].instruction == SEED
    assert around < max(lengths) <= around + 21  # at most one token more a step
    assert any(after <= around < before for before, after in itertools.pairwise(lengths))
