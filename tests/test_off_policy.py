"""Off-policy estimates: likelihoods against one plain forward pass each, forecasts against their formula."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from dspy_greater.errors import LayoutError, SettingsError
from dspy_greater.estimators.off_policy import Forecast, Likelihood, forecast, likelihoods
from dspy_greater.estimators.score_gradient import score_gradient
from dspy_greater.model.engine import Engine
from dspy_greater.objective.replay import ReasonedSequence, Reasoning, Replay, advantages
from dspy_greater.prompt.spans import Span
from tests.test_score_gradient import KINDS, POSITION, engine_for, reasonings
from tests.tiny_models import InDouble, tiny_model


def runs(alike: int = 0) -> list[Reasoning]:
    """One for each sequence."""
    return [Reasoning(row, 1.0, 1.0, (each,)) for row, each in enumerate(sequences(alike))]


def sequences(alike: int = 0) -> list[ReasonedSequence]:
    return [call for run in reasonings(alike=alike) for call in run.sequences]


def obvious(model: Any, sequence: ReasonedSequence) -> Likelihood:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([sequence.token_ids])).logits[0].double()

    def nll(at: int, heat: float) -> float:
        return -(logits[at - 1] / heat).log_softmax(-1)[sequence.token_ids[at]].item()

    generated = -sum(nll(at, 1.0) for at in range(sequence.generated.start, sequence.generated.stop))
    if sequence.answer is None:
        return Likelihood(generated, None)
    places = range(sequence.answer.start, sequence.answer.stop)
    return Likelihood(generated, sum(nll(at, 0.2) for at in places) / len(places))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alike", [0, 40])
def test_likelihoods_equal_one_plain_forward_pass_for_each_sequence(kind: Any, alike: int) -> None:
    model = tiny_model(kind)
    found = likelihoods(engine_for(model), runs(alike))
    for one, other in zip(found, [obvious(model, each) for each in sequences(alike)], strict=True):
        assert one.generated == pytest.approx(other.generated, rel=1e-5)
        assert (one.answer is None) == (other.answer is None)
        assert (one.answer or 0.0) == pytest.approx(other.answer or 0.0, rel=1e-4)


def test_what_all_sequences_begin_with_is_read_once() -> None:
    engine = engine_for(tiny_model())
    likelihoods(engine, runs(alike=40))
    tokens = [len(each.token_ids) for each in sequences(alike=40)]
    assert engine.counters.prefilled_tokens <= sum(tokens) - 40 * (len(tokens) - 1)


def test_only_tokens_that_are_asked_about_reach_the_output_layer() -> None:
    engine = engine_for(tiny_model())
    likelihoods(engine, runs())
    asked = sum(len(each.generated) + (len(each.answer) if each.answer else 0) for each in sequences())
    assert engine.counters.lm_head_rows == asked


def test_another_instruction_is_put_in_token_by_token() -> None:
    sequence = sequences()[0]
    ids = (9, 8, 7, 6, 5, 10)
    longer = sequence.under(ids)
    start = sequence.instruction.start
    assert longer.token_ids[start : start + 6] == ids
    for name in ("generated", "answer"):
        before, after = getattr(sequence, name), getattr(longer, name)
        assert longer.token_ids[after.start : after.stop] == sequence.token_ids[before.start : before.stop]
    assert longer.under(sequence.token_ids[start : start + 4]) == sequence


def test_a_forecast_is_both_terms_with_exact_differences() -> None:
    now = [Likelihood(-2.0, 1.0), Likelihood(-5.0, 0.5), Likelihood(-1.0, None)]
    then = [Likelihood(-1.5, 0.75), Likelihood(-7.0, 0.25), Likelihood(-1.0, None)]
    found = forecast(now, then, [0.5, -0.25, 0.5], [1.0, 0.5, 0.5])
    first, second = 3 * math.tanh(0.5 / 3), 3 * math.tanh(-2.0 / 3)
    surer = [math.exp(-1.0) - math.exp(-0.75), math.exp(-0.5) - math.exp(-0.25)]  # D under c less D under p
    expected = (1.0 * (0.5 * first + surer[0]) + 0.5 * (-0.25 * second + surer[1]) + 0.0) / 2.0
    weights = [math.exp(first), 0.5 * math.exp(second), 0.5]
    assert found.change == pytest.approx(expected)
    assert found.effective_samples == pytest.approx(sum(weights) ** 2 / sum(weight**2 for weight in weights))


def test_a_gold_answer_that_stays_out_of_reach_saves_no_mistake() -> None:
    now, then = [Likelihood(-2.0, 20.0)], [Likelihood(-2.0, 13.0)]  # a thousand times likelier, and still impossible
    assert forecast(now, then, [0.5], [1.0]).change == pytest.approx(0.0, abs=1e-5)
    assert forecast(now, then, [0.5], [1.0], saturates=False).change == -7.0


def test_an_instruction_forecasts_no_change_for_itself() -> None:
    now = likelihoods(engine_for(tiny_model()), runs())
    found = forecast(now, now, [0.3 * run for run in range(len(now))], [1.0] * len(now))
    assert found == Forecast(0.0, float(len(now)))


@pytest.mark.parametrize("answer_weight", [0.0, 1.0])
def test_for_a_small_change_of_the_embedding_the_forecast_is_the_score_gradient(answer_weight: float) -> None:
    model, near = tiny_model(dtype=torch.float64), 200
    alike = reasonings()
    current = alike[0].sequences[0].token_ids[alike[0].sequences[0].instruction.start + POSITION]
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[near] = weight[current] + 1e-5 * weight[17]
        # An output layer of its own: as a target the token stays what it is.
        model.lm_head.weight = torch.nn.Parameter(weight.clone())
    engine = engine_for(model)

    def under(token: int) -> list[Likelihood]:
        ids = list(alike[0].sequences[0].token_ids[1:5])
        ids[POSITION] = token
        return likelihoods(engine, [run.under(ids) for run in alike])

    against, shares = advantages(alike), [run.share for run in alike]
    with InDouble():
        slopes = score_gradient(
            engine,
            Replay(alike, against),
            position=POSITION,
            candidates=[near, current],
            answer_weight=answer_weight,
            value=engine.embed([current]),
        )
        found = forecast(under(current), under(near), against, shares, answer_weight=answer_weight, saturates=False)
    assert found.change == pytest.approx(slopes[0] - slopes[1], rel=1e-3)


def test_a_reasoning_whose_numbers_are_not_finite_takes_no_part() -> None:
    now = [Likelihood(-2.0, None), Likelihood(math.nan, None)]
    then = [Likelihood(-1.0, None), Likelihood(-1.0, None)]
    assert forecast(now, then, [1.0, 1.0], [1.0, 1.0]).change == pytest.approx(3 * math.tanh(1 / 3))
    nothing = forecast(now[1:], then[1:], [1.0], [1.0])
    assert math.isnan(nothing.change)
    assert nothing.effective_samples == 0.0


def test_calls_of_one_run_add_up() -> None:
    parts = [Likelihood(-1.0, 0.2), Likelihood(-2.0, 0.4), Likelihood(-0.5, None)]
    together = Likelihood.together(parts)
    assert together.generated == -3.5
    assert together.answer == pytest.approx(0.3)


def test_runs_of_several_calls_are_told_apart() -> None:
    engine = engine_for(tiny_model())
    parts, together = iter(likelihoods(engine, runs())), likelihoods(engine, reasonings())
    for run, found in zip(reasonings(), together, strict=True):
        expected = Likelihood.together([next(parts) for _ in run.sequences])
        assert found.generated == pytest.approx(expected.generated)
        assert (found.answer or 0.0) == pytest.approx(expected.answer or 0.0)


def test_what_cannot_work_is_refused_with_a_remedy() -> None:
    engine: Engine = engine_for(tiny_model())
    sequence = sequences()[0]

    def run(*calls: ReasonedSequence) -> list[Reasoning]:
        return [Reasoning(0, 1.0, 1.0, calls)]

    with pytest.raises(LayoutError, match=r"Sequence 1: the answer span \[3, 3\) does not fit"):
        likelihoods(engine, run(sequence, replace(sequence, answer=Span(3, 3))))
    with pytest.raises(LayoutError, match=r"the generated span \[0, 3\) .* needs a token before it"):
        likelihoods(engine, run(replace(sequence, generated=Span(0, 3))))
    with pytest.raises(SettingsError, match="answer_temperature is 0; give a number above 0"):
        likelihoods(engine, run(sequence), answer_temperature=0)
    assert likelihoods(engine, []) == []
