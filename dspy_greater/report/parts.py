"""The lower parts of the page: figures, edits, the candidates of each step, cost, settings."""

from __future__ import annotations

import math

from dspy_greater.objective.types import Candidate
from dspy_greater.report.data import Loop, Report, SearchShown, Texts
from dspy_greater.report.diff import word_diff
from dspy_greater.report.figures import PhaseCosts, beginnings
from dspy_greater.report.html import Markup, element, escaped, joined
from dspy_greater.report.svg import cost_figure, forecast_figure, loss_figure, score_figure
from dspy_greater.run.events import StepTaken
from dspy_greater.run.log import candidate_edit, edit_parts

_MOST_UNTRIED = 8  # candidates of a step that had a forecast and were not tried


def search_part(search: SearchShown, *, titled: bool = False) -> Markup:
    """How one predictor's search went; `titled` where there are several."""
    return joined(
        element("h2", "The search", f" of {search.name}" if titled else None),
        element("p", _told(search), class_="soft"),
        _figures(search),
        _accepted(search),
        _steps(search),
    )


def cost_table(report: Report) -> Markup | None:
    """Tokens by phase, of all searches together and, where there are several, of each."""
    picture = cost_figure(report.cost)
    if picture is None:
        return None
    keys = [
        element("span", element("span", class_=f"key phase{place}", aria_hidden="true"), phase)
        for place, phase in enumerate(report.cost.phases)
    ]
    rows = [
        [phase, *(f"{counts[place]:,}" for counts in report.cost.tokens.values()), f"{report.cost.runs[place]:,}"]
        for place, phase in enumerate(report.cost.phases)
    ]
    several = report.searches if len(report.searches) > 1 else ()
    rows += [[f"of which {search.name}", *_totals(search.cost)] for search in several]
    rows.append(["in all", *_totals(report.cost)])
    return joined(
        element("h2", "Cost"),
        element("div", keys, class_="keys"),
        element("figure", picture),
        _table(["phase", *(f"tokens {name}" for name in report.cost.tokens), "program runs"], rows),
    )


def settings_list(report: Report) -> Markup:
    """What the run depends on, folded away."""
    parts = [_unfolding(f"Predictor {search.name}", _list(search.about)) for search in report.searches if search.about]
    return joined(
        element("h2", "Settings and versions"),
        parts,
        _unfolding("Run", _list(report.settings)) if report.settings else None,
        _unfolding("Software", _list(report.versions)) if report.versions else None,
    )


def loop_part(loop: Loop) -> Markup:
    """GRAD-SUM: the prompts, the scores of its iterations, and what its modules asked."""
    prompts = [
        joined(
            element("h3", name),
            element("div", diff_of(before, loop.after.get(name, before)), class_="diff", dir="auto"),
        )
        for name, before in loop.before.items()
    ]
    scores = [[str(place), *(f"{part:.3g}" for part in score)] for place, score in enumerate(loop.scores, start=1)]
    widest = max((len(score) for score in loop.scores), default=0)
    heads = ["iteration", *(["best score", "judge"][:widest] if widest < 3 else ["score"] * widest)]
    modules = list(dict.fromkeys(name for spent in loop.spent.values() for name in spent))
    spent = [[name, *(f"{counts.get(key, 0):,}" for key in modules)] for name, counts in loop.spent.items()]
    return joined(
        element("h2", "GRAD-SUM"),
        element(
            "p",
            f"{len(loop.scores)} of {loop.planned} iterations; the prompts are the best of the beam.",
            class_="soft",
        ),
        prompts,
        _table(heads, scores) if scores else None,
        _table(["module", *modules], spent) if spent else None,
    )


def diff_of(before: str, after: str) -> list[Markup]:
    """Two texts as one, with what went struck out and what came underlined."""
    tags = {"removed": "del", "added": "ins"}
    return [
        element(tags[piece.kind], piece.text) if piece.kind in tags else escaped(piece.text)
        for piece in word_diff(before, after)
    ]


def shortened(text: str, most: int) -> str:
    """A text of at most so many characters; what is left out is told.

    Example:
        >>> shortened("abcdef", 4)
        'abcd… (2 more characters)'
    """
    return text if len(text) <= most else f"{text[:most]}… ({len(text) - most:,} more characters)"


def _told(search: SearchShown) -> str:
    rows = len(search.seed.rows)
    accepted = len(search.progress.accepted)
    return (
        f"{len(search.steps)} of {search.planned} steps on {rows} training rows; {accepted} "
        f"{'edit was' if accepted == 1 else 'edits were'} accepted."
    )


def _figures(search: SearchShown) -> Markup:
    rho = search.fidelity.rank_correlation
    found = [
        (score_figure(search.progress), "Score", "On the training rows. A ring: an edit was accepted."),
        (loss_figure(search.progress), "Loss", "Mean cross-entropy of the gold answers, in nats."),
        (
            forecast_figure(search.fidelity),
            "Forecast and outcome",
            "Of each tried candidate, the forecast change (across) and the change of the mistake rate (up). "
            + (
                f"Rank correlation {rho:.2f}."
                if math.isfinite(rho)
                else "No rank correlation: too few, or none changed anything."
            ),
        ),
    ]
    shown = [
        element("figure", element("figcaption", title), picture, element("p", text, class_="note"))
        for picture, title, text in found
        if picture is not None
    ]
    return element("div", shown, class_="figures")


