"""Numbers of numpy, torch and their like as Python's own, so that they compare, print and save as such."""

from __future__ import annotations

import math
from typing import Any


def plain_scalar(value: Any) -> Any:
    """Python's own int, float or bool for an array's scalar; any other value as it is.

    Example:
        >>> import numpy as np
        >>> plain_scalar(np.int64(3)), plain_scalar(np.bool_(True)), plain_scalar("three")
        (3, True, 'three')
    """
    to_python = getattr(value, "item", None)
    if not callable(to_python) or math.prod(getattr(value, "shape", (0,))) != 1:
        return value
    return to_python()
