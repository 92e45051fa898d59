"""The figures of a result show its numbers; without matplotlib they say what to install."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from scripted_engine import optimizer, planted_engine, planted_rows, program_on

from dspy_greater.errors import GreaterError, MissingExtraError


@pytest.fixture(scope="module")
def details() -> Any:
    rows = planted_rows(24)
    settings = {"steps": 3, "selections": 3, "seed": 1}
    found = optimizer(**settings).compile(program_on(planted_engine()), rows[:4], valset=rows[8:12])
    return found.detailed_results


@pytest.mark.parametrize("name", ["plot_score", "plot_forecasts", "plot_cost"])
def test_without_matplotlib_the_error_says_what_to_install(
    details: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError) as caught:
        getattr(details, name)()
    assert isinstance(caught.value, GreaterError) and isinstance(caught.value, ImportError)
    assert str(caught.value).startswith(
        f"{name}() draws with matplotlib, which is not installed. Run `pip install 'dspy-greater[plots]'`."
    )


def test_score_and_loss_are_those_of_the_steps(details: Any) -> None:
    pytest.importorskip("matplotlib")
    figure = details.plot_score()
    path = [details.predictors[0].seed, *(step.chosen for step in details.steps)]
    for panel, values in zip(
        figure.axes, ([each.score for each in path], [each.cross_entropy for each in path]), strict=True
    ):
        assert list(panel.lines[0].get_ydata()) == values and panel.get_title(loc="left") == "predict"
    assert [panel.get_ylabel() for panel in figure.axes] == ["score", "loss, nats"]


def test_forecasts_are_drawn_against_what_came(details: Any) -> None:
    pytest.importorskip("matplotlib")
    [panel] = details.plot_forecasts().axes
    drawn = sorted(tuple(map(float, point)) for each in panel.collections for point in each.get_offsets())
    told = sorted((told, came[0]) for step in details.steps for told, came in step.predictions)
    assert drawn == told and told


def test_costs_are_those_of_the_phases(details: Any) -> None:
    pytest.importorskip("matplotlib")
    [panel] = details.plot_cost().axes
    names = ("prefilled_tokens", "backward_tokens", "generated_tokens")
    widths = [int(bar.get_width()) for bar in panel.patches]
    assert widths == [spent.get(name, 0) for spent in details.spent_by_phase.values() for name in names]


def test_figures_leave_matplotlib_as_it_is_and_a_notebook_shows_them(details: Any) -> None:
    pytest.importorskip("matplotlib")
    before = "matplotlib.pyplot" in sys.modules
    assert details.plot_cost()._repr_png_().startswith(b"\x89PNG")
    assert ("matplotlib.pyplot" in sys.modules) == before
