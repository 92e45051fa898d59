"""Sentences that say what a right answer looks like, made of the gold values themselves.

A model that answers "red" where "(B)" is asked for is wrong on every row, however well it reasons, and no single token
of the instruction mends that. The gold values of the training rows say the form, so no model has to be asked for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from enum import Enum
from random import Random

from dspy_greater.prompt.gold import in_words

_MOST = 4  # different values that are all named
_LONGEST = 40  # characters of a value that has a form; longer ones are texts
_SHOWN = 3  # values that stand for all, where there are more


def answer_forms(golds: Sequence[object], instruction: str, random: Random) -> tuple[str, ...]:
    """Two sentences to put behind an instruction: all values where they come again, otherwise some of them.

    None where the instruction names them already, or an answer is a text of its own.

    >>> answer_forms(["No", "Yes", "No", "No"], "Answer the question.", Random(0))
    ('Answer with one word: No or Yes.', 'The answer is No or Yes.')
    >>> answer_forms(["(B)", "(A)", "(D)", "(C)", "(E)"], "Answer the question.", Random(0))
    ('Answer in the form of (D).', 'Right answers look like (D), (E), (A).')
    >>> answer_forms(["(B)", "(A)", "(D)", "(C)", "(E)"], "Answer with a letter, such as (C).", Random(0))
    ()
    """
    texts = [_text(gold) for gold in golds]
    values = sorted({text for text in texts if text is not None})
    if None in texts or not values:
        return ()
    if len(values) <= min(_MOST, len(texts) // 2):
        if all(_named(values, instruction)):
            return ()
        named = " or ".join([", ".join(values[:-1]), values[-1]] if len(values) > 1 else values)
        words = "one word" if all(value.isalnum() for value in values) else "one of these"
        return f"Answer with {words}: {named}.", f"The answer is {named}."
    if any(_named(values, instruction)):
        return ()
    shown = random.sample(values, min(_SHOWN, len(values)))
    return f"Answer in the form of {shown[0]}.", f"Right answers look like {', '.join(shown)}."


def _named(values: Sequence[str], instruction: str) -> Iterable[bool]:
    """Which values stand in the instruction as words of their own."""
    return (bool(re.search(rf"(?<!\w){re.escape(value)}(?!\w)", instruction, re.IGNORECASE)) for value in values)


def _text(gold: object) -> str | None:
    """A value on one line, as it is asked for; None for what has no form to show."""
    text = " ".join(in_words(gold).split()) if isinstance(gold, str | int | float | Enum) else ""
    return text if 0 < len(text) <= _LONGEST else None
