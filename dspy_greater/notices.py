"""Warnings that point to the line that the user wrote, whatever lies between it and the warning."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

_INSIDE = ("dspy_greater", "dspy")  # the packages whose lines the user did not write


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, as of the nearest line on the stack that is neither this package's nor DSPy's.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as told:
        ...     warnings.simplefilter("always")
        ...     warn_caller("careful")
        >>> str(told[0].message)
        'careful'
    """
    frame: FrameType | None = sys._getframe(1)
    level = 2  # 1 is the line of `warnings.warn` below
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
