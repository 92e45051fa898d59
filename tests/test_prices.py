"""Looking ahead costs at most what the runs cost that it is made for, counted in tokens and not by a clock."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripted_engine import exact_match, planted_engine, planted_rows, program_on

from dspy_greater import GReaTerTeleprompter
from dspy_greater.errors import SettingsError
from dspy_greater.objective.replay import Reasoning, Replay
from dspy_greater.run.events import StepTaken
from dspy_greater.search.default_step import race
from dspy_greater.search.prices import Glance, glance, write_price
from dspy_greater.settings import Settings

ROWS = planted_rows(12)


def at_step(runs: Sequence[tuple[int, int]], *, device: str = "cpu", **knobs: Any) -> Any:
    """A step whose current instruction ran on rows with prompts and answers of these lengths."""
    generated = [(tuple(range(100 * row, 100 * row + read)), (7,) * wrote) for row, (read, wrote) in enumerate(runs)]
    engine = SimpleNamespace(weights=SimpleNamespace(device=torch.device(device)))
    evaluator = SimpleNamespace(generated=lambda current: generated, engine=engine)
    return SimpleNamespace(evaluator=evaluator, settings=Settings(**knobs), current=None)


def readings(seen: Glance) -> float:
    """What it costs at most, candidate for candidate, in reasonings read."""
    rounds, before, forecasts = seen.rounds(seen.candidates), 0, 0
    for kept, count in rounds:
        forecasts += kept * (count - before)
        before = count
    slopes = 2 * 3 * seen.reasonings if seen.slopes else 0
    return seen.positions * (slopes + forecasts) + seen.reasonings


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=2, max_size=60),
    st.integers(1, 3),
    st.sampled_from(["cpu", "cuda"]),
)
def test_it_costs_at_most_the_price_of_the_runs_unless_four_reasonings_do_already(
    runs: list[tuple[int, int]], selections: int, device: str
) -> None:
    at = at_step(runs, device=device)
    seen, price = glance(at, selections), 4.0 if device == "cpu" else 32.0
    paid = selections * sum(read + price * wrote for read, wrote in runs) / (sum(map(sum, runs)) / len(runs))
    least = Glance(1, 2, 4, races=True, slopes=False, selections=selections)
    assert seen == least or readings(seen) <= paid


def test_where_writing_is_dear_it_looks_further() -> None:
    runs = [(40, 20)] * 24
    on_cpu, on_gpu = glance(at_step(runs), 1), glance(at_step(runs, device="cuda"), 1)
    assert on_gpu.positions > on_cpu.positions == 1
    assert on_gpu.positions * on_gpu.candidates * on_gpu.reasonings > 4 * on_cpu.candidates * on_cpu.reasonings


def test_where_a_gradient_is_too_dear_for_what_runs_cost_likelier_edits_are_forecast_without_one() -> None:
    runs = [(75, 25)] * 40
    cheap, dear = (glance(at_step(runs, write_price=price), 1) for price in (0.5, 1.6))  # 35 readings, and 46
    assert dear == Glance(1, 6, 4, races=True) and cheap == Glance(1, 6, 8, races=True, slopes=False)
    assert glance(at_step(runs[:15], write_price=1.0), 1) == Glance(1, 3, 4, races=True, slopes=False)
    assert glance(at_step(runs, write_price=0.5, forecasts=1), 1) == Glance(1, 1, 4, races=True)
    least = glance(at_step(runs, write_price=0.1, forecasts=1), 1)  # 31, and a gradient with a forecast is 32
    assert least == Glance(1, 1, 15, races=True, slopes=False)


def test_where_nothing_is_forecast_all_is_spent_on_the_gradient_of_one_position() -> None:
    runs = [(75, 25)] * 40
    seen = glance(at_step(runs, write_price=1.0, forecasts=0), 1)  # 40 readings, seven for each reasoning
    assert seen == Glance(1, 0, 5, races=True)
    assert seen == glance(at_step(runs, write_price=1.0, forecasts=0, positions_ahead=1), 1)


@pytest.mark.parametrize("replayed", [1, 3])
def test_who_asks_for_fewer_than_four_reasonings_has_all_that_they_pay_for(replayed: int) -> None:
    seen = glance(at_step([(75, 25)] * 40, write_price=1.0, replayed=replayed), 1)  # 40 readings
    expected = {1: Glance(3, 6, 1, races=False), 3: Glance(1, 6, 3, races=True)}
    assert seen == expected[replayed] and readings(seen) <= 40


def test_without_a_bound_it_looks_as_far_as_the_settings_say() -> None:
    at = at_step([(40, 20)] * 24, forecast_share=0)
    assert glance(at, 1) == Glance(3, 6, 24, races=False)
    assert glance(at_step([(40, 20)] * 24, forecast_share=1000.0), 1) == Glance(3, 6, 24, races=False)


def test_a_price_that_is_set_counts_instead_of_the_devices() -> None:
    engine = planted_engine()
    assert write_price(engine, Settings()) == 4.0
    assert write_price(engine, Settings(write_price=9.0)) == 9.0
    with pytest.raises(SettingsError, match=r"write_price=0: give a positive number, or None for the device's"):
        Settings(write_price=0)


@given(st.integers(1, 30), st.integers(4, 40), st.integers(1, 6))
def test_rounds_keep_fewer_candidates_but_all_that_will_be_tried_and_read_more_reasonings(
    candidates: int, reasonings: int, selections: int
) -> None:
    rounds = Glance(1, candidates, reasonings, races=True, selections=selections).rounds(candidates)
    kept, read = [each for each, _ in rounds], [each for _, each in rounds]
    assert kept == sorted(kept, reverse=True) and kept[0] == candidates and kept[-1] >= min(candidates, selections)
    assert read == sorted(read) and read[-1] == reasonings


def test_who_leads_after_a_round_goes_on_and_the_last_round_is_what_is_told() -> None:
    changes = {"a": [-3.0, 2.0], "b": [-2.0, -1.0], "c": [-1.0, -9.0], "d": [0.0, 0.0]}
    asked: list[tuple[str, int]] = []

    def forecaster(at: Any, replay: Replay, edits: Any) -> Any:
        count = len(replay.reasonings)
        texts = [each.instruction.text for each in edits]
        asked.extend((text, count) for text in texts)
        return {text: SimpleNamespace(change=changes[text][count > 2]) for text in texts}

    edits: Any = [SimpleNamespace(instruction=SimpleNamespace(text=text)) for text in changes]
    replay = Replay((Reasoning(0, 1.0, 1.0, ()),) * 4, (0.5,) * 4)
    told = race(forecaster, at_step([(1, 1)]), replay, edits, ((4, 2), (2, 4)))
    assert asked == [("a", 2), ("b", 2), ("c", 2), ("d", 2), ("a", 4), ("b", 4)]
    assert {text: each.change for text, each in told.items()} == {"a": 2.0, "b": -1.0}


def search(**knobs: Any) -> list[StepTaken]:
    settings = {"auto": None, "steps": 3, "train_rows": 8, "validation_rows": 4, "progress": False, "written": 0}
    optimizer = GReaTerTeleprompter(exact_match, **{**settings, **knobs})
    result = optimizer.compile(program_on(planted_engine()), ROWS[:8], valset=ROWS[8:])
    return list(result.detailed_results.predictors[0].steps)


@pytest.mark.slow
def test_a_search_within_its_share_reads_and_differentiates_less_and_says_so_in_its_counts() -> None:
    bounded, free = search(), search(forecast_share=0)
    for name in ("prefilled_tokens", "backward_tokens"):
        assert sum(step.spent[name] for step in bounded) < 0.7 * sum(step.spent[name] for step in free)
    assert all(any(each.forecast is not None for each in step.candidates) for step in bounded)


@pytest.mark.slow
def test_the_same_search_comes_again_and_another_price_is_another_run(tmp_path: Any) -> None:
    told = [[each.forecast for step in search() for each in step.candidates] for _ in range(2)]
    assert told[0] == told[1]
    search(log_dir=tmp_path)
    with pytest.raises(OSError, match="write_price"):
        search(log_dir=tmp_path, write_price=9.0)
