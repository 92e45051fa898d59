"""The page: one file of HTML that opens offline, needs no script, and lets no request leave it.

What changed comes first; then each predictor's search, what it cost, and the settings.
"""

from __future__ import annotations

import math

from dspy_greater.report.data import Averaged, Report, Row, SearchShown, Texts
from dspy_greater.report.html import Markup, element, joined, styled
from dspy_greater.report.parts import cost_table, diff_of, loop_part, search_part, settings_list, shortened
from dspy_greater.report.style import STYLE

# Should anything of a run ever pass for markup, no browser fetches or runs it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_LONGEST_TEXT = 12_000  # characters of one text that a row is shown with
_FIRST_ROWS = 8  # of one kind that are listed; others are folded away
_MOST_ROWS = 100  # of one kind


def page(report: Report) -> str:
    """The whole file.

    ```python
    Path("report.html").write_text(page(report_of(read_record("runs/navigate"))), encoding="utf-8")
    ```
    """
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="referrer", content="no-referrer"),
        element(
            "title", f"Prompt search: {', '.join(search.name for search in report.searches) or 'no predictor yet'}"
        ),
        styled(STYLE),
    )
    several = len(report.searches) > 1
    body = element(
        "main",
        _header(report),
        _overall(report) if several else None,
        [joined(_changed(search, titled=several), search_part(search, titled=several)) for search in report.searches],
        None if report.loop is None else loop_part(report.loop),
        cost_table(report),
        settings_list(report),
        element("footer", "Written by dspy_greater. Everything on this page is in the file itself."),
    )
    return f"<!doctype html>\n{element('html', head, element('body', body), lang='en')}\n"


def _header(report: Report) -> Markup:
    about = [element("p", element("span", f"{name} ", class_="soft"), value) for name, value in report.about]
    notes = [element("p", note, class_="note") for note in _notes(report)]
    return element("header", element("h1", "Prompt search"), about, notes)


def _notes(report: Report) -> list[str]:
    found: list[str] = []
    if report.damaged_line is not None:
        found.append(f"Line {report.damaged_line} of the journal is damaged: shown is what stands before it.")
    if not report.searches and report.loop is None:
        found.append("No predictor's search has begun yet.")
    for search in report.searches:
        name = f"{search.name}: " if len(report.searches) > 1 else ""
        taken = f"{len(search.steps)} of {search.planned} steps"
        if search.validated is None:
            found.append(f"{name}{taken} taken, not validated yet: under way, or interrupted.")
        elif len(search.steps) < search.planned:
            found.append(f"{name}ended after {taken}, and validated.")
    if report.waiting:
        found.append(f"Not searched yet: {', '.join(report.waiting)}.")
    if report.not_called:
        found.append(f"Not called on any training row, and left as they are: {', '.join(report.not_called)}.")
    return found


def _overall(report: Report) -> Markup | None:
    """The whole program, before the first search and after the last."""
    done = [search for search in report.searches if search.validated is not None]
    if not done:
        return None
    return joined(
        _headline(done[0].before, done[-1].after),
        element("p", f"The program on {_rows(done[-1].after)}, one predictor after the other.", class_="soft"),
    )


def _changed(search: SearchShown, *, titled: bool) -> Markup:
    """What changed: scores, instructions, rows."""
    title = element("h2", "Predictor ", element("span", search.name)) if titled else None
    kept = search.instruction == search.seed.instruction
    told = "The instruction that the program came with was kept." if kept else None
    fixed = [row for row in search.rows if row.fixed]
    broken = [row for row in search.rows if not row.fixed]
    return joined(
        title,
        _headline(search.before, search.after),
        element("p", _measured(search), class_="soft"),
        element("div", diff_of(search.seed.instruction, search.instruction), class_="diff", dir="auto"),
        None if told is None else element("p", told, class_="soft"),
        None if kept else _stats(search, fixed, broken),
        _row_list("Fixed", fixed),
        _row_list("Broken", broken),
    )


