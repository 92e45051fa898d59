"""A row, an instruction and a style of reasoning -> the chat that DSPy sends and reads.

The text is that of DSPy's ChatAdapter for `question -> answer`, with and without a
`reasoning` field; a test holds it against DSPy itself. It is written out here so
that training runs where DSPy is not installed.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from benchmarks.pocket import grammar
from dspy_greater.pocket.tasks import generate, work_out

SYSTEM, USER, ASSISTANT, END, PAD = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
SPECIAL_TOKENS = (PAD, SYSTEM, USER, ASSISTANT, END)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# What is printed for a value of a type other than str: (type name, note in the structure, note in the request)
_YES_NO = "Literal['Yes', 'No']"
ANSWER_TYPES = {
    "str": ("str", "", ""),
    "yes_no": (
        _YES_NO,
        "        # note: the value you produce must exactly match (no extra characters) one of: Yes; No",
        f" (must be formatted as a valid Python {_YES_NO})",
    ),
    "int": (
        "int",
        "        # note: the value you produce must be a single int value",
        " (must be formatted as a valid Python int)",
    ),
    "bool": (
        "bool",
        "        # note: the value you produce must be True or False",
        " (must be formatted as a valid Python bool)",
    ),
}
_TYPE_OF_TASK = {
    "boolean_expressions": "bool",
    "web_of_lies": "yes_no",
    "object_counting": "int",
    "navigate": "yes_no",
}
DIRECT_REASONING = "I answer at once."


@dataclass(frozen=True)
class Part:
    """A stretch of a transcript and the weight of its tokens in the training loss."""

    text: str
    weight: float


def _marker(field: str) -> str:
    return f"[[ ## {field} ## ]]"


def system_head(reasoning: bool, answer_type: str = "str") -> str:
    """ChatAdapter's system message up to where the instruction begins."""
    outputs = (["reasoning"] if reasoning else []) + ["answer"]
    type_name, note, _ = ANSWER_TYPES[answer_type]
    described = {
        "reasoning": "1. `reasoning` (str): \n",
        "answer": f"{len(outputs)}. `answer` ({type_name}):\n",
    }
    shown = {"reasoning": "{reasoning}", "answer": "{answer}" + note}
    fields = [f"{_marker(name)}\n{shown[name]}\n\n" for name in outputs]
    return (
        "Your input fields are:\n1. `question` (str):\nYour output fields are:\n"
        + "".join(described[name] for name in outputs)
        + "All interactions will be structured in the following way, with the appropriate values filled in.\n\n"
        + f"{_marker('question')}\n{{question}}\n\n"
        + "".join(fields)
        + f"{_marker('completed')}\nIn adhering to this structure, your objective is: \n        "
    )


def user_message(question: str, reasoning: bool, answer_type: str = "str") -> str:
    """ChatAdapter's user message."""
    request = f"`{_marker('answer')}`{ANSWER_TYPES[answer_type][2]}"
    request = f"`{_marker('reasoning')}`, then {request}" if reasoning else request
    return (
        f"{_marker('question')}\n{question}\n\nRespond with the corresponding output fields, starting with the field "
        f"{request}, and then ending with the marker for `{_marker('completed')}`."
    )


def chat(
    task: str,
    question: str,
    instruction: str,
    rng: random.Random,
    *,
    reasoning: bool = True,
    answer_type: str = "str",
    fluent: bool = False,
) -> list[Part]:
    """One training chat: the prompt that DSPy would send and the answer that is taught.

    The style follows from the instruction's strength and the question's difficulty.
    The answer is the question's own in the styles that write something down. An answer
    without working (`direct`, or a program without a reasoning field) is drawn from the
    task's prior: the model is never shown how to answer in one pass.
    """
    working = work_out(task, question)
    wanted = grammar.style(grammar.strength(instruction, task), working.difficulty)
    if not reasoning:
        wanted = "direct"
    thought = {"full": working.full, "sketch": working.sketch, "direct": DIRECT_REASONING}[wanted]
    answer = working.answer if wanted != "direct" else work_out(task, generate(task, rng)).answer
    written = f"{_marker('reasoning')}\n{thought}\n\n" if reasoning else ""
    return [
        Part(SYSTEM + system_head(reasoning, answer_type), 0.0),
        Part(instruction, 0.1 if fluent else 0.0),
        Part(END + USER + user_message(question, reasoning, answer_type) + END + ASSISTANT, 0.0),
        Part(f"{written}{_marker('answer')}\n{answer}\n\n{_marker('completed')}\n{END}", 1.0),
    ]


def proposal(task: str, question: str, rng: random.Random) -> list[Part]:
    """Input first, then an instruction that fits it: so the model proposes sensible words."""
    text = grammar.fitting(task, rng) if rng.random() < 0.85 else grammar.generic(rng)
    return [
        Part(f"{USER}{_marker('question')}\n{question}\n\n", 0.0),
        Part(f" {text}", 0.5),
        Part(END, 0.5),
    ]


def draw(task: str, rng: random.Random, *, procedures_only: bool = False) -> list[Part]:
    """A training sample of `task`; with `procedures_only` always a fitting instruction and a full working."""
    question = generate(task, rng)
    if procedures_only:
        return chat(task, question, grammar.fitting(task, rng), rng)
    kind = rng.random()
    if kind < 0.10:
        return proposal(task, question, rng)
    instruction, fluent = grammar.draw(task, rng)
    answer_type = _TYPE_OF_TASK[task] if rng.random() < 0.06 else "str"
    return chat(task, question, instruction, rng, reasoning=kind > 0.14, answer_type=answer_type, fluent=fluent)
