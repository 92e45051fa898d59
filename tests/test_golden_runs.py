"""Whatever is rebuilt, searches find what they found: the same instructions, and numbers within 1e-5."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from golden_runs import FOLDER, SEARCHES

_ROUNDING = 1e-5  # far above that of float64, in which searches are recorded: in float32 processors differ by more


def difference(found: Any, recorded: Any, where: str = "") -> str | None:
    """The first place where the two differ by more than rounding."""
    if isinstance(recorded, dict) and isinstance(found, dict) and found.keys() == recorded.keys():
        parts = [difference(found[name], recorded[name], f"{where}.{name}") for name in recorded]
    elif isinstance(recorded, list) and isinstance(found, (list, tuple)) and len(found) == len(recorded):
        parts = [difference(*pair, f"{where}[{at}]") for at, pair in enumerate(zip(found, recorded, strict=True))]
    elif isinstance(recorded, float) and isinstance(found, float):
        both_nan = math.isnan(found) and math.isnan(recorded)
        close = both_nan or math.isclose(found, recorded, rel_tol=_ROUNDING, abs_tol=_ROUNDING)
        parts = [] if close else [f"{where}: {found!r}, recorded was {recorded!r}"]
    else:
        parts = [] if found == recorded else [f"{where}: {found!r}, recorded was {recorded!r}"]
    return next((each for each in parts if each), None)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_recorded_search_is_found_again(name: str) -> None:
    recorded = [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()]
    assert len(recorded) > 5
    assert difference(SEARCHES[name](), recorded, name) is None


def test_another_number_an_other_instruction_and_a_missing_event_are_differences() -> None:
    event = {"chosen": "Think.", "numbers": [0.5, math.nan]}
    assert difference([event], [event]) is None
    assert difference([{**event, "numbers": [0.5001, math.nan]}], [event]) == (
        "[0].numbers[0]: 0.5001, recorded was 0.5"
    )
    assert difference([{**event, "chosen": "Guess."}], [event]) is not None
    assert difference([event, event], [event]) is not None