def _headline(before: Averaged, after: Averaged) -> Markup:
    return element(
        "div",
        element("span", f"{before.mean:.3g}", class_="was"),
        element("span", "→", class_="arrow", aria_label="to"),
        element("b", f"{after.mean:.3g}"),
        class_="headline",
    )


def _measured(search: SearchShown) -> str:
    what = "mean of the metric" if search.validated is not None else "so far, mean of the metric"
    return f"{what} on {_rows(search.after, search.measured_on)}".capitalize()


def _rows(found: Averaged, kind: str = "validation") -> str:
    return f"{found.rows} {kind} rows" if found.rows else f"the {kind} rows"


def _stats(search: SearchShown, fixed: list[Row], broken: list[Row]) -> Markup:
    kind = search.measured_on
    there = [row for row in search.rows if row.place == kind]
    counted = bool(there) or math.isclose(search.before.mean, search.after.mean)
    told = [
        ("before", f"{search.before.mean:.3g}", _interval(search.before)),
        ("after", f"{search.after.mean:.3g}", _interval(search.after)),
        ("difference, row by row", f"{search.after.mean - search.before.mean:+.3g}", _interval(search.gain, sign="+")),
    ]
    if counted:
        count = sum(row.place == kind for row in fixed), sum(row.place == kind for row in broken)
        told.append(("rows", f"{count[0]} fixed, {count[1]} broken", f"of {search.after.rows} {kind} rows"))
    return element(
        "dl",
        [
            element("div", element("dt", name), element("dd", value, element("small", rest)))
            for name, value, rest in told
        ],
        class_="stats",
    )


def _interval(found: Averaged, sign: str = "") -> str:
    if not math.isfinite(found.low):
        return "no interval on record"
    return f"95 % interval {found.low:{sign}.3g} to {found.high:{sign}.3g}"


def _row_list(title: str, rows: list[Row]) -> Markup | None:
    if not rows:
        return None
    places = dict.fromkeys(row.place for row in rows)
    counts = ", ".join(f"{sum(row.place == place for row in rows)} {place}" for place in places)
    shown = [_row(row) for row in rows[:_MOST_ROWS]]
    rest, left_out = shown[_FIRST_ROWS:], len(rows) - len(shown)
    more = element("summary", element("span", f"{len(rest)} more"))
    return joined(
        element("h3", f"{title} ", element("span", counts, class_="soft")),
        shown[:_FIRST_ROWS],
        element("details", more, element("div", rest, class_="body"), class_="more") if rest else None,
        element("p", f"{left_out} more are in the journal.", class_="note") if left_out else None,
    )


def _row(row: Row) -> Markup:
    shown = " · ".join(" ".join(value.split()) for _, value in row.inputs)[:300]
    summary = element(
        "summary",
        element("span", "fixed" if row.fixed else "broken", class_="tag fixed" if row.fixed else "tag broken"),
        element("span", f"{row.place} row {row.number}", class_="soft note"),
        element("span", shown, class_="rest"),
    )
    body = element(
        "div",
        _fields(row.inputs),
        _fields(tuple((f"expected {name}", value) for name, value in row.expected)),
        element(
            "div",
            _side("before", row.score_before, row.before, won=not row.fixed),
            _side("after", row.score_after, row.after, won=row.fixed),
            class_="pair",
        ),
        class_="body",
    )
    return element("details", summary, body)


def _side(title: str, score: float, texts: Texts, *, won: bool) -> Markup:
    return element(
        "div",
        element("span", title, class_="tag"),
        element("span", f" score {score:.3g}", class_="soft note"),
        _fields(texts) if texts else element("p", "Nothing was written.", class_="note"),
        class_="won" if won else None,
    )


def _fields(texts: Texts) -> list[Markup]:
    return [
        element(
            "div",
            element("span", name) if name else None,
            element("div", shortened(value, _LONGEST_TEXT), class_="text", dir="auto"),
            class_="field",
        )
        for name, value in texts
    ]
