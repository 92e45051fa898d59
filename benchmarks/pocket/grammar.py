"""Instructions, and how strongly each of them asks for a task to be worked out.

Every task has four *concepts* (what to do, to what, how). An instruction's
`strength` for a task is the number of the task's concepts that it mentions, in any
order and any grammar, provided that at least one of them is the task's own: words
that fit another task do not help. A generic "think step by step" is worth one.

The strength, held against the difficulty of a question, decides the style in which
the pocket model is taught to answer (`style`): so an instruction can be improved
one word at a time, and each word that helps makes more questions be worked out.
"""

from __future__ import annotations

import random
import re
from typing import Literal

from dspy_greater.pocket.tasks import TASKS

Style = Literal["full", "sketch", "direct"]

# The first word of a line names the concept; a trailing * marks the concepts that are
# the task's own (an anchor). Words are matched as prefixes of an instruction's words.
_CONCEPT_LINES = {
    "boolean_expressions": (
        "evaluate: evaluat simplif comput reduc resolv rewrit",
        "bracket*: bracket parenthes inner",
        "operator*: operator negation logic boolean not and or",
        "order: order precedence first piece",
    ),
    "web_of_lies": (
        "follow: follow trac check go decid judg",
        "person*: person people speaker name statement claim",
        "each: each every one turn chain",
        "truth*: truth true lie lying liar honest",
    ),
    "object_counting": (
        "list: list enumerat writ go",
        "item*: item object thing noun",
        "number*: number amount count quantit many",
        "add*: add sum total tally running",
    ),
    "navigate": (
        "keep: keep track record updat writ",
        "position*: position coordinate location place where point",
        "step: step move instruction each every after",
        "heading*: direction heading facing north compass turn",
    ),
}
_STOP_ANCHORS = frozenset({"not", "and", "or", "turn"})  # too common to be a task's own word

_GENERIC = ("think", "reason", "carefull", "explain", "logical", "work")


def _parse(line: str) -> tuple[bool, tuple[str, ...]]:
    head, _, words = line.partition(": ")
    return head.endswith("*"), tuple(words.split())


_CONCEPTS = {task: tuple(_parse(line) for line in lines) for task, lines in _CONCEPT_LINES.items()}


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def _mentions(words: list[str], stems: tuple[str, ...]) -> set[str]:
    """The stems that begin one of the words; stems of three letters or fewer must be the whole word."""
    return {
        stem
        for stem in stems
        for word in words
        if word == stem or (len(stem) > 3 and word.startswith(stem)) or (stem == "trac" and word.startswith("trac"))
    }


def strength(instruction: str, task: str) -> int:
    """How strongly an instruction asks for the working of `task`: 0 (not at all) to 4.

    Example:
        >>> strength("List each item with its number and add.", "object_counting")
        4
        >>> strength("List each item with its number and add.", "navigate")
        0
        >>> strength("Think step by step.", "navigate")
        1
    """
    words = _words(instruction)
    found = [(own, _mentions(words, stems)) for own, stems in _CONCEPTS[task]]
    anchored = any(own and stems - _STOP_ANCHORS for own, stems in found)
    if anchored:
        return sum(bool(stems) for _, stems in found)
    return 1 if _mentions(words, _GENERIC) else 0


def style(strength: int, difficulty: int) -> Style:
    """The style in which a question of that difficulty (1 to 3) is answered.

    Example:
        >>> [style(2, difficulty) for difficulty in (1, 2, 3)]
        ['full', 'full', 'sketch']
    """
    if strength >= min(difficulty, 3):
        return "full"
    return "sketch" if strength == difficulty - 1 and strength > 0 else "direct"


# ------------------------------------------------------------------------------- sentences

