"""Report -> Markdown that reads well as it is, and on GitHub."""

from __future__ import annotations

import re
from html import escape

from benchmarks.report.plots import Plot
from benchmarks.report.report import Report, Section
from benchmarks.report.tables import Table


def to_markdown(report: Report) -> str:
    """The report without its drawings, whose numbers are in the tables."""
    return "\n".join([f"# {report.title}", "", entry(report.lead), "", *map(_section, report.sections)])


def _section(section: Section) -> str:
    lines = [f"## {entry(section.title)}", ""]
    lines += [f"- {entry(sentence)}" for sentence in section.sentences]
    lines += [""] if section.sentences else []
    for part in section.parts:
        if not isinstance(part, Plot):
            lines += [table(part), ""]
    return "\n".join(lines)


def table(part: Table) -> str:
    """A table with its title and caption."""
    lines = [
        f"### {entry(part.title)}",
        "",
        entry(part.caption),
        "",
        _line(list(map(entry, part.columns))),
        _line(["---"] * len(part.columns)),
    ]
    for number, row in enumerate(part.rows):
        texts = [
            f"**{entry(text)}**" if (number, column) in part.strong else entry(text) for column, text in enumerate(row)
        ]
        lines.append(_line(texts))
    return "\n".join(lines)


def entry(text: str) -> str:
    """Text that Markdown shows as it is, on one line.

    Example:
        >>> print(entry("a|b <c>\\n*d* _e_ f_g"))
        a\\|b &lt;c&gt;<br>\\*d\\* \\_e\\_ f_g
    """
    shown = escape(text, quote=False)
    for mark in ("\\", "`", "*", "|", "~"):
        shown = shown.replace(mark, "\\" + mark)
    # An underscore within a word is one, for Markdown as well.
    shown = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", shown).replace("](", "]\\(")
    return "<br>".join(line.strip() for line in shown.splitlines())


def _line(texts: list[str]) -> str:
    return "| " + " | ".join(texts) + " |"
