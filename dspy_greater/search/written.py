"""Instructions that the model writes itself, whole: asked with right answers, and with what it got wrong.

A token at a time, a search stays near where it began. The model whose instruction is optimised knows the language of
its task, so it is asked for other instructions now and then, in two ways in turn. From right answers alone it says
what is asked for and in which form; other tasks with their instructions come first, because a small model repeats a
request that comes without. From its mistakes it says what to do better. It is asked again at once where that made
fewer mistakes than anything before, and else ever more seldom. What it writes reasons for itself, as any edit; the
gradient has nothing to say of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from dspy_greater.model.interface import GenerationRequest
from dspy_greater.objective.evaluator import Instruction
from dspy_greater.objective.types import RowOutcome
from dspy_greater.search.edits import Edit
from dspy_greater.search.state import ends_sentence
from dspy_greater.search.step import StepContext

EXAMPLES = 3  # rows in a request about mistakes, which come first
ANSWERED = 4  # rows in a request about right answers
_LONGEST = 400  # characters of a text in a request
ROOM = 32  # tokens that a request leaves beside the instruction: a greeting, a cut sentence
_TEMPERATURE, _TOP_P = 0.8, 0.95

Message = dict[str, str]


@dataclass(frozen=True)
class _Lesson:
    """A task with an instruction for it, which says what to find out and how to write the answer."""

    rows: tuple[str, str]
    instruction: str


# Each has another form of answer: a word of a few, a value, one of the options.
_LESSONS = (
    _Lesson(
        (
            "review: The soup was cold and the waiter rude.\nRight mood: negative",
            "review: We will certainly come again!\nRight mood: positive",
        ),
        "Decide whether the guest was content. Answer with the one word positive or negative.",
    ),
    _Lesson(
        (
            "question: A train leaves at 14:30 and needs 45 minutes. When does it arrive?\nRight answer: 15:15",
            "question: A bus leaves at 09:50 and needs 20 minutes. When does it arrive?\nRight answer: 10:10",
        ),
        "Add the minutes to the time of departure step by step, and carry over at 60. Answer with the time alone, "
        "such as 15:15.",
    ),
    _Lesson(
        (
            "question: Which is the heaviest? (A) a cat (B) a cow (C) a mouse\nRight answer: (B)",
            "question: Which is the longest? (A) a river (B) a pond (C) a puddle\nRight answer: (A)",
        ),
        "Compare the options with each other one after the other. Answer with the letter of the right option in "
        "brackets, such as (B).",
    ),
)

# What requests about mistakes ask for besides, each for something else: the same words would come back otherwise.
_ACCENTS = (
    "Name the steps to take, in order.",
    "Say what is easily got wrong.",
    "Be short and exact.",
    "Say how to write down what is found on the way.",
)


def writes(at: StepContext) -> bool:
    """Whether the step asks for whole instructions."""
    due = asks(at.state.step - at.state.rewritten)
    return at.settings.written > 0 and due and any(row.inputs for row in at.current.rows)


def asks(steps: int) -> bool:
    """Whether to ask, so many steps after that was last worth it (or after the search began).

    At once, and after ever longer breaks: a model that cannot write instructions is asked a few times and no more.

    >>> [steps for steps in range(64) if asks(steps)]
    [0, 2, 6, 14, 30, 62]
    """
    return (steps + 2).bit_count() == 1


def propose_written(at: StepContext) -> tuple[Edit, ...]:
    """What the model writes when it is asked for a better instruction, as far as it can be deployed and is new."""
    generations = at.model.generate(requests(at))
    texts = [at.evaluator.layout.encoder.decode(each.token_ids) for each in generations]
    edits = [_edit(at, text) for text in dict.fromkeys(map(instruction_in, texts)) if text]
    return tuple({each.instruction.text: each for each in edits if each is not None}.values())


def requests(at: StepContext) -> list[GenerationRequest]:
    """What the model is asked in this step, as far as it has room for an answer."""
    random = Random(f"{at.random_seed}/{at.predictor}/{at.state.step}/written")
    room = at.settings.max_instruction_tokens + ROOM
    return [
        GenerationRequest(prompt, room, _TEMPERATURE, _TOP_P, seed=random.randrange(2**31))
        for prompt in (at.evaluator.layout.encoder.chat_ids(each) for each in _requests(at, random))
        if _fits(at, len(prompt) + room)
    ]


def instruction_in(answer: str) -> str:
    """The instruction in an answer, on one line: without quotation marks, a heading and a sentence that was cut off.

    >>> instruction_in('"List the items.\\nThen add the numbers." ')
    'List the items. Then add the numbers.'
    >>> instruction_in("Instruction: Count every item. Then add")
    'Count every item.'
    """
    lines = [line.strip() for line in answer.strip().splitlines()]
    text = " ".join(line for line in lines if line and not line.startswith(("```", "#")))
    heading, colon, rest = text.partition(":")
    if colon and "instruction" in heading.lower() and len(heading.split()) <= 4:
        text = rest
    text = text.strip().strip("\"'`*").strip()
    ends = [at + 1 for at, letter in enumerate(text) if ends_sentence(text[: at + 1]) and letter in ".!?。！？"]
    return text[: ends[-1]] if ends else text


def _requests(at: StepContext, random: Random) -> list[list[Message]]:
    """As many as are asked for, each with rows of its own; from right answers and from mistakes in turn."""
    called = [row for row in at.current.rows if row.inputs]
    answered = [row for row in called if at.evaluator.examples.labels(row)]
    accents = itertools.cycle(random.sample(_ACCENTS, len(_ACCENTS)))
    return [
        _from_answers(at, answered, random)
        if answered and number % 2 == 0
        else [_from_mistakes(at, called, next(accents), random)]
        for number in range(at.settings.written)
    ]


def _from_answers(at: StepContext, answered: Sequence[RowOutcome], random: Random) -> list[Message]:
    """Other tasks with their instructions, in an order of their own, and then the rows of this one."""
    messages: list[Message] = []
    for lesson in random.sample(_LESSONS, len(_LESSONS)):
        messages += [_user(_ask(lesson.rows)), {"role": "assistant", "content": lesson.instruction}]
    rows = random.sample(answered, min(ANSWERED, len(answered)))
    return [*messages, _user(_ask([_shown(at, row, mistakes=False) for row in rows]))]


def _ask(rows: Sequence[str]) -> str:
    return "\n\n".join([*rows, "Write the instruction for this task."])


def _from_mistakes(at: StepContext, called: Sequence[RowOutcome], accent: str, random: Random) -> Message:
    """The current instruction, and rows that went wrong under it first."""
    rows = sorted(random.sample(called, len(called)), key=lambda row: row.score)[:EXAMPLES]
    shown = "\n\n".join(_shown(at, row) for row in rows)
    return _user(
        "An assistant follows the instruction below. Write a better one.\n\n"
        f"Instruction: {at.current.instruction}\n\n"
        f"What it was given, and what would have been right:\n\n{shown}\n\n"
        "Write an instruction that helps the assistant with everything of this kind, in one or two sentences that "
        f"tell it what to do. {accent} Do not repeat any of the examples. Write the instruction and nothing else."
    )


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _shown(at: StepContext, row: RowOutcome, *, mistakes: bool = True) -> str:
    """An example: inputs, what was reasoned where that went wrong, and the right answer where there is one."""
    lines = [f"{name}: {_shortened(value)}" for name, value in row.inputs.items()]
    if mistakes and row.score < 1.0:
        lines += [f"It wrote: {_shortened(text)}" for text in row.written.values() if text]
    labels = at.evaluator.examples.labels(row)
    return "\n".join([*lines, *(f"Right {name}: {_shortened(text)}" for name, text in labels.items())])


def _shortened(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _fits(at: StepContext, tokens: int) -> bool:
    limit = at.model.context_length
    return limit is None or tokens <= limit


def _edit(at: StepContext, text: str) -> Edit | None:
    """The edit; None for what cannot be deployed, is known, or was only copied from another task's lesson."""
    edits = at.evaluator.layout.edits
    written = edits.rewrite(text)
    if written is None or at.evaluator.knows(written[1]) or any(text == lesson.instruction for lesson in _LESSONS):
        return None
    ids, text = written
    if edits.length(ids) > at.settings.max_instruction_tokens:
        return None
    return Edit("rewrite", ids, Instruction(ids, text), math.nan, origin="written")
