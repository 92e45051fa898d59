"""A file of checksummed JSON lines that survives a kill, a power cut and a full disk.

A line is `{"crc32":"<8 hex digits>","payload":<JSON>}`. The checksum of a line starts from the
one before it, so that a line which was lost or moved is noticed as well as one that changed.
"""

from __future__ import annotations

import contextlib
import os
import stat
import zlib
from dataclasses import dataclass
from pathlib import Path

from dspy_greater.errors import RunDirectoryError

_START = b'{"crc32":"'
_MIDDLE = b'","payload":'
_HEAD = len(_START) + 8 + len(_MIDDLE)  # bytes before the payload


@dataclass(frozen=True)
class Intact:
    """The intact beginning of a file of lines."""

    payloads: tuple[bytes, ...] = ()  # one JSON text per line
    end: int = 0  # bytes
    checksum: int = 0  # of the last line
    damaged_line: int | None = None  # counted from 1; None when what follows `end` is only a torn last line


def frame(payload: bytes, checksum: int) -> bytes:
    """One line, after a line with this checksum.

    Example:
        >>> frame(b"1", 0)
        b'{"crc32":"83dcefb7","payload":1}\\n'
    """
    return b"%b%08x%b%b}\n" % (_START, zlib.crc32(payload, checksum), _MIDDLE, payload)


def read(data: bytes) -> Intact:
    """The lines up to the first that is torn or damaged.

    A last line without a newline, or whose checksum is wrong, is torn: the process or the power ended
    while it was written. Anywhere else a wrong line is damage.

    Example:
        >>> read(frame(b"1", 0) + b'{"crc').payloads
        (b'1',)
    """
    lines = data.split(b"\n")
    rest = lines.pop()
    found = Intact()
    for number, line in enumerate(lines, start=1):
        payload = line[_HEAD:-1]
        if line + b"\n" != frame(payload, found.checksum):
            is_torn = number == len(lines) > 1 and not rest
            return found if is_torn else _damaged(found, number)
        checksum = zlib.crc32(payload, found.checksum)
        found = Intact((*found.payloads, payload), found.end + len(line) + 1, checksum)
    if not lines and not _is_torn_start(rest):
        return _damaged(found, 1)
    return found


def _damaged(found: Intact, number: int) -> Intact:
    return Intact(found.payloads, found.end, found.checksum, damaged_line=number)


def _is_torn_start(rest: bytes) -> bool:
    """Whether this can be the beginning of our first line, rather than somebody else's file."""
    return not rest.strip(b"\0") or rest[: len(_START)] == _START[: len(rest)]


class LineFile:
    """An open file of lines, to be read once and then only appended to.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     file = LineFile(Path(directory) / "lines.jsonl")
        ...     file.append(b"1")
        ...     read(file.content()).payloads
        ...     file.close()
        (b'1',)
    """

    def __init__(self, path: Path) -> None:
        """Open or create the file.

        Raises:
            RunDirectoryError: the path is not a regular file, or a link to one.
            OSError: it cannot be opened for writing.
        """
        self.path = path
        self._descriptor = open_own(path)
        self._end = 0
        self._checksum = 0
        self._open = True
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            self.close()
            raise RunDirectoryError(f"{path} is not a regular file. Move it away, or use another log_dir.")

    def content(self) -> bytes:
        """All bytes of the file."""
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        chunks: list[bytes] = []
        while chunk := os.read(self._descriptor, 1 << 20):
            chunks.append(chunk)
        return b"".join(chunks)

    def resume(self, intact: Intact) -> None:
        """Cut off what follows the intact lines, and append after them from now on.

        Raises:
            OSError: the file cannot be written.
        """
        os.ftruncate(self._descriptor, intact.end)
        self._end, self._checksum = intact.end, intact.checksum

    def append(self, payload: bytes) -> None:
        """Write one line and wait until it is on the disk; all of it, or nothing.

        Raises:
            OSError: it could not be written.
        """
        line = frame(payload, self._checksum)
        try:
            os.ftruncate(self._descriptor, self._end)  # whatever an interrupted append left behind
            os.lseek(self._descriptor, self._end, os.SEEK_SET)
            unwritten = memoryview(line)
            while unwritten:
                unwritten = unwritten[os.write(self._descriptor, unwritten) :]
            os.fsync(self._descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._end)
            raise
        self._end += len(line)
        self._checksum = zlib.crc32(payload, self._checksum)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._open:
            self._open = False
            os.close(self._descriptor)


def open_own(path: Path) -> int:
    """Open or create a run's file for reading and writing; never one elsewhere, to which a link leads.

    Raises:
        RunDirectoryError: there is a link in its place.
        OSError: it cannot be opened.
    """
    if path.is_symlink():
        raise RunDirectoryError(
            f"{path} is a symbolic link, and a run writes into its own directory only. Remove it, or give log_dir the "
            "directory that is meant."
        )
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
    return os.open(path, flags, 0o644)


def sync_directory(directory: Path) -> None:
    """Wait until the names of the files in a directory are on the disk, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
