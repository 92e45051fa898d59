"""What a run has done so far, on disk, so that an interrupted one goes on where it was.

`journal.jsonl` starts with a header that says which format it has and what the run depends on
(settings, data, weights); each further line is one event. Nothing that is read from it is executed,
unpickled or used as a path.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, NoReturn, cast

from dspy_greater.errors import RunDirectoryError
from dspy_greater.notices import warn_caller
from dspy_greater.run import lines
from dspy_greater.run.events import Event
from dspy_greater.run.lines import LineFile
from dspy_greater.run.lock import DirectoryLock
from dspy_greater.run.serialise import JSON, as_mapping, from_json, leaves, to_json
from dspy_greater.run.software import installed

NAME = "journal.jsonl"
FORMAT = "dspy_greater journal"
VERSION = 2  # 1: events without a type at every part of them
_MOST_DIFFERENCES = 20
_WIDEST_VALUE = 80  # characters
_ABSENT = "absent"


class Journal(AbstractContextManager["Journal"]):
    """The events of a run, in order: those of its interrupted beginning and those appended since.

    Example:
        >>> from dspy_greater.run.events import Warned
        >>> with Journal.open(None, {"seed": 0}) as journal:
        ...     journal.append(Warned("careful"))
        ...     journal.recorded(), journal.events()
        ((), (Warned(message='careful'),))
    """

    def __init__(
        self,
        recorded: tuple[Event, ...] = (),
        file: LineFile | None = None,
        resources: ExitStack | None = None,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        self.versions = versions or {}  # of the software that the run was begun with
        self._recorded = recorded
        self._appended: list[Event] = []
        self._file = file
        self._resources = resources or ExitStack()
        self._closed = False

    @classmethod
    def open(
        cls,
        directory: str | Path | None,
        identity: Mapping[str, JSON],
        servers: Mapping[str, str] | None = None,
        code: Mapping[str, str] | None = None,
    ) -> Journal:
        """Begin a run in a directory, or go on with the one that was interrupted there.

        `identity` is everything that the run's events depend on; a run goes on only with the identity
        that it began with. `servers` are noted beside the versions of the software: they may be others later.
        `code` has digests of what it runs; a run goes on with other code, and warns.
        `directory` is created where it does not exist; None keeps the journal
        in memory. Until `close`, no other run can open the directory.

        Raises:
            RunDirectoryError: the directory cannot be written, is in use by another run, belongs to a
                run with another identity or format, or its journal is damaged before the last line.
        """
        if directory is None:
            return cls()
        folder = Path(directory).expanduser()
        try:
            with ExitStack() as resources:
                folder.mkdir(parents=True, exist_ok=True)
                resources.callback(DirectoryLock.acquire(folder).release)
                file = LineFile(folder / NAME)
                resources.callback(file.close)
                recorded, begun_with = _begin_or_resume(file, identity, servers or {}, code or {})
                lines.sync_directory(folder)
                return cls(recorded, file, resources.pop_all(), begun_with)
        except RunDirectoryError:
            raise
        except OSError as error:
            raise RunDirectoryError(
                f"The run directory {folder} cannot be created or written: {error.strerror or error}. Give "
                "log_dir a directory that can be, or log_dir=None to run without a journal."
            ) from error

    def recorded(self) -> tuple[Event, ...]:
        """The events of the interrupted run, in order; empty for a new run."""
        return self._recorded

    def events(self) -> tuple[Event, ...]:
        """All events of the run: the recorded ones and those appended since."""
        return (*self._recorded, *self._appended)

    def append(self, event: Event) -> None:
        """Record one event; it is on disk when this returns.

        When the file can no longer be written, warns once and goes on in memory.

        Raises:
            EventFormatError: a field of the event holds a value of another type than it declares.
            RunDirectoryError: the journal is closed.
        """
        if self._closed:
            raise RunDirectoryError("This journal is closed. Open it again to append to it.")
        payload = _dump(to_json(event))
        file = self._file
        if file is not None:
            try:
                file.append(payload)
            except OSError as error:
                self._file = None  # first, in case the user's filter turns the warning into an error
                self._appended.append(event)
                _warn_not_written(file.path, error)
                return
        self._appended.append(event)

    def close(self) -> None:
        """Close the file and give the directory back; a second call does nothing."""
        self._closed = True
        self._file = None
        try:
            self._resources.close()
        except OSError as error:  # some file systems say only now that a line could not be written
            warn_caller(f"The journal could not be closed: {error.strerror or error}.", RuntimeWarning)

    def __exit__(self, *raised: object) -> None:
        self.close()


def _dump(value: JSON) -> bytes:
    """One line of plain ASCII; everything else is escaped, so that no line separator is left."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def _warn_not_written(path: Path, error: OSError) -> None:
    warn_caller(
        f"The journal {path} can no longer be written: {error.strerror or error}. The search goes on and "
        "will return its program, but if it is interrupted, it resumes from before this step. Free the disk, "
        "or use another log_dir, before the next run.",
        RuntimeWarning,
    )


