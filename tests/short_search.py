"""A search of a few rows on the packaged model, for tests of what it runs on."""

from __future__ import annotations

from typing import Any

import dspy
from golden_runs import exact_match, plain, rows

from dspy_greater import GReaTer, local_lm


def short_search(lm: Any = None, **settings: Any) -> Any:
    """The program that it returns; `lm` is the packaged model where none is given."""
    found = rows("navigate", 8)
    short = {"auto": None, "train_rows": 4, "validation_rows": 4, "steps": 1, "written": 0, "progress": False}
    with dspy.context(lm=lm or local_lm("pocket", cache=False, max_tokens=60)):
        return GReaTer(metric=exact_match, **{**short, **settings}).compile(plain(), found[:4], valset=found[4:])
