"""Whole instructions: the best one with the form of a right answer behind it, and what the model writes when asked.

A token at a time, a search stays near where it began. The gold values say in which form an answer is asked for, and
the model whose instruction is optimised knows the language of its task, so it is asked for other instructions now and
then, in two ways. From right answers alone it says what is asked for and in which form; other tasks with their
instructions come first, because a small model repeats a request that comes without. From its mistakes it says what to
do better. Whether it is asked again or an edit is tried is decided by what either has paid (`search.payoff`).
All of them reason for themselves, as any edit; the gradient has nothing to say of them.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from random import Random

from dspy_greater.model.interface import GenerationRequest
from dspy_greater.objective.evaluator import Instruction
from dspy_greater.objective.types import RowOutcome
from dspy_greater.prompt.thoughts import thought_tags
from dspy_greater.search.answer_form import answer_forms
from dspy_greater.search.edits import Edit, Origin
from dspy_greater.search.state import ends_sentence
from dspy_greater.search.step import StepContext

EXAMPLES = 3  # rows in a request about mistakes, which come first
ANSWERED = 4  # rows in a request about right answers
_SPARE = 0.5  # requests in addition: some answers are copies of what was shown, or known
_TURNS = 3  # requests of which one is about mistakes
_LONGEST = 400  # characters of a text in a request
ROOM = 32  # tokens that a request leaves beside the instruction: a greeting, a cut sentence
_TEMPERATURE, _TOP_P = 0.8, 0.95
# The end of a sentence, and neither that of an abbreviation nor a number in a list.
_SENTENCE = re.compile(r"(?<!\b\d)(?<!\b\d\d)[.!?][\"')\]]*(?=\s+[^a-z\s]|\s*$)|[。！？]")
_GREETINGS = ("sure", "certainly", "okay", "ok", "here", "here's")
_COPIED = 0.85  # of the words alike, in their order, from which on a text is a copy

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
    """Whether the step asks for whole instructions: the first does, and later ones where that paid more often."""
    called = any(row.inputs for row in at.current.rows)
    asked, edited = at.state.rewrites, at.state.edits
    return at.settings.written > 0 and called and (not asked.steps or asked.chance > edited.chance)


def propose_written(at: StepContext) -> tuple[Edit, ...]:
    """At most `written` of them that can be deployed and are new; forms where the best has become another one."""
    most = at.settings.written
    forms = _forms(at) if at.state.best[0].instruction != at.state.formed else []
    found = [*forms, *answered(at, requests(at, most - len(forms)))]
    return tuple({edit.instruction.text: edit for edit in found}.values())[:most]


def answered(at: StepContext, asked: Sequence[GenerationRequest]) -> list[Edit]:
    """What the model writes when it is asked, without what cannot be tried."""
    asking = at.evaluator.layout.asking
    tags = thought_tags(asking.tokenizer)
    texts: list[str] = []
    for generation in at.model.generate(asked):
        answer = asking.decode(generation.token_ids)
        text = answer if tags is None else tags.said(answer)
        texts.append(instruction_in(text, ended=generation.finish_reason == "stop"))
    edits = [_edit(at, text, "written") for text in dict.fromkeys(texts) if text]
    return [edit for edit in edits if edit is not None]


def requests(at: StepContext, wanted: int) -> list[GenerationRequest]:
    """Requests for so many instructions and some to spare, without those that leave the model no room for an answer."""
    count = asked_for(wanted)
    encoder, room, random = at.evaluator.layout.asking, at.settings.max_instruction_tokens + ROOM, _random(at)
    return [
        GenerationRequest(prompt, room, _TEMPERATURE, _TOP_P, seed=random.randrange(2**31))
        for prompt in map(encoder.chat_ids, _messages(at, count, random))
        if _fits(at, len(prompt) + room)
    ]


def asked_for(wanted: int) -> int:
    """How many requests are made for so many instructions.

    >>> asked_for(4)
    6
    """
    return wanted + math.ceil(_SPARE * wanted)


def _random(at: StepContext) -> Random:
    return Random(f"{at.random_seed}/{at.predictor}/{at.state.step}/written")


def _forms(at: StepContext) -> list[Edit]:
    """The best instruction, with what the gold values look like behind it."""
    best = at.state.best[0].instruction[len(at.state.fixed) :].strip()
    kept = best if not best or ends_sentence(best) else f"{best}."
    texts = [f"{kept} {form}".strip() for form in answer_forms(at.evaluator.examples.golds(), best, _random(at))]
    edits = [_edit(at, text, "form", kept) for text in texts]
    return [edit for edit in edits if edit is not None][: at.settings.written]


def instruction_in(answer: str, *, ended: bool) -> str:
    """The instruction in an answer, on one line, without quotation marks around it and words that introduce it.

    Of an answer that has not `ended` by itself, a sentence that was cut off is left out.

    >>> instruction_in('"List the items.\\nThen add the numbers." ', ended=True)
    'List the items. Then add the numbers.'
    >>> instruction_in("Instruction: Count all, e.g. 3.5 apples. Then add", ended=False)
    'Count all, e.g. 3.5 apples.'
    """
    lines = [line.strip() for line in answer.strip().splitlines()]
    lines = [line for line in lines if line and not line.startswith(("```", "#"))]
    if len(lines) > 1 and lines[0].endswith(":"):
        lines = lines[1:]
    text = _bare(_without_heading(" ".join(lines)))
    ends = [found.end() for found in _SENTENCE.finditer(text)]
    return text[: ends[-1]] if ends and not ended else text


def _without_heading(text: str) -> str:
    heading, _, rest = text.partition(":")
    words = heading.lower().split()
    named = len(words) <= 4 and "instruction" in heading.lower()
    greets = 0 < len(words) <= 10 and words[0].strip("!,.") in _GREETINGS
    return rest.strip() if (named or greets) and rest.strip() else text


def _bare(text: str) -> str:
    """Without marks around all of it, and without one that has lost its other half."""
    text = text.strip()
    for opening, closing in ("**", "**"), ("*", "*"), ("`", "`"), ('"', '"'), ("'", "'"), ("“", "”"):
        count = sum(text.count(mark) for mark in {opening, closing})
        if count == 1 or (count == 2 and text.startswith(opening) and text.endswith(closing)):
            text = text.removeprefix(opening).removesuffix(closing).strip()
    return text


def _messages(at: StepContext, count: int, random: Random) -> list[list[Message]]:
    """So many, each with rows of its own; two from right answers, and one from mistakes, in turn."""
    called = [row for row in at.current.rows if row.inputs]
    # Of another predictor's answers nobody can tell what this one is for.
    labelled = [row for row in called if at.evaluator.examples.labels(row, others=at.evaluator.alone)]
    accents = itertools.cycle(random.sample(_ACCENTS, len(_ACCENTS)))
    return [
        _from_answers(at, labelled, random)
        if labelled and number % _TURNS < _TURNS - 1
        else [_from_mistakes(at, called, next(accents), random)]
        for number in range(count)
    ]


def _from_answers(at: StepContext, labelled: Sequence[RowOutcome], random: Random) -> list[Message]:
    """Other tasks with their instructions, in an order of their own, and then the rows of this one."""
    messages: list[Message] = []
    for lesson in random.sample(_LESSONS, len(_LESSONS)):
        messages += [_user(_ask(lesson.rows)), {"role": "assistant", "content": lesson.instruction}]
    rows = random.sample(labelled, min(ANSWERED, len(labelled)))
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
    """An example: inputs, what the model wrote if it is about mistakes, and what is right where that is known."""
    lines = [f"{name}: {_shortened(value)}" for name, value in row.inputs.items()]
    if mistakes:
        fields = [text for text in row.written.values() if str(text).strip()]
        written = fields or [text for text in (row.preamble, *(call.completion for call in row.calls)) if text.strip()]
        lines += [f"It wrote: {_shortened(text)}" for text in written]
    labels = at.evaluator.examples.labels(row, others=True)
    return "\n".join([*lines, *(f"Right {name}: {_shortened(text)}" for name, text in labels.items())])


def _shortened(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _fits(at: StepContext, tokens: int) -> bool:
    limit = at.model.context_length
    return limit is None or tokens <= limit


def _is_copied(text: str) -> bool:
    """Whether it is another task's lesson but for a word or two."""
    return any(SequenceMatcher(None, text.split(), lesson.instruction.split()).ratio() > _COPIED for lesson in _LESSONS)


def _edit(at: StepContext, text: str, origin: Origin, kept: str = "") -> Edit | None:
    """The edit; None for what cannot be deployed, is known, or was only copied from another task's lesson."""
    edits = at.evaluator.layout.edits
    written = edits.rewrite(text, kept)
    if written is None or at.evaluator.knows(written[1]) or _is_copied(text):
        return None
    ids, text = written
    if edits.length(ids) > at.settings.max_instruction_tokens:
        return None
    return Edit("rewrite", ids, Instruction(ids, text), math.nan, origin=origin)
