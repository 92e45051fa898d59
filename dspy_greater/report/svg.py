"""Figures as inline SVG: as wide as a phone, coloured by the page's style sheet, read out by their label."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from dspy_greater.report.figures import Fidelity, PhaseCosts, Progress
from dspy_greater.report.html import Markup, element, joined

_WIDTH, _HEIGHT = 360, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 12, 34
_BAR = 46  # height of one bar with its label


@dataclass(frozen=True)
class _Axis:
    """Values -> places on the picture, with round numbers to label."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    @property
    def ticks(self) -> list[float]:
        step = _round_step(self.high - self.low)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def score_figure(found: Progress) -> Markup:
    """The metric's mean on the training rows, step by step; a dot where an edit was accepted."""
    return _over_steps(found, found.scores, "score", f"score from {found.scores[0]:.3g} to {found.scores[-1]:.3g}")


def loss_figure(found: Progress) -> Markup | None:
    """The mean cross-entropy of the gold answers; None where there are none."""
    finite = [loss for loss in found.losses if _drawable(loss)]
    if not finite:
        return None
    return _over_steps(found, found.losses, "loss, nats", f"loss from {finite[0]:.3g} to {finite[-1]:.3g}")


def forecast_figure(found: Fidelity) -> Markup | None:
    """Each tried candidate: what was told of it, against what came; None where nothing was."""
    points = [forecast for forecast in found.forecasts if _drawable(forecast.told) and _drawable(forecast.came)]
    if not points:
        return None
    across = _axis([*(point.told for point in points), 0.0], _LEFT, _WIDTH - _RIGHT)
    up = _axis([*(point.came for point in points), 0.0], _HEIGHT - _BOTTOM, _TOP)
    marks = [
        element(
            "circle",
            element("title", f"step {point.step}: forecast {point.told:+.3g}, outcome {point.came:+.3g}"),
            class_="better" if point.came < 0 else "worse" if point.came > 0 else "even",
            cx=_place(across(point.told)),
            cy=_place(up(point.came)),
            r="3.5",
        )
        for point in points
    ]
    zero = (
        _line("zero", across(0), _TOP, across(0), _HEIGHT - _BOTTOM),
        _line("zero", _LEFT, up(0), _WIDTH - _RIGHT, up(0)),
    )
    label = f"{len(points)} candidates, forecast against outcome; rank correlation {found.rank_correlation:.2f}"
    return _picture(label, _frame(across, up, "forecast change", _signed, _signed), zero, marks)


def cost_figure(found: PhaseCosts) -> Markup | None:
    """Tokens read, differentiated and written, each a bar of phases; None where nothing was counted."""
    totals = {name: sum(counts) for name, counts in found.tokens.items()}
    most = max(totals.values(), default=0)
    if most <= 0:
        return None
    bars: list[Markup] = []
    for place, (name, counts) in enumerate(found.tokens.items()):
        top, left = place * _BAR, 0.0
        bars.append(element("text", name, class_="name", x=0, y=top + 13))
        bars.append(element("text", f"{totals[name]:,}", class_="amount", x=_WIDTH, y=top + 13, text_anchor="end"))
        for number, (phase, count) in enumerate(zip(found.phases, counts, strict=True)):
            width = count / most * _WIDTH
            title = element("title", f"{phase}: {count:,} tokens {name}")
            bars.append(
                element(
                    "rect",
                    title,
                    class_=f"phase{number % 3}",
                    x=_place(left),
                    y=top + 20,
                    width=_place(width),
                    height=14,
                )
            )
            left += width
    told = ", ".join(f"{total:,} tokens {name}" for name, total in totals.items())
    return _picture(told, bars, height=_BAR * len(totals) - 10)


def _over_steps(found: Progress, values: Sequence[float], named: str, label: str) -> Markup:
    across = _Axis(0, max(1, len(values) - 1), _LEFT, _WIDTH - _RIGHT)
    up = _axis([value for value in values if _drawable(value)] or [0.0], _HEIGHT - _BOTTOM, _TOP)
    path, drawn = "", None
    for step, value in enumerate(values):
        if not _drawable(value):
            drawn = None
            continue
        x, y = _place(across(step)), _place(up(value))
        path += f"M{x} {y}" if drawn is None else f"H{x}V{y}"
        drawn = value
    dots = [
        element(
            "circle",
            element("title", f"step {step}: {values[step]:.3g}"),
            class_="accepted",
            cx=_place(across(step)),
            cy=_place(up(values[step])),
            r="3",
        )
        for step in found.accepted
        if _drawable(values[step])
    ]
    frame = _frame(across, up, "step", _whole, _short)
    return _picture(
        f"{named} over {len(values) - 1} steps: {label}", frame, element("path", class_="line", d=path), dots
    )


def _frame(
    across: _Axis, up: _Axis, named: str, tell_across: Callable[[float], str], tell_up: Callable[[float], str]
) -> list[Markup]:
    base = _HEIGHT - _BOTTOM
    found = [_line("axis", _LEFT, base, _WIDTH - _RIGHT, base)]
    for tick in up.ticks:
        found.append(_line("grid", _LEFT, up(tick), _WIDTH - _RIGHT, up(tick)))
        found.append(element("text", tell_up(tick), x=_LEFT - 6, y=_place(up(tick) + 4), text_anchor="end"))
    for tick in across.ticks:
        text = tell_across(tick)
        if text:
            found.append(element("text", text, x=_place(across(tick)), y=base + 15, text_anchor="middle"))
    found.append(element("text", named, class_="name", x=_WIDTH - _RIGHT, y=_HEIGHT - 4, text_anchor="end"))
    return found


def _picture(label: str, *children: object, height: int = _HEIGHT) -> Markup:
    return element(
        "svg", joined(*children), viewBox=f"0 0 {_WIDTH} {height}", role="img", aria_label=label, class_="figure"
    )


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return element("line", class_=kind, x1=_place(x1), y1=_place(y1), x2=_place(x2), y2=_place(y2))


def _axis(values: Iterable[float], start: float, stop: float) -> _Axis:
    """An axis whose ends are round numbers around all values."""
    values = list(values)
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - max(0.05, abs(low) * 0.05), high + max(0.05, abs(high) * 0.05)
    step = _round_step(high - low)
    return _Axis(math.floor(low / step) * step, math.ceil(high / step) * step, start, stop)


def _drawable(value: float) -> bool:
    """Whether a value has a place on an axis: finite, and so are the sums that the axis takes."""
    return abs(value) < 1e100  # which nan is not


def _round_step(width: float) -> float:
    """1, 2 or 5 times a power of ten, about a fourth of the width."""
    rough = max(width, 1e-300) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    return next((factor * power for factor in (1, 2, 5) if factor * power >= rough), 10 * power)


def _place(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")


def _whole(value: float) -> str:
    return f"{value:.0f}" if abs(value - round(value)) < 1e-9 else ""


def _short(value: float) -> str:
    return f"{value:.3g}".replace("e-0", "e-") if abs(value) > 1e-12 else "0"


def _signed(value: float) -> str:
    return f"{value:+.3g}" if abs(value) > 1e-12 else "0"
