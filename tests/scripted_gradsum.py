"""A task for GRAD-SUM whose best prompt is known: a prompt of level n answers the questions below n rightly."""

from __future__ import annotations

import re
from typing import Any

import dspy
from scripted_text import Asked, text_lm

from dspy_greater import GradSumTeleprompter

SEED = "Level 2."
ROWS = [dspy.Example(question=str(number), answer=f"a{number}").with_inputs("question") for number in range(16)]
UNLABELLED = [dspy.Example(question=row.question).with_inputs("question") for row in ROWS]
FULL, WRONG = 5, 2


def level(instruction: str) -> int:
    found = re.search(r"Level (\d+)", instruction)
    return int(found[1]) if found else 0


def program_script(asked: Asked) -> dict[str, Any]:
    number = int(asked["question"])
    right = number < level(asked.instruction)
    return {"reasoning": "I look.", "answer": f"a{number}" if right else "wrong"}


def is_right(text: str, asked: Asked) -> bool:
    return f"answer: a{asked['inputs'].removeprefix('question: ')}" in text


def judge_script(asked: Asked) -> dict[str, Any]:
    right = is_right(asked["output"], asked)
    return {"explanation": "right" if right else "not right", "score": FULL if right else WRONG}


def gradient_script(asked: Asked) -> dict[str, Any]:
    if "evaluation" in asked:
        return {"feedback": gradient_of(asked["prompts"], asked["inputs"])}
    return {"summary": summary_of(asked.list_of("feedback"))}


def gradient_of(prompts: str, inputs: str) -> str:
    return f"level {level(prompts)} failed on {inputs}"


def summary_of(gradients: list[str]) -> str:
    return " & ".join(gradients)


def versions_of(prompt: str) -> list[str]:
    here = level(prompt)
    return [f"Level {here - 1}.", f"Level {here + 3}.", f"Level {here + 2}."]


def editor_script(asked: Asked) -> dict[str, Any]:
    return {"versions": versions_of(asked["prompt"])}


def exact_match(example: Any, prediction: Any, trace: object = None) -> bool:
    return prediction.answer == example.answer


def program(script: Any = program_script, instruction: str = SEED) -> Any:
    student = dspy.ChainOfThought(dspy.Signature("question -> answer", instruction))
    student.set_lm(text_lm(script, "scripted/task"))
    return student


def optimizer(**settings: Any) -> GradSumTeleprompter:
    """A quick run with scripted optimizer LMs."""
    quick: dict[str, Any] = {
        "criteria": "The answer is the question with an a before it.",
        "judge_lm": text_lm(judge_script, "scripted/judge"),
        "gradient_lm": text_lm(gradient_script, "scripted/gradient"),
        "editor_lm": text_lm(editor_script, "scripted/editor"),
        "beam_width": 2,
        "iterations": 3,
        "sample_size": 6,
        "subset_size": 4,
        "validation_rows": 6,
        "progress": False,
    }
    return GradSumTeleprompter("Put an a before the question.", **{**quick, **settings})


def asked_of(lm: Any) -> list[Asked]:
    return lm.engine.asked


def instruction_of(compiled: Any) -> str:
    return compiled.predictors()[0].signature.instructions
