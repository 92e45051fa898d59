"""What a small model writes when it is asked for an instruction in three ways, and how many training rows that answers.

    python benchmarks/results/requests-0.5b-2026-11-29/ask.py FILE.gguf --bbh DIR > answers.jsonl

Rows are the 16 training rows of `examples/quickstart.py --task navigate --seed 0 --test-rows 40`.
"""

from __future__ import annotations

import argparse
import json
import random
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dspy
from dspy.signatures.signature import make_signature

from dspy_greater import local_lm

SEED = "Answer the question."
Shown = tuple[str, str | None, str]  # what was asked, what was written where that was wrong, what is right

LESSONS: list[tuple[str, list[Shown], str]] = [
    (
        "Read the review.",
        [
            ("The soup was cold and the waiter rude.", "The guest did not like the soup.", "negative"),
            ("We will certainly come again!", "You are welcome.", "positive"),
        ],
        "Decide whether the guest was content. Answer with the one word positive or negative.",
    ),
    (
        SEED,
        [
            ("A train leaves at 14:30 and needs 45 minutes. When does it arrive?", "14:75", "15:15"),
            (
                "A bus leaves at 09:50 and needs 20 minutes. When does it arrive?",
                "It arrives after 20 minutes.",
                "10:10",
            ),
        ],
        "Add the minutes to the time of departure step by step, and carry over at 60. Answer with the time alone, such "
        "as 15:15.",
    ),
    (
        "Choose.",
        [
            ("Which is the heaviest? (A) a cat (B) a cow (C) a mouse", "a cow", "(B)"),
            ("Which is the longest? (A) a river (B) a pond (C) a puddle", "(C)", "(A)"),
        ],
        "Compare the options with each other one after the other. Answer with the letter of the right option in "
        "brackets, such as (B).",
    ),
]


def block(instruction: str, rows: list[Shown], mistakes: bool) -> str:
    """The text of one request, or of a lesson."""
    shown = [
        f"Input: {asked}\n{f'It wrote: {wrong}' + chr(10) if mistakes and wrong else ''}Right answer: {right}"
        for asked, wrong, right in rows
    ]
    ask = "Write a better instruction." if mistakes else "Write the instruction for this task."
    return "\n\n".join([*([f"Instruction: {instruction}"] if mistakes else []), *shown, ask])


def with_lessons(results: list[Any], rng: random.Random, mistakes: bool) -> list[dict[str, str]]:
    """Three other tasks with their instructions, and then this one."""
    lessons = list(LESSONS)
    rng.shuffle(lessons)
    messages: list[dict[str, str]] = []
    for instruction, rows, better in lessons:
        messages += [user(block(instruction, rows, mistakes)), {"role": "assistant", "content": better}]
    if mistakes:
        drawn = sorted(rng.sample(results, len(results)), key=lambda each: each[2])[:4]
    else:
        drawn = rng.sample(results, 4)
    own = [
        (short(example.question), None if right else short(prediction.get("answer"))[:120], example.answer)
        for example, prediction, right in drawn
    ]
    return [*messages, user(block(SEED, own, mistakes))]


def alone(results: list[Any], rng: random.Random, accent: str) -> list[dict[str, str]]:
    """Mistakes, as `dspy_greater.search.written` asks about them."""
    drawn = rng.sample([each for each in results if not each[2]], 3)
    shown = "\n\n".join(
        f"question: {short(example.question)}\nIt wrote: {short(prediction.get('answer'))}\n"
        f"Right answer: {short(example.answer)}"
        for example, prediction, _ in drawn
    )
    return [
        user(
            f"An assistant follows the instruction below. Write a better one.\n\nInstruction: {SEED}\n\n"
            f"What it was given, and what would have been right:\n\n{shown}\n\n"
            "Write an instruction that helps the assistant with everything of this kind, in one or two sentences that "
            f"tell it what to do. {accent} Do not repeat any of the examples. Write the instruction and nothing else."
        )
    ]


def exact_match(example: Any, prediction: Any, trace: object = None) -> bool:
    """The metric of the quickstart."""
    return str(prediction.answer).strip().lower() == str(example.answer).strip().lower()


def user(content: str) -> dict[str, str]:
    """A message of the user."""
    return {"role": "user", "content": content}


def short(value: object) -> str:
    """A value on one line."""
    text = " ".join(str(value).split())
    return text if len(text) <= 400 else f"{text[:400]} ..."


def answers(lm: Any, requests: list[list[dict[str, str]]], room: int) -> list[str]:
    """What the model writes for each, all at once."""

    def ask(numbered: tuple[int, list[dict[str, str]]]) -> str:
        number, messages = numbered
        return lm(messages=messages, temperature=0.8, top_p=0.95, max_tokens=room, rollout_id=number)[0]

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(ask, enumerate(requests, start=1)))


def main() -> None:
    """Ask in three ways, and try the first five different answers to those with lessons."""
    warnings.simplefilter("ignore", DeprecationWarning)  # DSPy's, about requests that are messages
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--bbh", type=Path, required=True)
    given = parser.parse_args()
    raw = json.loads((given.bbh / "navigate.json").read_text())["examples"]
    rows = [dspy.Example(question=row["input"], answer=row["target"]).with_inputs("question") for row in raw]
    random.Random(0).shuffle(rows)
    train = rows[40:][: len(rows[40:]) // 3][:16]
    lm = local_lm(given.model, max_tokens=160)
    dspy.configure(lm=lm)

    def tried(instruction: str) -> Any:
        program = dspy.ChainOfThought(make_signature("question -> answer", instruction))
        return dspy.Evaluate(devset=train, metric=exact_match, num_threads=16, max_errors=99)(program)

    seed = tried(SEED).results
    tell({"instruction": SEED, "right": sum(right for *_, right in seed), "of": len(train)})
    accents = ("Name the steps to take, in order.", "Say what is easily got wrong.", "Be short and exact.")
    accents = (*accents, "Say how to write down what is found on the way.")
    rng = random.Random(1)
    for text in answers(lm, [alone(seed, rng, each) for each in accents], 80):
        tell({"asked": "about mistakes", "instruction": text})
    for mistakes in (False, True):
        rng = random.Random(1)
        texts = answers(lm, [with_lessons(seed, rng, mistakes) for _ in range(8)], 60)
        asked = f"with lessons, {'about mistakes' if mistakes else 'right answers alone'}"
        different = list(dict.fromkeys(" ".join(text.split()) for text in texts))
        for number, text in enumerate(different):
            right = sum(right for *_, right in tried(text).results) if number < 5 else None
            tell({"asked": asked, "instruction": text, "right": right})


def tell(line: dict[str, object]) -> None:
    """One line of JSON."""
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
