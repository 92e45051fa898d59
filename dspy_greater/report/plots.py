"""The figures of a report for notebooks and papers, drawn by matplotlib (the extra `plots`)."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

from dspy_greater.errors import MissingExtraError
from dspy_greater.report.figures import COSTS, Fidelity, Progress, cost, fidelity, progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NEW, _OLD, _SOFT = "#0b5cad", "#9a3c00", "#59616b"
_PHASES = ("#9db4cc", "#0b5cad", "#d98032")
_WIDTH, _HEIGHT = 6.4, 3.2  # inches, of one panel


class Plotted:
    """The figures of a result: each method returns a `matplotlib.figure.Figure`, which a notebook shows.

    No state of matplotlib's is touched, neither its backend nor its current figure.
    """

    predictors: tuple[Any, ...]

    def plot_score(self) -> Figure:
        """Score and loss of the current instruction on the training rows over the steps; a ring: an accepted edit.

        Raises:
            MissingExtraError: matplotlib is not installed.

        ```python
        better.detailed_results.plot_score().savefig("score.png")
        ```
        """
        found = [progress(predictor.name, predictor.seed, predictor.steps) for predictor in self.predictors]
        figure, panels = _panels("plot_score", len(found), 2)
        for drawn, (scores, losses) in zip(found, panels, strict=True):
            _over_steps(scores, drawn, drawn.scores, "score")
            _over_steps(losses, drawn, drawn.losses, "loss, nats")
        return figure

    def plot_forecasts(self) -> Figure:
        """Each tried candidate: its forecast against the change of the mistake rate that came.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        found = [fidelity(predictor.name, predictor.steps) for predictor in self.predictors]
        figure, panels = _panels("plot_forecasts", len(found), 1)
        for drawn, (panel,) in zip(found, panels, strict=True):
            _forecasts(panel, drawn)
        return figure

    def plot_cost(self) -> Figure:
        """Tokens read, differentiated and written, by phase, of each predictor.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        found = [(predictor.name, cost(predictor.spent_by_phase)) for predictor in self.predictors]
        figure, panels = _panels("plot_cost", len(found), 1)
        for (name, counted), (panel,) in zip(found, panels, strict=True):
            left = [0.0] * len(COSTS)
            for place, phase in enumerate(counted.phases):
                widths = [counts[place] for counts in counted.tokens.values()]
                panel.barh(list(counted.tokens), widths, left=left, color=_PHASES[place % 3], label=phase, height=0.5)
                left = [before + width for before, width in zip(left, widths, strict=True)]
            panel.invert_yaxis()
            panel.set_xlabel("tokens")
            panel.set_title(_plain(name), loc="left")
            panel.legend(frameon=False)
        return figure


def _over_steps(panel: Axes, found: Progress, values: tuple[float, ...], named: str) -> None:
    panel.step(range(len(values)), values, where="post", color=_NEW)
    rings = [step for step in found.accepted if math.isfinite(values[step])]
    panel.plot(rings, [values[step] for step in rings], "o", color=_NEW, markerfacecolor="white", markersize=5)
    panel.set_xlabel("step")
    panel.set_ylabel(named)
    panel.set_title(_plain(found.name), loc="left")


def _forecasts(panel: Axes, found: Fidelity) -> None:
    for better, colour in ((True, _NEW), (False, _OLD)):
        points = [forecast for forecast in found.forecasts if (forecast.came < 0) is better]
        panel.scatter([point.told for point in points], [point.came for point in points], s=18, color=colour)
    panel.axhline(0, color=_SOFT, linewidth=0.8, linestyle=":")
    panel.axvline(0, color=_SOFT, linewidth=0.8, linestyle=":")
    panel.set_xlabel("forecast change")
    panel.set_ylabel("change of the mistake rate")
    rho = found.rank_correlation
    panel.set_title(f"{_plain(found.name)}: rank correlation {rho:.2f}" if math.isfinite(rho) else _plain(found.name))


def _plain(name: str) -> str:
    """A name that matplotlib does not read as mathematics."""
    return name.replace("$", r"\$")


def _panels(asked: str, rows: int, columns: int) -> tuple[Figure, list[list[Axes]]]:
    """An empty figure, and its panels row by row."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            f"{asked}() draws with matplotlib, which is not installed. Run `pip install 'dspy-greater[plots]'`. The "
            "same figures are in the report.html of a run with a log_dir, which needs nothing."
        ) from error

    class Shown(Figure):
        """A figure that a notebook shows without pyplot."""

        def _repr_png_(self) -> bytes:
            written = io.BytesIO()
            self.savefig(written, format="png", dpi=120)
            return written.getvalue()

    figure = Shown(figsize=(_WIDTH * columns, _HEIGHT * max(1, rows)), layout="constrained")
    panels = figure.subplots(max(1, rows), columns, squeeze=False)
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, [list(row) for row in panels]
