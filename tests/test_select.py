"""Selection: the best candidate replaces the token only when it lowers the objective."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import settings as quickly
from hypothesis import strategies as st

from dspy_greater.objective.score import evaluation
from dspy_greater.objective.types import Evaluation, RowOutcome
from dspy_greater.search.select import realised_change, select

NAN, INF = math.nan, math.inf
quick = quickly(max_examples=60, deadline=None, derandomize=True)
numbers = st.one_of(st.floats(0, 3), st.sampled_from([NAN, INF, -INF]))


def row(score: float = 1.0, cross_entropy: float = 0.5) -> RowOutcome:
    return RowOutcome(0, score, {"question": "x"}, {}, cross_entropy)


def evaluated(*rows: RowOutcome, fluency: float = 1.0, text: str = "Add.", weight: float = 0.02) -> Evaluation:
    return evaluation((1, 2), text, rows, fluency, score_fluency_weight=weight)


def test_the_objective_is_the_mistake_rate_plus_a_little_fluency_then_the_cross_entropy() -> None:
    found = evaluated(row(1.0, 0.5), row(0.0, 1.5), fluency=3.0)
    assert found.objective == pytest.approx((0.5 + 0.06, 1.0))
    assert (found.score, found.cross_entropy, found.fluency_nll) == (0.5, 1.0, 3.0)


def test_a_graded_metric_counts_as_graded_mistakes() -> None:
    assert evaluated(row(0.25), row(0.5), fluency=0.0).objective[0] == pytest.approx(0.625)


def test_an_answer_that_was_not_found_is_worse_than_any_wrong_one() -> None:
    def objective(*rows: RowOutcome) -> float:
        return evaluation((1,), "Add.", rows, 0.0, score_fluency_weight=0.0, uncertainty_weight=0.3).objective[0]

    lost = replace(row(0.0, 0.0), unparsed=True)
    assert objective(row(0.0, 99.0)) == pytest.approx(1.3)
    assert objective(lost) == pytest.approx(1.3)
    assert objective(lost) < objective(replace(row(0.0, 0.1), unparsed=True)) < 1.6
    assert objective(lost, row(1.0, 0.0)) == pytest.approx(0.65)


def test_a_row_without_a_finite_loss_still_counts_as_a_mistake_but_not_in_the_cross_entropy() -> None:
    found = evaluated(row(1.0, 0.5), row(0.0, NAN))
    assert (found.score, found.cross_entropy) == (0.5, 0.5)


@pytest.mark.parametrize(
    "bad",
    [evaluated(row(1.0, NAN)), evaluated(row(1.0, INF)), evaluated(row(), fluency=NAN), evaluated(row(NAN))],
)
def test_an_evaluation_that_is_not_a_number_is_infinitely_bad(bad: Evaluation) -> None:
    assert bad.objective == (INF, INF)


def test_a_candidate_that_is_not_a_number_is_never_chosen() -> None:
    worst = evaluated(row(0.0, 9.0), fluency=9.0, text="Worst.")
    bad = evaluated(row(1.0, NAN), text="Bad.")
    assert select(worst, [bad]).chosen is worst
    better = evaluated(row(0.5, 9.0), text="Better.")
    assert select(worst, [bad, better, bad]).chosen is better


def test_a_usable_candidate_replaces_a_current_instruction_that_is_not_a_number() -> None:
    bad, good = evaluated(row(1.0, NAN)), evaluated(row(0.0, 9.0), text="Good.")
    assert select(bad, [good]).chosen is good


def test_the_lowest_objective_wins_and_the_reason_gives_the_numbers() -> None:
    current = evaluated(row(0.0, 1.0))
    better, best = evaluated(row(0.5, 1.0), text="Better."), evaluated(row(1.0, 1.0), text="Best.")
    found = select(current, [better, best])
    assert found.chosen is best
    assert found.reason == "objective 1.0200 -> 0.0200 (gain 1.0000), score 1.000"


def test_the_cross_entropy_breaks_a_tie_of_the_first_number() -> None:
    current, better = evaluated(row(1.0, 0.5)), evaluated(row(1.0, 0.4), text="Better.")
    assert select(current, [better]).chosen is better


def test_a_tie_keeps_the_current_instruction() -> None:
    current, same = evaluated(row(1.0, 0.5)), evaluated(row(1.0, 0.5), text="Same.")
    found = select(current, [same])
    assert found.chosen is current
    assert found.reason == "kept the token: the best of 1 did not lower the objective"


def test_a_current_instruction_that_was_not_selected_gives_way_though_all_that_were_be_worse() -> None:
    current = evaluated(row(1.0, 0.5))
    bad, worse = evaluated(row(1.0, NAN), text="Bad."), evaluated(row(0.0, 1.0), text="Worse.")
    less = evaluated(row(0.5, 1.0), text="Less so.")
    found = select(current, [bad, worse, less], stays=False)
    assert found.chosen is less
    assert found.reason == "the best of 2 selected: objective 0.0200 -> 0.5200 (gain -0.5000), score 0.500"
    assert select(current, [bad], stays=False).chosen is current
    assert select(current, [], stays=False).chosen is current


def test_of_equal_candidates_the_one_that_the_gradient_preferred_wins() -> None:
    current = evaluated(row(0.0))
    first, second = evaluated(row(1.0), text="First."), evaluated(row(1.0), text="Second.")
    assert select(current, [first, second]).chosen is first


def test_the_reason_says_why_nothing_could_be_chosen() -> None:
    current = evaluated(row())
    assert select(current, []).reason == "kept the token: nothing to try at this position"
    bad = evaluated(row(1.0, NAN))
    assert select(current, [bad]).reason == "kept the token: no candidate had a finite loss"


@given(st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=5))
@quick
def test_what_is_chosen_is_never_worse_and_never_not_a_number(
    values: list[tuple[float, float, float]],
) -> None:
    first, *rest = [
        evaluated(row(score, loss), fluency=fluency, text=f"{index}.")
        for index, (score, loss, fluency) in enumerate(values)
    ]
    chosen = select(first, rest).chosen
    assert chosen.objective <= first.objective
    assert not any(math.isnan(part) for part in chosen.objective)
    assert chosen.objective == min(each.objective for each in [first, *rest])


# --- how uncertain the gold answer is ---


def scored(*scores: float, text: str = "Add.", losses: tuple[float, ...] | None = None, **how: float) -> Evaluation:
    """An instruction with these scores row by row, without fluency."""
    losses = losses or (0.5,) * len(scores)
    rows = [RowOutcome(n, score, {"question": "x"}, {}, losses[n]) for n, score in enumerate(scores)]
    return evaluation((1, 2), text, rows, 0.0, score_fluency_weight=0.0, **how)


def test_uncertainty_is_the_chance_of_another_answer_and_at_most_its_weight() -> None:
    found = scored(1, 0, losses=(math.log(2), math.log(4)), uncertainty_weight=0.4)
    assert found.objective == pytest.approx((0.5 + 0.4 * (0.5 + 0.75) / 2, math.log(8) / 2))
    assert scored(1, 1, losses=(900.0, 900.0), uncertainty_weight=0.3).objective[0] == pytest.approx(0.3)


def test_a_row_without_a_finite_loss_has_no_part_in_the_uncertainty() -> None:
    assert scored(1, 1, losses=(math.log(2), NAN), uncertainty_weight=0.4).objective[0] == pytest.approx(0.2)


# --- what came of a candidate ---


def test_the_realised_change_is_taken_over_the_rows_that_both_were_run_on() -> None:
    before = scored(0, 1, 1, 0, losses=(2.0, 1.0, NAN, 3.0))
    after = scored(1, 1, 0, 0, losses=(1.0, 1.5, 1.0, 3.0))
    assert realised_change(before, after) == pytest.approx((0.0, (-1.0 + 0.5 + 0.0) / 3))
    mistakes, loss = realised_change(before, scored(0, 0, losses=(NAN, NAN)))
    assert mistakes == 0.5 and math.isnan(loss)
    assert all(map(math.isnan, realised_change(before, scored())))
