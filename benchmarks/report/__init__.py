"""From the finished cells of a comparison to tables, curves and a verdict.

statistics.py   Wilson intervals, McNemar's exact test, Holm's correction, ranks
comparison.py   cells -> what is compared with what
tables.py       comparisons -> tables of text
findings.py     comparisons -> the verdict in sentences, losses as plain as wins
plots.py        comparisons -> SVG
markdown.py     report -> Markdown
html.py         report -> one self-contained page
transfer.py     found instructions on another model
command.py      `python -m benchmarks report`
"""
