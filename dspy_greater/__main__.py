"""`python -m dspy_greater report LOG_DIR` and `python -m dspy_greater export PROGRAM.json`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dspy_greater.errors import GreaterError, ProgramError, RunDirectoryError
from dspy_greater.report.file import NAME
from dspy_greater.run.files import replace_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; 0 where it went well, 1 where the message says what did not."""
    given = _parser().parse_args(arguments)
    try:
        told = given.run(given)
    except GreaterError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{_held(told, sys.stdout.encoding or 'utf-8')}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dspy_greater", description="Read a run, deploy a program.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    report = commands.add_parser("report", help="make report.html from a run's journal alone")
    report.add_argument("log_dir", type=Path, metavar="LOG_DIR", help="a run's directory; it may have been killed")
    report.add_argument("--out", type=Path, metavar="FILE", help=f"where to (default: LOG_DIR/{NAME})")
    report.set_defaults(run=_report)
    export = commands.add_parser("export", help="write a saved program's messages as a template with named gaps")
    export.add_argument("program", type=Path, metavar="PROGRAM.json", help="what program.save('x.json') wrote")
    export.add_argument("--out", type=Path, metavar="FILE", help="where to (default: standard output)")
    export.add_argument(
        "--signature",
        action="append",
        default=[],
        metavar="NAME=SIGNATURE",
        help="a predictor's fields, as in 'predict=question -> answer: bool', where the file does not tell",
    )
    export.add_argument("--adapter", default="chat", choices=["chat", "json", "xml"], help="(default: chat)")
    export.set_defaults(run=_export)
    return parser


def _report(given: argparse.Namespace) -> str:
    from dspy_greater.report.data import report_of
    from dspy_greater.report.page import page
    from dspy_greater.run.record import read_record

    out: Path = given.out or given.log_dir.expanduser() / NAME
    return _written(page(report_of(read_record(given.log_dir))), out)


def _export(given: argparse.Namespace) -> str:
    from dspy_greater.program.export import template_of

    pairs = [argument.partition("=") for argument in given.signature]
    for name, equals, _ in pairs:
        if not equals:
            raise ProgramError(f"--signature {name!r} names no predictor. Write NAME=SIGNATURE.")
    signatures = {name.strip(): text for name, _, text in pairs}
    found = template_of(given.program, signatures=signatures, adapter=given.adapter)
    text = json.dumps(found, indent=2, ensure_ascii=False)
    return text if given.out is None else _written(f"{text}\n", given.out)


def _held(text: str, encoding: str) -> str:
    """The text; a character that the encoding cannot hold is escaped as JSON does it.

    >>> _held('{"Größe": "↑"}', "latin-1")
    '{"Größe": "\\\\u2191"}'
    """

    def shown(character: str) -> str:
        try:
            character.encode(encoding)
        except UnicodeEncodeError:
            return json.dumps(character)[1:-1]
        return character

    return "".join(map(shown, text))


def _written(text: str, path: Path) -> str:
    if not path.name:  # `.`, which an empty argument is too, or `/`
        raise RunDirectoryError(f"{path} cannot be written: it names no file. Give a file with --out.")
    try:
        replace_text(path, text)
    except OSError as error:
        raise RunDirectoryError(
            f"{path} cannot be written: {error.strerror or error}. Give another file with --out."
        ) from error
    return str(path)


if __name__ == "__main__":
    sys.exit(main())
