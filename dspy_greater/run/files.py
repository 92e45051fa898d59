"""Files of a run's directory that are replaced as a whole: a reader never sees half of one."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Put a file with this text in the place of whatever has this name; a link is replaced and not followed.

    Raises:
        OSError: it could not be written.
    """
    partial = path.with_name(f".{path.name}.partial")  # of one name, so that a kill leaves no more than one behind
    partial.unlink(missing_ok=True)
    try:
        with open(partial, "x", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
