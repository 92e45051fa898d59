"""Files of one JSON object a line, of which a killed write costs no more than the last line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dspy_greater.errors import RunDirectoryError

MadeT = TypeVar("MadeT")


def read_lines(path: Path, make: Callable[[Mapping[str, Any]], MadeT], refused: str) -> list[MadeT]:
    """What `make` makes of each line, oldest first. A torn last line is left out.

    Args:
        path: the file; one that is not there has no lines.
        make: raises `ValueError`, `KeyError` or `TypeError` for a line that is none of its own.
        refused: what is wrong with such a line, and what to do, with gaps `{line}`, `{path}` and `{error}`.

    Raises:
        RunDirectoryError: a line in the middle is damaged.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    found: list[MadeT] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(make(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):  # no newline after it: the run was killed while it wrote
                break
            told = f"{type(error).__name__}: {error}"
            raise RunDirectoryError(refused.format(line=number, path=path, error=told)) from error
    return found


def append_line(path: Path, fields: Mapping[str, Any]) -> None:
    """Write one line and wait until it is on disk.

    Raises:
        OSError: it cannot be written.
        ValueError: it has a number that is not finite.
    """
    line = json.dumps(fields, ensure_ascii=False, allow_nan=False)
    _cut_torn_tail(path)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def _cut_torn_tail(path: Path) -> None:
    """Cut off what stands after the last newline, so that the next line does not continue it."""
    if not path.is_file():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
