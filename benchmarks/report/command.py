"""`python -m benchmarks report`: tables and curves from the finished cells of a run.

    python -m benchmarks report --out runs/x

reads runs/x/cells.jsonl and writes report.md and report.html beside it. It may be called while the run goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.cells import FILE, read
from benchmarks.report.comparison import comparisons
from benchmarks.report.findings import findings
from benchmarks.report.html import to_html
from benchmarks.report.markdown import to_markdown
from benchmarks.report.report import build
from benchmarks.report.transfer import TRANSFER_FILE, read_transfer, transfer_tables
from dspy_greater.errors import DataError, GreaterError, RunDirectoryError

BASELINE = "greater"
MARKDOWN, PAGE = "report.md", "report.html"


def main(argv: Sequence[str]) -> int:
    """Write the report: 0, or 2 where there is nothing to report or it cannot be written."""
    options = _parser().parse_args(argv)
    try:
        written = write_report(options.out, options.baseline, options.transfer)
    except GreaterError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write("\n".join(written) + "\n")
    return 0


def write_report(directory: Path, baseline: str = BASELINE, transfer: Path | None = None) -> list[str]:
    """Write report.md and report.html into the directory; returns the verdict and where they are, line by line.

    Args:
        directory: with cells.jsonl.
        baseline: the optimizer that the others are held against.
        transfer: results on other models; transfer.jsonl of the directory where it is left out.

    Raises:
        DataError: there are no cells, or none of the baseline's.
        RunDirectoryError: a file is damaged, or cannot be written.
    """
    cells = read(directory / FILE)
    if not cells:
        raise DataError(f"There are no finished cells in {directory / FILE}; `python -m benchmarks run` makes them.")
    known = list(dict.fromkeys(cell.key.optimizer for cell in cells))
    if baseline not in known and baseline != BASELINE:
        raise DataError(f"--baseline {baseline} has no cells; there are {', '.join(known)}.")
    if transfer is not None and not transfer.is_file():
        raise DataError(f"There is no {transfer}; `python -m benchmarks transfer` makes it.")
    extra = transfer_tables(read_transfer(transfer or directory / TRANSFER_FILE))
    report = build(cells, baseline, extra)
    try:
        (directory / MARKDOWN).write_text(to_markdown(report), encoding="utf-8", errors="replace")
        (directory / PAGE).write_text(to_html(report), encoding="utf-8")
    except OSError as error:
        raise RunDirectoryError(f"The report cannot be written into {directory} ({error.strerror}).") from error
    verdict = [line for each in comparisons(cells) for line in (f"{each.text}:", *findings(each, baseline))]
    return [*verdict, str(directory / MARKDOWN), str(directory / PAGE)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/comparison"), metavar="DIR", help="directory of the run")
    parser.add_argument("--baseline", default=BASELINE, metavar="NAME", help=f"held against the others; {BASELINE}")
    parser.add_argument("--transfer", type=Path, metavar="FILE", help="results on other models; DIR/transfer.jsonl")
    return parser
