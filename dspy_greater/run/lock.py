"""One run at a time in a directory: a lock that the system drops when its process dies."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any, cast

from dspy_greater.errors import RunDirectoryError
from dspy_greater.notices import warn_caller
from dspy_greater.run.lines import open_own

_TAKEN = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)
_LOCKED_BYTE = 1 << 30  # beyond the text, which others may then read on Windows too
_LONGEST_OWNER = 1000  # bytes

if sys.platform == "win32":
    import msvcrt

    def _take(descriptor: int) -> None:
        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

    def _drop(descriptor: int) -> None:
        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _take(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _drop(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


class DirectoryLock:
    """Held from `acquire` to `release`, or to the end of the process however it ends.

    The lock file stays behind, since removing it would let two runs lock two different files.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     lock = DirectoryLock.acquire(Path(directory))
        ...     lock.release()
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    @classmethod
    def acquire(cls, directory: Path) -> DirectoryLock:
        """Lock the directory for this process, without waiting.

        Where the file system has no locks, warns and goes on without one.

        Raises:
            RunDirectoryError: another run holds the lock; names its process and its host. Or the lock file is a link.
            OSError: the lock file cannot be written.
        """
        descriptor = open_own(directory / "journal.lock")
        try:
            _take_or_explain(descriptor, directory)
            owner = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)
            os.write(descriptor, owner.encode())
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor)

    def release(self) -> None:
        """Give the directory back; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        # Closing is not enough: a forked child that still runs has the same lock open.
        with contextlib.suppress(OSError):
            _drop(descriptor)
        os.close(descriptor)


def _take_or_explain(descriptor: int, directory: Path) -> None:
    try:
        _take(descriptor)
    except OSError as error:
        if error.errno in _TAKEN:
            raise RunDirectoryError(
                f"The run directory {directory} is in use by another run: {_owner(descriptor)}. "
                "Wait for it, end it, or give this run another log_dir."
            ) from error
        warn_caller(
            f"The file system of {directory} has no locks ({error.strerror}): "
            "make sure that no second run uses this directory at the same time.",
            RuntimeWarning,
        )


def _owner(descriptor: int) -> str:
    """Who holds the lock, as far as the file tells."""
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        owner: Any = json.loads(os.read(descriptor, _LONGEST_OWNER))
    except (OSError, ValueError):
        owner = None
    if not isinstance(owner, dict):
        return "a process that has not written its name yet"
    known = cast("dict[str, Any]", owner)
    return f"process {known.get('pid')} on host {known.get('host')}"