def _begin_or_resume(
    file: LineFile, identity: Mapping[str, JSON], servers: Mapping[str, str], code: Mapping[str, str]
) -> tuple[tuple[Event, ...], dict[str, str]]:
    """The recorded events, and the versions of the beginning; afterwards the file ends with an intact line."""
    now = json.loads(json.dumps(identity))
    content = file.content()
    intact = lines.read(content)
    begun_with = {**installed(), **servers}
    if intact.payloads:
        header = _header(intact.payloads[0])
        begun_with = _check_header(file.path, header, now)
        _warn_of_other_code(file.path, as_mapping(header.get("code")), code)
    if intact.damaged_line is not None:
        _refuse_damage(file.path, content, intact)
    recorded = tuple(_events(file.path, intact.payloads[1:]))
    file.resume(intact)
    if not intact.payloads:
        header = {"format": FORMAT, "version": VERSION, "versions": begun_with, "code": dict(code), "identity": now}
        file.append(json.dumps(header).encode("ascii"))
    return recorded, begun_with


def _events(path: Path, payloads: tuple[bytes, ...]) -> Iterator[Event]:
    for number, payload in enumerate(payloads, start=2):
        try:
            yield from_json(json.loads(payload))
        except (ValueError, TypeError, RecursionError) as error:
            raise RunDirectoryError(
                f"Line {number} of {path} is intact, but it is not an event of this version: {error} Use the "
                "version of dspy_greater that wrote it, or another log_dir."
            ) from error


def _header(payload: bytes) -> Any:
    """The value of the first line; None if Python cannot hold what it says, as with ten thousand brackets."""
    try:
        header = json.loads(payload)
        _flat(header)
    except (ValueError, RecursionError):
        return None
    return header


def _check_header(path: Path, header: Any, now: dict[str, JSON]) -> dict[str, str]:
    """The versions that the header names, if it is that of a run with this identity."""
    known = as_mapping(header)
    if known.get("format") != FORMAT:
        raise RunDirectoryError(f"{path} is not a journal. Move it away, or use another log_dir.")
    version = known.get("version")
    if version != VERSION:
        age = "an older" if version == 1 else "another"
        raise RunDirectoryError(
            f"{path} has format version {version}: {age} dspy_greater wrote it, and this one has another form for "
            f"events (version {VERSION}), so it cannot go on from there. Finish that run with the dspy_greater that "
            f"began it, use another log_dir, or delete {path} to begin again."
        )
    differences = list(_differences(_flat(known.get("identity")), _flat(now)))
    if not differences:
        return {name: str(told) for name, told in as_mapping(known.get("versions")).items()}
    shown = differences[:_MOST_DIFFERENCES]
    if len(differences) > len(shown):
        shown.append(f"and {len(differences) - len(shown)} more")
    raise RunDirectoryError(
        f"{path} belongs to a run that began otherwise (then -> now):\n  "
        + "\n  ".join(shown)
        + f"\nGo on with what it began with, use another log_dir, or delete {path} to begin again."
    )


def _warn_of_other_code(path: Path, then: Mapping[str, Any], now: Mapping[str, str]) -> None:
    """Not where another Python compiled it, whose digests cannot be compared."""
    other = [name for name, digest in now.items() if then.get(name, digest) != digest]
    if other and "Python" not in other:
        warn_caller(
            f"{path} goes on with other code than it was begun with: {', '.join(other)}. What was scored under the "
            "code of then stays as it is. If the code of now answers or scores otherwise, use another log_dir, or "
            f"delete {path} to begin again.",
        )


def _refuse_damage(path: Path, content: bytes, intact: lines.Intact) -> NoReturn:
    number = cast("int", intact.damaged_line)
    try:
        kept = f"A copy is in {_back_up(path, content)}."
    except OSError as error:
        kept = f"No copy could be made: {error.strerror or error}."
    if number == 1:
        fix = f"Delete {path} to begin again, or use another log_dir."
    else:
        fix = (
            f"Delete line {number} and all after it to go on from the {number - 2} events before it, "
            f"delete {path} to begin again, or use another log_dir."
        )
    raise RunDirectoryError(f"Line {number} of {path} is damaged. {kept} {fix}")


def _back_up(path: Path, content: bytes) -> Path:
    """A copy beside the file; the same damage is copied once."""
    numbered = (path.with_name(f"{path.name}.damaged-{number}") for number in itertools.count(1))
    copy = next(backup for backup in numbered if not os.path.lexists(backup) or _holds(backup, content))
    if not copy.exists():
        with open(copy, "xb") as file:
            file.write(content)
    return copy


def _holds(path: Path, content: bytes) -> bool:
    """Whether this is a file of its own with that content; a link or a pipe is left alone."""
    is_own = path.is_file() and not path.is_symlink()
    return is_own and path.stat().st_size == len(content) and path.read_bytes() == content


def _flat(value: Any) -> dict[tuple[str, ...], str]:
    """Every value inside nested mappings as JSON text, by its keys."""
    return {path: json.dumps(leaf, sort_keys=True, ensure_ascii=False) for path, leaf in leaves(value)}


def _differences(then: dict[tuple[str, ...], str], now: dict[tuple[str, ...], str]) -> Iterator[str]:
    """One line per key whose value is not the same."""
    for path in dict.fromkeys((*then, *now)):
        before, after = then.get(path, _ABSENT), now.get(path, _ABSENT)
        if before != after:
            # Long values often differ late: show the place.
            same = len(os.path.commonprefix([before, after]))
            is_long = max(len(before), len(after)) > _WIDEST_VALUE
            start = max(0, same - _WIDEST_VALUE // 4) if is_long else 0
            yield f"{'.'.join(path) or 'identity'}: {_excerpt(before, start)} -> {_excerpt(after, start)}"


def _excerpt(text: str, start: int) -> str:
    stop = start + _WIDEST_VALUE
    return ("..." if start else "") + text[start:stop] + ("..." if stop < len(text) else "")
