"""Report -> one HTML page that needs nothing beside itself: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import re
from html import escape

from benchmarks.report.plots import Plot
from benchmarks.report.report import Report, Section
from benchmarks.report.tables import Table

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
figure { margin: 2rem 0; overflow-x: auto; }
figcaption { margin-bottom: .5rem; max-width: 60rem; }
figcaption b { display: block; font-size: 1.1em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem; text-align: left; vertical-align: top; }
thead th { background: var(--soft); }
td { white-space: pre-line; overflow-wrap: anywhere; min-width: 3rem; }
svg { max-width: 48rem; width: 100%; }
svg text { font-size: 12px; fill: currentColor; }
svg .grid { stroke: currentColor; stroke-opacity: .18; }
svg .seed { stroke: currentColor; stroke-opacity: .7; stroke-dasharray: 4 4; }
"""


def to_html(report: Report) -> str:
    """The whole page; also well-formed XML after its first line."""
    sections = "\n".join(map(_section, report.sections))
    return (
        "<!DOCTYPE html>\n"
        f'<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{text(report.title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{text(report.title)}</h1>\n<p>{text(report.lead)}</p>\n{sections}\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    sentences = "\n".join(f"<li>{text(sentence)}</li>" for sentence in section.sentences)
    listed = f"<ul>\n{sentences}\n</ul>\n" if sentences else ""
    parts = "\n".join(_plot(part) if isinstance(part, Plot) else _table(part) for part in section.parts)
    return f"<section>\n<h2>{text(section.title)}</h2>\n{listed}{parts}\n</section>"


def _table(part: Table) -> str:
    head = "".join(f'<th scope="col">{text(column)}</th>' for column in part.columns)
    rows = "\n".join(
        "<tr>" + "".join(_cell(entry, (number, column) in part.strong) for column, entry in enumerate(row)) + "</tr>"
        for number, row in enumerate(part.rows)
    )
    table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"
    return f"<figure>{_caption(part)}\n{table}</figure>"


def _cell(entry: str, strong: bool) -> str:
    return f"<td><b>{text(entry)}</b></td>" if strong else f"<td>{text(entry)}</td>"


def _plot(part: Plot) -> str:
    return f"<figure>{_caption(part)}\n{part.svg}</figure>"


def _caption(part: Table | Plot) -> str:
    return f"<figcaption><b>{text(part.title)}</b>{text(part.caption)}</figcaption>"


def text(value: str) -> str:
    """Text as HTML and XML can hold it; instructions found by a search may contain anything.

    Example:
        >>> text("a < b & \\x00")
        'a &lt; b &amp; \\ufffd'
    """
    return escape(re.sub(r"[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", value))
