"""What counts as the same answer, task by task: the way of writing is forgiven, the answer is not.

A normaliser turns the text of an answer into a form that can be compared, or None where the text holds no answer
or more than one. Gold answers go through the same normaliser.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from dspy_greater.prompt.gold import gold_of, labels_as_text

Normalise = Callable[[str, str], object]  # (answer, question) -> comparable form, None for no answer
Metric = Callable[..., float]

_OPTION = re.compile(r"^\(([A-Z])\) *(.*?) *$", re.MULTILINE)
_LETTER_IN_BRACKETS = re.compile(r"\(([A-Za-z])\)")
_LETTER_ALONE = re.compile(r"([A-Za-z])[.):]?")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_BRACKETS = "()[]{}<>"


def choice(answer: str, question: str) -> str | None:
    """The letter of a multiple-choice answer, or the option that is written out.

    Example:
        >>> asked = "Which one?\\nOptions:\\n(A) kite\\n(B) line"
        >>> choice("The answer is (B).", asked), choice("b)", asked), choice("Kite", asked), choice("(A) or (B)", asked)
        ('B', 'B', 'A', None)
    """
    text = answer.strip()
    begins = _LETTER_IN_BRACKETS.match(text)
    letters = {letter.upper() for letter in _LETTER_IN_BRACKETS.findall(text)}
    if len(letters) == 1 or (begins and not re.match(r"\W*(?:or|and)\b", text[begins.end() :])):
        return (begins[1] if begins else letters.pop()).upper()
    alone = _LETTER_ALONE.fullmatch(text)
    if alone:
        return alone[1].upper()
    if letters:
        return None
    options = {_plain(option): letter for letter, option in _OPTION.findall(question)}
    return options.get(_plain(text), _plain(text) or None)


def number(answer: str, question: str = "") -> Decimal | None:
    """The number of an answer: all of it, or the last one in a sentence; signs of thousands and money do not matter.

    Example:
        >>> number("$1,080.00") == number("It makes 1080 in all."), str(number("-1.5")), number("none")
        (True, '-1.5', None)
    """
    found = _NUMBER.findall(answer.replace("$", "").replace("\N{MINUS SIGN}", "-"))
    try:
        return Decimal(found[-1].replace(",", "")).normalize() if found else None
    except InvalidOperation:
        return None


def label(names: Sequence[str], aliases: Mapping[str, str] | None = None) -> Normalise:
    """One of a few words, in any case and sentence; None where two of them are named and neither comes first.

    Example:
        >>> truth = label(("True", "False", "Uncertain"), {"Unknown": "Uncertain"})
        >>> truth("It is unknown.", ""), truth("false", ""), truth("True or False", "")
        ('uncertain', 'false', None)
    """
    to_name = {name.lower(): name.lower() for name in names}
    to_name |= {alias.lower(): name.lower() for alias, name in (aliases or {}).items()}
    word = re.compile(rf"\b(?:{'|'.join(map(re.escape, to_name))})\b", re.IGNORECASE)

    def normalise(answer: str, question: str) -> str | None:
        text = answer.strip().strip("\"'*`.( )")
        found = {to_name[match.lower()] for match in word.findall(text)}
        if len(found) == 1:
            return found.pop()
        first = re.match(rf"({word.pattern})\s*[,.:;\n]", text, re.IGNORECASE)
        return to_name[first[1].lower()] if first else None

    return normalise


def brackets(answer: str, question: str = "") -> str | None:
    """A sequence of brackets, whatever stands between them.

    Example:
        >>> brackets("] ) >"), brackets("none")
        ('])>', None)
    """
    return "".join(letter for letter in answer if letter in _BRACKETS) or None


def words(answer: str, question: str = "") -> tuple[str, ...] | None:
    """A list of words: blanks, commas, numbering and lines between them are the same.

    Example:
        >>> words("1. fortescue, 2. it&t") == words("fortescue it&t")
        True
    """
    text = re.sub(r"(?:^|(?<=\s))(?:\d+[.)]|[-*])(?=\s)", " ", answer.lower())
    return tuple(word for each in re.split(r"[\s,;]+", text) if (word := each.strip("\"'`.:[]()"))) or None


def metric_of(normalise: Normalise) -> Metric:
    """A metric of DSPy's form: 1.0 where the prediction's answer is the example's, or one of them, otherwise 0.0.

    Example:
        >>> import dspy
        >>> row = dspy.Example(question="2 + 2", answer="4").with_inputs("question")
        >>> metric_of(number)(row, dspy.Prediction(answer="It is 4."))
        1.0
    """

    def metric(example: Any, prediction: Any, trace: object = None, *_: object) -> float:
        question = str(example.question)
        golds = [normalise(str(answer), question) for answer in gold_of(str, example.answer).answers]
        given = normalise(str(getattr(prediction, "answer", "")), question)
        return float(given is not None and given in golds)

    return metric


def expected(example: Any) -> dict[str, str]:
    """A row's right answers in words, by field.

    Example:
        >>> import dspy
        >>> expected(dspy.Example(question="2 + 2", answer=["4", "four"]).with_inputs("question"))
        {'answer': 'one of: 4; four'}
    """
    return labels_as_text(example.labels().toDict(), {"answer": str})


def _plain(text: str) -> str:
    return " ".join(text.lower().strip("\"'*`. ").split())
