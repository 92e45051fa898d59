"""What the quickstart counts as right: the gold answer, or the text of the option that it is the letter of."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import dspy
import pytest

CHOICE = "Which colour is the cup?\nOptions:\n(A) red\n(B) light blue"


def quickstart() -> Any:
    path = Path(__file__).resolve().parent.parent / "examples" / "quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("question", "gold", "given", "right"),
    [
        *((CHOICE, "(B)", each, True) for each in ("(B)", "(b)", "Light blue.", "(B) light blue", " light blue ")),
        *((CHOICE, "(B)", each, False) for each in ("(A)", "red", "(A) light blue", "light", "", "(A) or (B)")),
        ("Is it so?", "Yes", "yes", True),
        *(("Is it so?", "Yes", each, False) for each in ("Yes.", "Yes, it is")),
        ("Options:\n(A) 3", "3", "(A)", False),
    ],
)
def test_an_answer_is_right_where_it_is_the_gold_one_or_the_text_of_its_option(
    question: str, gold: str, given: str, right: bool
) -> None:
    row = dspy.Example(question=question, answer=gold).with_inputs("question")
    assert quickstart().exact_match(row, dspy.Prediction(answer=given)) is right
