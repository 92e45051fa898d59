"""`report.html` in a run's directory, written while the run goes on, for at most a hundredth of its time."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from dspy_greater.report.data import report_of
from dspy_greater.report.page import page
from dspy_greater.run.events import BeamStarted, BeamValidated, Event, SearchStarted, Warned
from dspy_greater.run.files import replace_text, warn_unwritten
from dspy_greater.run.record import Record

NAME = "report.html"
_SHARE = 100  # a report that took a second is written again a hundred seconds later at the earliest


class ReportFile(AbstractContextManager["ReportFile"]):
    """A listener that keeps `report.html` in a run's directory up to date; without a directory, nothing.

    It writes after an event unless the last writing was so recent that all of them together would cost more than a
    hundredth of the run; `close`, which a `with` statement calls, writes what is missing. The file is replaced as a
    whole, so a reader never sees half of it. Where it cannot be written, that is warned of once and tried again.

    Args:
        log_dir: the run's directory.
        identity: what the run depends on.
        versions: of the software that it was begun with.
    """

    def __init__(
        self, log_dir: str | os.PathLike[str] | None, identity: Mapping[str, Any], versions: Mapping[str, str]
    ) -> None:
        self._folder = None if log_dir is None else Path(log_dir).expanduser()
        self._identity = json.loads(json.dumps(identity))  # as a journal holds it
        self._versions = dict(versions)
        self._events: list[Event] = []
        self._stale = False
        self._told = False
        self._not_before = time.monotonic()

    def __call__(self, event: Event) -> None:
        """Take the event in."""
        if self._folder is None or isinstance(event, (Warned, BeamValidated)):  # which no journal has
            return
        self._events.append(event)
        self._stale = True
        if isinstance(event, (SearchStarted, BeamStarted)) or time.monotonic() >= self._not_before:
            self._write(self._folder, again=True)

    def close(self) -> None:
        """Write what is missing; a report that cannot be made is a warning, for the search is worth more."""
        if self._folder is None or not self._stale:
            return
        try:
            self._write(self._folder, again=False)
        except Exception as error:
            self._warn(self._folder, error, again=False)

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _write(self, folder: Path, *, again: bool) -> None:
        self._stale = False  # also where the page cannot be made: once is enough
        began = time.monotonic()
        record = Record(self._identity, self._versions, tuple(self._events))
        text = page(report_of(record))
        try:
            replace_text(folder / NAME, text)
        except OSError as error:
            self._stale = True
            self._warn(folder, error, again=again)
        now = time.monotonic()
        self._not_before = now + _SHARE * (now - began)

    def _warn(self, folder: Path, error: Exception, *, again: bool) -> None:
        if not self._told:
            self._told = True
            hint = "`python -m dspy_greater report LOG_DIR` makes it from the journal."
            warn_unwritten(folder / NAME, error, again=again, hint=hint)
