"""A journal read from outside, for a report: nothing is locked, written, repaired or executed.

Only the one regular file `journal.jsonl` inside of the directory is opened; a link is not followed.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dspy_greater.errors import EventFormatError, RunDirectoryError
from dspy_greater.run import lines
from dspy_greater.run.events import Event
from dspy_greater.run.journal import FORMAT, NAME, VERSION
from dspy_greater.run.serialise import as_mapping, from_json


@dataclass(frozen=True)
class Record:
    """What a run was, and what happened in it.

    `identity` is what the run depends on, `versions` of which software it was begun with. `damaged_line` is the first
    line that could not be read, if there is one that is no mere torn end; `events` are those before it.
    """

    identity: Mapping[str, Any] = field(default_factory=dict[str, Any])
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    events: tuple[Event, ...] = ()
    damaged_line: int | None = None


def read_record(directory: str | os.PathLike[str]) -> Record:
    """The record in a run's directory, of a run that is finished, killed or still under way.

    Raises:
        RunDirectoryError: there is no journal, it cannot be read, or another version wrote it.
    """
    path = Path(directory).expanduser() / NAME
    found = lines.read(_content(path))
    if not found.payloads:
        raise RunDirectoryError(f"{path} is empty or no journal. Give the log_dir of a run that has begun.")
    header = _header(path, found.payloads[0])
    events: list[Event] = []
    damaged = found.damaged_line
    for number, payload in enumerate(found.payloads[1:], start=2):
        try:
            events.append(from_json(json.loads(payload)))
        except (EventFormatError, ValueError, TypeError, RecursionError):
            damaged = number
            break
    return Record(as_mapping(header.get("identity")), _texts(header.get("versions")), tuple(events), damaged)


def _content(path: Path) -> bytes:
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        if path.is_symlink():
            raise RunDirectoryError(f"{path} is a link, which is not followed. Give the directory that it leads to.")
        descriptor = os.open(path, flags)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise RunDirectoryError(f"{path} is not a regular file. Give the log_dir of a run.")
            return file.read()
    except RunDirectoryError:
        raise
    except FileNotFoundError as error:
        raise RunDirectoryError(
            f"There is no journal in {path.parent}: {NAME} is missing. Give the log_dir of a run that has begun."
        ) from error
    except OSError as error:
        raise RunDirectoryError(
            f"{path} cannot be read: {error.strerror or error}. Give the log_dir of a run, and see to it that its "
            "files may be read."
        ) from error


def _header(path: Path, payload: bytes) -> dict[str, Any]:
    try:
        header = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise RunDirectoryError(f"The first line of {path} cannot be read: {error}. Use another log_dir.") from error
    known = as_mapping(header)
    if known.get("format") != FORMAT:
        raise RunDirectoryError(f"{path} is not a journal of dspy_greater. Give the log_dir of a run.")
    if known.get("version") != VERSION:
        raise RunDirectoryError(
            f"{path} has format version {known.get('version')!r}, and this dspy_greater reads version {VERSION}. Make "
            "the report with the dspy_greater that wrote the journal."
        )
    return known


def _texts(value: object) -> dict[str, str]:
    return {name: str(item) for name, item in as_mapping(value).items()}