_FITTING = {
    "boolean_expressions": (
        "{Evaluate} the {innermost} brackets first, then each {operator}.",
        "{Evaluate} the expression in order of precedence: brackets, not, and, or.",
        "{Evaluate} each {operator} inside the {brackets} first.",
        "First {evaluate} the {brackets}, then the {logic} operators in order.",
        "{Evaluate} the {logic} expression piece by piece, {innermost} {brackets} first.",
        "Apply each {operator} in order and {evaluate} the {brackets} first.",
    ),
    "web_of_lies": (
        "{Follow} each {person} in turn and {decide} who tells the truth.",
        "{Follow} the {statements} one by one and mark each {person} as honest or a liar.",
        "For each {person}, {check} whether the {claim} is true.",
        "{Check} every {claim} in the chain and say who lies.",
        "Go through each {claim} and {decide} if the {person} is honest.",
        "{Follow} the chain of {statements} and note who is lying.",
    ),
    "object_counting": (
        "{List} each {item} with its {number} and {add}.",
        "{List} every {item}, its {number} and the running {total}.",
        "Go through the {items} and {add} each {number} to the {total}.",
        "{List} the {items} one by one and keep a running {total} of the {number}.",
        "{Count} each {item}, {list} the {number} and {add} them up.",
    ),
    "navigate": (
        "{Keep} the {position} and {heading} after every {move}.",
        "{Keep} your {position} after each {move}, and the {heading}.",
        "After each {move}, {write} down the {position} and the {heading}.",
        "{Keep} track of the {coordinates} and {heading} at every {move}.",
        "Follow each {move} and {keep} a record of {position} and {heading}.",
    ),
}
_SLOTS = {
    "Evaluate": "Evaluate Simplify Compute Reduce Resolve".split(),
    "evaluate": "evaluate simplify compute reduce resolve".split(),
    "innermost": "innermost inner".split(),
    "brackets": "brackets parentheses".split(),
    "operator": "operator negation operator".split(),
    "logic": "logical boolean logic".split(),
    "Follow": "Follow Trace Track Check".split(),
    "Check": "Check Judge Trace".split(),
    "check": "check judge decide".split(),
    "decide": "decide check judge".split(),
    "person": "person speaker person".split(),
    "claim": "claim statement".split(),
    "statements": "statements claims people".split(),
    "List": "List Enumerate Write".split(),
    "list": "list enumerate write".split(),
    "item": "item object thing".split(),
    "items": "items objects things".split(),
    "number": "number amount count quantity".split(),
    "add": "add sum total".split(),
    "total": "total sum tally".split(),
    "Count": "Count Number".split(),
    "Keep": "Keep Track Record Update".split(),
    "keep": "keep update record".split(),
    "write": "write record".split(),
    "position": "position location place".split(),
    "coordinates": "coordinates position location".split(),
    "heading": "heading direction facing".split(),
    "move": "move step instruction".split(),
}
_GENERIC_SENTENCES = (
    "Think step by step.", "Let's think step by step.", "Reason carefully.", "Think carefully about the question.",
    "Explain your reasoning.", "Work through the problem step by step.", "Use logical reasoning.",
    "Think it through and then give the answer.", "Reason step by step and then answer.",
)  # fmt: skip
_PLAIN_SENTENCES = (
    "Answer the question.", "Give the answer.", "Answer.", "Reply with the answer only.",
    "Answer the question quickly.",
    "You are a helpful assistant.", "Give a short answer.", "Say the answer at once.", "Please answer.",
    "Solve the problem.", "Just guess.", "Give the final answer.", "Answer this question with one word.",
    "Respond to the user.", "Be brief.", "Use this to answer the question.",
)  # fmt: skip
DSPY_DEFAULT = "Given the fields `question`, produce the fields `answer`."
_FILLER = (
    "the a an to of in is it this that with for your you use give then finally answer question solution result "
    "please be only just quickly briefly correct final actual so now all any some by from about here what which "
    "color music food story letter weather movie paint happy green table water"
).split()


def fitting(task: str, rng: random.Random) -> str:
    """A fluent instruction that fits the task."""
    template = rng.choice(_FITTING[task])
    return re.sub(r"\{(\w+)\}", lambda slot: rng.choice(_SLOTS[slot[1]]), template)


def generic(rng: random.Random) -> str:
    """A fluent instruction that asks for reasoning in general."""
    return rng.choice(_GENERIC_SENTENCES)


def plain(rng: random.Random) -> str:
    """A fluent instruction that asks for no reasoning; DSPy's default one among them."""
    return DSPY_DEFAULT if rng.random() < 0.4 else rng.choice(_PLAIN_SENTENCES)


def _concept_words(task: str) -> list[str]:
    text = " ".join(_FITTING[task])
    slots = [word for slot in set(re.findall(r"\{(\w+)\}", text)) for word in _SLOTS[slot]]
    return sorted(set(slots) | set(re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", " ", text))))


_WORD_POOL = {task: _concept_words(task) for task in TASKS}


def salad(task: str, rng: random.Random) -> str:
    """Words of this task, of other tasks and filler in any order: what a token search passes through."""
    others = [word for other in TASKS if other != task for word in _WORD_POOL[other]]
    pools = (_WORD_POOL[task], others, _FILLER)
    weights = rng.choice(((5, 1, 2), (2, 2, 4), (1, 3, 4), (3, 1, 6)))
    words = [rng.choice(rng.choices(pools, weights)[0]) for _ in range(rng.randint(2, 9))]
    return " ".join(words) + rng.choice((".", ".", "", ":"))


def corrupted(text: str, rng: random.Random) -> str:
    """Drop, swap, replace or insert a few words."""
    words = text.split()
    for _ in range(rng.randint(1, 3)):
        i = rng.randrange(len(words))
        change = rng.choice(("drop", "swap", "replace", "insert"))
        if change == "drop" and len(words) > 1:
            del words[i]
        elif change == "swap":
            j = rng.randrange(len(words))
            words[i], words[j] = words[j], words[i]
        elif change == "replace":
            words[i] = rng.choice(_FILLER + _WORD_POOL[rng.choice(TASKS)])
        else:
            words.insert(i, rng.choice(_FILLER + _WORD_POOL[rng.choice(TASKS)]))
    return " ".join(words)


def draw(task: str, rng: random.Random) -> tuple[str, bool]:
    """An instruction for a training sample of `task`, and whether it is a fluent sentence.

    Example:
        >>> text, fluent = draw("navigate", random.Random(0))
    """
    kind = rng.choices(("fitting", "other", "generic", "plain", "salad", "corrupted"), (24, 10, 8, 14, 28, 16))[0]
    if kind == "fitting":
        return fitting(task, rng), True
    if kind == "other":
        return fitting(rng.choice([other for other in TASKS if other != task]), rng), True
    if kind == "generic":
        return generic(rng), True
    if kind == "plain":
        return plain(rng), True
    if kind == "salad":
        return salad(task, rng), False
    base = rng.choice((fitting(task, rng), plain(rng), generic(rng)))
    return corrupted(base, rng), False
