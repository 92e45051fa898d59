"""Files of a run's directory that are replaced as a whole: a reader never sees half of one."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from dspy_greater.notices import warn_caller


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


def warn_unwritten(path: Path, error: Exception, *, again: bool, hint: str = "") -> None:
    """Warn that a file is missing or old; `again` says that the run tries once more.

    >>> import warnings
    >>> with warnings.catch_warnings(record=True) as told:
    ...     warnings.simplefilter("always")
    ...     warn_unwritten(Path("best.json"), OSError(28, "No space left on device"), again=True)
    >>> str(told[0].message)
    'best.json could not be written: OSError: [Errno 28] No space left on device. It is tried again as the run goes on.'
    """
    parts = [f"{path} could not be written: {type(error).__name__}: {error}."]
    parts += ["It is tried again as the run goes on."] if again else []
    warn_caller(" ".join([*parts, *filter(None, [hint])]), RuntimeWarning)