def _accepted(search: SearchShown) -> Markup | None:
    begun = zip(search.steps, beginnings(search.seed, search.steps), strict=True)
    wanted = set(search.progress.accepted)
    steps = [pair for place, pair in enumerate(begun, start=1) if place in wanted]
    if not steps:
        return None
    rows = [
        element(
            "tr",
            element("td", step.step + 1, class_="n"),
            element("td", _edit(step), class_="wide"),
            element("td", f"{step.chosen.score:.3g}", class_="n"),
            element("td", _number(step.chosen.cross_entropy), class_="n"),
            element("td", diff_of(began, step.chosen.instruction), class_="wide", dir="auto"),
        )
        for step, began in steps
    ]
    heads = [("step", "n"), ("edit", None), ("score", "n"), ("loss", "n"), ("instruction", None)]
    return joined(element("h3", "Accepted edits"), _rows_of(heads, rows, "edits"))


def _edit(step: StepTaken) -> Markup:
    parts = edit_parts(step)
    return escaped("changed") if parts is None else _arrow(*parts)


def _arrow(old: str, new: str) -> Markup:
    return joined(_token("del", old), " → ", _token("ins", new))


def _token(tag: str, text: str) -> Markup:
    """A token with the blanks around it to be seen; nothing where a token was put in or taken out."""
    core = text.strip(" ")
    before, _, after = text.partition(core) if core else (text, "", "")
    shown = f"{'␣' * len(before)}{core}{'␣' * len(after)}"
    return element(tag, shown, dir="auto") if text else element("span", "nothing", class_="soft")


def _steps(search: SearchShown) -> Markup | None:
    if not search.steps:
        return None
    correlations = search.fidelity.by_step
    parts = [_step(step, correlation) for step, correlation in zip(search.steps, correlations, strict=True)]
    return joined(element("h3", "Every step"), parts)


def _step(step: StepTaken, correlation: float) -> Markup:
    tried = [candidate for candidate in step.candidates if candidate.evaluation is not None]
    untried = [candidate for candidate in step.candidates if candidate.evaluation is None]
    on_few_rows = [candidate for candidate in untried if candidate.trial is not None]
    others = [candidate for candidate in untried if candidate.forecast is not None]
    shown = [*tried, *on_few_rows, *others[:_MOST_UNTRIED]]
    hidden = len(step.candidates) - len(shown)
    kept = edit_parts(step) is None
    summary = element(
        "summary",
        element("span", f"{step.step + 1}", class_="tag"),
        element("span", "kept", class_="soft") if kept else element("span", _edit(step)),
        element("span", f"score {step.chosen.score:.3g} · position {step.position} · {step.reason}", class_="rest"),
    )
    heads = ["edit", "log p", "gradient", "forecast", "outcome", "loss", "score"]
    rank = f" Rank correlation within the step {correlation:.2f}." if math.isfinite(correlation) else ""
    body = element(
        "div",
        element("p", f"{step.reason}. {step.spent.get('generated_tokens', 0):,} tokens written.{rank}", class_="note"),
        _rows_of(
            [(name, None if name == "edit" else "n") for name in heads],
            [_candidate(step, candidate) for candidate in shown],
        ),
        element("p", f"{hidden} more were proposed and not tried.", class_="note") if hidden else None,
        class_="body",
    )
    return element("details", summary, body)


def _candidate(step: StepTaken, found: Candidate) -> Markup:
    tried, came = found.evaluation, found.realised
    numbers = [
        _number(found.log_probability),
        _number(found.gradient, sign="+"),
        _number(found.forecast, sign="+"),
        _number(None if came is None else came[0], sign="+"),
        _number(None if came is None else came[1], sign="+"),
        _scored(found),
    ]
    chosen = tried is not None and tried.instruction == step.chosen.instruction
    return element(
        "tr",
        element("td", _arrow(*candidate_edit(step, found)), class_="wide"),
        [element("td", text, class_="n") for text in numbers],
        class_="chosen" if chosen else None,
    )


def _scored(found: Candidate) -> str:
    if found.evaluation is not None:
        return _number(found.evaluation.score)
    return "not tried" if found.trial is None else f"{found.trial.score:.3g} on {found.trial.rows} rows"


def _number(value: float | None, sign: str = "") -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:{sign}.3g}"


def _totals(found: PhaseCosts) -> list[str]:
    return [f"{sum(counts):,}" for counts in (*found.tokens.values(), found.runs)]


def _table(heads: list[str], rows: list[list[str]]) -> Markup:
    kinds = [(head, "n" if place else None) for place, head in enumerate(heads)]
    cells = [
        element("tr", [element("td", text, class_="n" if place else None) for place, text in enumerate(row)])
        for row in rows
    ]
    return _rows_of(kinds, cells)


def _rows_of(heads: list[tuple[str, str | None]], rows: list[Markup], kind: str | None = None) -> Markup:
    head = element("tr", [element("th", text, class_=kind, scope="col") for text, kind in heads])
    table = element("table", element("thead", head), element("tbody", rows), class_=kind)
    return element("div", table, class_="scroll", tabindex=0)


def _unfolding(title: str, body: Markup) -> Markup:
    return element("details", element("summary", element("span", title)), element("div", body, class_="body"))


def _list(texts: Texts) -> Markup:
    pairs = [joined(element("dt", name), element("dd", value)) for name, value in texts]
    return element("dl", pairs, class_="settings")
