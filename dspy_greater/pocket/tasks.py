"""Rows in the formats of four BIG-Bench Hard tasks, with the working that solves them.

`generate(task, rng)` draws a row; `work_out(task, question)` parses any question of
that format, a real benchmark row included, and writes its reasoning in two styles:
`full` keeps every step, `sketch` skips some. Both end in the state from which the
answer can be read.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dspy_greater.errors import DataError

TASKS = ("boolean_expressions", "web_of_lies", "object_counting", "navigate")


@dataclass(frozen=True)
class Working:
    """How one question is solved: reasoning in two styles, the answer, how hard it is."""

    full: str
    sketch: str
    answer: str
    difficulty: int  # 1 easy, 2 middle, 3 hard: how strong an instruction it takes


# --------------------------------------------------------------------------- boolean_expressions

EXPRESSION_LENGTH = 8  # every row of the benchmark has exactly eight symbols before "is"


def _random_expression(length: int, rng: random.Random) -> list[str]:
    """A random expression of exactly `length` symbols over True False not and or ( )."""
    if length == 1:
        return [rng.choice(("True", "False"))]
    forms = ["not"] + (["binary", "binary"] if length >= 3 else []) + (["brackets"] if length >= 3 else [])
    form = rng.choice(forms)
    if form == "not":
        return ["not", *_random_expression(length - 1, rng)]
    if form == "brackets":
        return ["(", *_random_expression(length - 2, rng), ")"]
    left = rng.randint(1, length - 2)
    operator = rng.choice(("and", "or"))
    return [*_random_expression(left, rng), operator, *_random_expression(length - 1 - left, rng)]


def _generate_boolean(rng: random.Random) -> str:
    return " ".join(_random_expression(EXPRESSION_LENGTH, rng)) + " is"


def _reduce_once(symbols: list[str]) -> list[str]:
    """Apply the first rule that fits: unwrap ( v ), then not v, then v and v, then v or v."""
    value = ("True", "False")
    for i in range(len(symbols) - 2):
        if symbols[i] == "(" and symbols[i + 1] in value and symbols[i + 2] == ")":
            return [*symbols[:i], symbols[i + 1], *symbols[i + 3 :]]
    for i in range(len(symbols) - 1):
        if symbols[i] == "not" and symbols[i + 1] in value:
            return [*symbols[:i], str(symbols[i + 1] == "False"), *symbols[i + 2 :]]
    for operator in ("and", "or"):
        for i in range(len(symbols) - 2):
            left, middle, right = symbols[i : i + 3]
            if left in value and middle == operator and right in value:
                if operator == "or" and "and" in (symbols[i - 1 : i] + symbols[i + 3 : i + 4]):
                    continue  # `and` binds tighter on either side
                both = (left == "True", right == "True")
                result = all(both) if operator == "and" else any(both)
                return [*symbols[:i], str(result), *symbols[i + 3 :]]
    raise DataError(f"not a boolean expression: {' '.join(symbols)!r}")


def _work_out_boolean(question: str) -> Working:
    symbols = question.removesuffix(" is").split()
    lines = [symbols]
    while len(lines[-1]) > 1:
        lines.append(_reduce_once(lines[-1]))
    texts = [" ".join(line) for line in lines]
    values = symbols.count("True") + symbols.count("False")
    return Working(
        full=" = ".join(texts),
        sketch=" = ".join(texts[:1] + texts[1:-1][2::3]),
        answer=texts[-1],
        difficulty=1 if values <= 2 else 2 if values == 3 else 3,
    )


# --------------------------------------------------------------------------- web_of_lies

NAMES = (
    "Alejandro Alexis Amberly Andree Antwan Audrie Bernita Christie Conception Crista Dallas Delbert "
    "Delfina Elanor Fidel Fletcher Gwenn Helene Inga Jamey Jaymie Jerry Jim Ka Kandi Kristian Leda Lorine "
    "Maybelle Michael Michaela Millicent Millie Osvaldo Phoebe Rashida Raymond Ryan Sal Shalonda Shaunda "
    "Shenna Sherrie Sima Tamika Teressa Vernell Vina Willian Yoland "
    "Alice Bob Claire Dave Eve Fred Grace Henry Iris Jack Karen Leo Mona Nina Oscar Paula Quinn Rosa"
).split()


def _generate_web(rng: random.Random) -> str:
    people = rng.sample(NAMES, 5)
    says = [rng.choice(("tells the truth", "lies")) for _ in people]
    sentences = [f"{people[0]} {says[0]}."]
    sentences += [f"{people[i]} says {people[i - 1]} {says[i]}." for i in range(1, 5)]
    return f"Question: {' '.join(sentences)} Does {people[-1]} tell the truth?"


def _work_out_web(question: str) -> Working:
    sentences = question.removeprefix("Question: ").split(". ")
    *statements, _ = sentences
    honest: dict[str, bool] = {}
    steps, verdicts = [], []
    for statement in statements:
        person, _, claim = statement.partition(" says ")
        if claim:
            about, _, rest = claim.partition(" ")
            honest[person] = honest[about] == (rest == "tells the truth")
        else:
            person, _, rest = statement.partition(" ")
            honest[person] = rest == "tells the truth"
        verdict = "honest" if honest[person] else "liar"
        steps.append(f"{statement}: {verdict}.")
        verdicts.append(f"{person}: {verdict}.")
    asked = re.search(r"Does (\w+) tell", sentences[-1])
    if asked is None:
        raise DataError(f"not a web_of_lies question: {question!r}")
    lies = sum(statement.endswith(" lies") for statement in statements)
    return Working(
        full=" ".join(steps),
        sketch=" ".join(verdicts[::2]),
        answer="Yes" if honest[asked.group(1)] else "No",
        difficulty=1 if lies <= 2 else 2 if lies == 3 else 3,
    )


# --------------------------------------------------------------------------- object_counting

# singular with its article -> plural
_KINDS: dict[str, dict[str, str]] = {
    "fruits": {
        "a banana": "bananas", "a blackberry": "blackberries", "a grape": "grapes",
        "a nectarine": "nectarines", "a peach": "peaches", "a plum": "plums",
        "a raspberry": "raspberries", "a strawberry": "strawberries", "an apple": "apples",
        "an orange": "oranges", "a cherry": "cherries", "a pear": "pears",
    },
    "vegetables": {
        "a cabbage": "cabbages", "a carrot": "carrots", "a cauliflower": "cauliflowers",
        "a garlic": "garlics", "a head of broccoli": "heads of broccoli",
        "a lettuce head": "lettuce heads", "a potato": "potatoes",
        "a stalk of celery": "stalks of celery", "a yam": "yams", "an onion": "onions",
        "a turnip": "turnips",
    },
    "musical instruments": {
        "a clarinet": "clarinets", "a drum": "drums", "a flute": "flutes", "a piano": "pianos",
        "a trombone": "trombones", "a trumpet": "trumpets", "a violin": "violins",
        "an accordion": "accordions", "a harp": "harps",
    },
    "animals": {
        "a bear": "bears", "a cat": "cats", "a chicken": "chickens", "a cow": "cows", "a dog": "dogs",
        "a donkey": "donkeys", "a duck": "ducks", "a fish": "fish", "a frog": "frogs",
        "a goat": "goats", "a mouse": "mice", "a pig": "pigs", "a rabbit": "rabbits",
        "a snail": "snails", "a snake": "snakes",
    },
    "objects": {
        "a bed": "beds", "a car": "cars", "a chair": "chairs", "a couch": "couches",
        "a fridge": "fridges", "a lamp": "lamps", "a microwave": "microwaves", "a stove": "stoves",
        "a table": "tables", "a toaster": "toasters", "an oven": "ovens",
    },
}  # fmt: skip
_NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4, "five": 5}
_KIND_OF = {
    name.split(" ", 1)[1] if number == "one" else plural: kind
    for kind, items in _KINDS.items()
    for name, plural in items.items()
    for number in ("one", "many")
}


def _phrase(singular: str, rng: random.Random) -> str:
    if rng.random() < 0.68:
        return singular
    plural = next(items[singular] for items in _KINDS.values() if singular in items)
    return f"{rng.choice(('two', 'three', 'four', 'five'))} {plural}"


def _generate_counting(rng: random.Random) -> str:
    kind = rng.choice(list(_KINDS))
    most = len(_KINDS[kind])
    items = rng.sample(list(_KINDS[kind]), min(most, rng.randint(2, 10)))
    if kind != "objects" and rng.random() < 0.6:
        other = "objects" if rng.random() < 0.7 else rng.choice([k for k in _KINDS if k not in (kind, "objects")])
        items += rng.sample(list(_KINDS[other]), rng.randint(1, 3))
        rng.shuffle(items)
    phrases = [_phrase(item, rng) for item in items]
    listing = (
        f"{phrases[0]} and {phrases[1]}" if len(phrases) == 2 else ", ".join(phrases[:-1]) + f", and {phrases[-1]}"
    )
    return f"I have {listing}. How many {kind} do I have?"


def _work_out_counting(question: str) -> Working:
    parsed = re.match(r"I have (.*)\. How many (.*) do I have\?", question)
    if parsed is None:
        raise DataError(f"not an object_counting question: {question!r}")
    total, steps, counted = 0, [], []
    for item in re.split(r", and |, | and ", parsed[1]):
        number, _, name = item.partition(" ")
        fits = parsed[2] == "objects" or _KIND_OF[name] == parsed[2]
        total += _NUMBERS[number] * fits
        steps.append(f"{item} + {_NUMBERS[number] * fits} = {total};")
        if fits:
            counted.append(name)
    return Working(
        full=" ".join(steps),
        sketch=", ".join(counted) + ";",
        answer=str(total),
        difficulty=1 if len(steps) <= 5 else 2 if len(steps) <= 8 else 3,
    )


# --------------------------------------------------------------------------- navigate

_COMPASS = ("north", "east", "south", "west")
_MOVES = {"north": (0, 1), "east": (1, 0), "south": (0, -1), "west": (-1, 0)}
_TURNS = {"right": 1, "around": 2, "left": 3}
_SIDES = {"forward": 0, "right": 1, "backward": 2, "left": 3}


def _random_moves(turning: bool, rng: random.Random) -> list[str]:
    """Instructions; about half of the walks are steered back to where they began."""
    moves = []
    for _ in range(rng.randint(2, 7)):
        if turning and rng.random() < 0.4:
            moves.append(f"Turn {rng.choice(list(_TURNS))}")
        else:
            moves.append(_take(rng.randint(1, 10), None if turning else rng.choice(list(_SIDES))))
    return moves


def _take(steps: int, side: str | None) -> str:
    return f"Take {steps} step{'s' * (steps > 1)}" + (f" {side}" if side else "")


def _steer_home(moves: list[str], turning: bool) -> list[str]:
    """Append what leads back to the start."""
    x, y, facing = _walk(moves)[-1]
    if not turning:
        back = ([_take(abs(x), "left" if x > 0 else "right")] if x else []) + (
            [_take(abs(y), "backward" if y > 0 else "forward")] if y else []
        )
        return moves + back
    for wanted, distance in (("west" if x > 0 else "east", abs(x)), ("south" if y > 0 else "north", abs(y))):
        turn = (_COMPASS.index(wanted) - _COMPASS.index(facing)) % 4
        if distance:
            if turn:
                moves = [*moves, f"Turn {next(name for name, quarter in _TURNS.items() if quarter == turn)}"]
            moves, facing = [*moves, _take(distance, None)], wanted
    return moves


def _walk(moves: list[str]) -> list[tuple[int, int, str]]:
    """Position and heading after each move, the start first."""
    x = y = heading = 0
    states = [(0, 0, "north")]
    for move in moves:
        verb, *rest = move.split()
        if verb == "Turn":
            heading = (heading + _TURNS[rest[0]]) % 4
        else:
            side = _SIDES[rest[2]] if len(rest) > 2 else 0
            dx, dy = _MOVES[_COMPASS[(heading + side) % 4]]
            x, y = x + dx * int(rest[0]), y + dy * int(rest[0])
        states.append((x, y, _COMPASS[heading]))
    return states


def _generate_navigate(rng: random.Random) -> str:
    turning = rng.random() < 0.5
    while True:
        moves = _random_moves(turning, rng)
        if rng.random() < 0.6:
            moves = _steer_home(moves, turning)
            order = list(moves)
            if not turning:  # without turns the order does not matter
                rng.shuffle(order)
            moves = order
        steps = [int(number) for move in moves for number in re.findall(r"\d+", move)]
        if 2 <= len(moves) <= 9 and steps and max(steps) <= 10:
            break
    face = "" if turning else "Always face forward. "
    return (
        "If you follow these instructions, do you return to the starting point? "
        f"{face}{'. '.join(moves)}.\nOptions:\n- Yes\n- No"
    )


def _work_out_navigate(question: str) -> Working:
    if not question.startswith("If you follow these instructions"):
        raise DataError(f"not a navigate question: {question!r}")
    body = question.split("?", 1)[1].split("\nOptions")[0]
    moves = [move.strip() for move in body.split(".") if move.strip() and "face" not in move]
    states = _walk(moves)
    told = [f"{x} {y} {heading}" for x, y, heading in states]
    steps = [f"{i}: {move.split(' ', 1)[1]}, now {told[i]}." for i, move in enumerate(moves, start=1)]
    home = states[-1][:2] == (0, 0)
    return Working(
        full=f"Start {told[0]}. " + " ".join(steps),
        sketch=f"Start {told[0]}. " + " ".join(f"{i}: {told[i]}." for i in range(2, len(told), 2)),
        answer="Yes" if home else "No",
        difficulty=1 if len(moves) <= 4 else 2 if len(moves) <= 6 else 3,
    )


# --------------------------------------------------------------------------- all of them

_GENERATE: dict[str, Callable[[random.Random], str]] = {
    "boolean_expressions": _generate_boolean,
    "web_of_lies": _generate_web,
    "object_counting": _generate_counting,
    "navigate": _generate_navigate,
}
_WORK_OUT: dict[str, Callable[[str], Working]] = {
    "boolean_expressions": _work_out_boolean,
    "web_of_lies": _work_out_web,
    "object_counting": _work_out_counting,
    "navigate": _work_out_navigate,
}


def fingerprint(question: str) -> str:
    """A short hash of a question, to tell benchmark rows from generated ones without storing them."""
    return hashlib.sha256(question.strip().encode()).hexdigest()[:12]


@cache
def benchmark_fingerprints() -> frozenset[str]:
    """Fingerprints of the benchmark's own rows: none of them is ever generated."""
    return frozenset(json.loads((Path(__file__).parent / "benchmark_fingerprints.json").read_text()))


def generate(task: str, rng: random.Random) -> str:
    """Draw a question that is not a row of the benchmark.

    Raises:
        KeyError: `task` is not one of `TASKS`.

    Example:
        >>> generate("boolean_expressions", random.Random(0)).endswith(" is")
        True
    """
    while True:
        question = _GENERATE[task](rng)
        if fingerprint(question) not in benchmark_fingerprints():
            return question


def work_out(task: str, question: str) -> Working:
    """Solve a question of the task's format, step by step.

    Raises:
        KeyError: `task` is not one of `TASKS`.
        DataError: the question is not of the task's format.

    Example:
        >>> work_out("object_counting", "I have a fish, and two bears. How many animals do I have?").answer
        '3'
    """
    return _WORK_OUT[task](question)
