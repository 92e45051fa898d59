"""Measure the pocket model: `python -m benchmarks.pocket.evaluate --rows DIR [--weights DIR]`.

Greedy decoding of DSPy's own ChatAdapter prompts, per task and instruction. `--rows` is
a directory with the benchmark's files (`web_of_lies.json`, ... each with a list
`examples` of `input` and `target`); without it, rows come from the generator.
Needs torch, transformers and tokenizers alone.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.pocket.grammar import DSPY_DEFAULT
from benchmarks.pocket.transcript import ASSISTANT, END, SYSTEM, USER, system_head, user_message
from dspy_greater.pocket import path
from dspy_greater.pocket.tasks import TASKS, generate, work_out

FITTING = {
    "boolean_expressions": "Evaluate the innermost brackets first, then each operator.",
    "web_of_lies": "Follow each person in turn and decide who tells the truth.",
    "object_counting": "List each item with its number and add.",
    "navigate": "Keep the position and heading after every step.",
}
GENERIC = "Think step by step."
PLAIN = "Answer the question."

Row = tuple[str, str]  # question, gold answer


def benchmark_rows(directory: Path, task: str) -> list[Row]:
    """The real rows of a task.

    Raises:
        FileNotFoundError: the directory has no file of that task.
    """
    examples = json.loads((directory / f"{task}.json").read_text())["examples"]
    return [(example["input"], example["target"]) for example in examples]


def generated_rows(task: str, count: int, seed: int) -> list[Row]:
    """Fresh rows of a task, none of them a row of the benchmark."""
    rng = random.Random(f"evaluate/{seed}/{task}")
    questions = [generate(task, rng) for _ in range(count)]
    return [(question, work_out(task, question).answer) for question in questions]


@torch.no_grad()
def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], rows: int = 64
) -> list[str]:
    """Greedy completions of rendered prompts, in their order."""
    completions = []
    for start in range(0, len(prompts), rows):
        batch = tokenizer(
            prompts[start : start + rows],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        )
        generate: Any = model.generate
        out = generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=160,
            do_sample=False,
        )
        completions += tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return completions


def answer_of(completion: str) -> str | None:
    """What stands in the answer field, as ChatAdapter reads it; None when there is none."""
    found = re.search(r"\[\[ ## answer ## \]\]\n(.*?)\s*(?:\n\n\[\[ ## completed|$)", completion, re.DOTALL)
    return found.group(1).strip() if found else None


def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Row], instruction: str
) -> tuple[float, list[str]]:
    """Share of rows answered rightly under an instruction, and all completions."""
    prompts = [
        f"{SYSTEM}{system_head(True)}{instruction}{END}{USER}{user_message(question, True)}{END}{ASSISTANT}"
        for question, _ in rows
    ]
    completions = complete(model, tokenizer, prompts)
    right = sum(answer_of(text) == gold for text, (_, gold) in zip(completions, rows, strict=True))
    return right / len(rows), completions


def main() -> None:
    """Print a table: tasks down, instructions across, accuracy in percent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, help="directory with the benchmark's files")
    parser.add_argument("--weights", type=Path, default=path())
    parser.add_argument("--limit", type=int, default=250)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--only-fitting", action="store_true")
    parser.add_argument("--show", type=int, default=0, help="print that many wrong completions per cell")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.weights)
    model = AutoModelForCausalLM.from_pretrained(arguments.weights, dtype=torch.float32).eval()
    lines = ["| task | fitting | generic | plain | DSPy's default |", "| --- | --- | --- | --- | --- |"]
    for task in arguments.tasks.split(","):
        rows = benchmark_rows(arguments.rows, task) if arguments.rows else generated_rows(task, arguments.limit, 0)
        cells = []
        for instruction in (FITTING[task], GENERIC, PLAIN, DSPY_DEFAULT)[: 1 if arguments.only_fitting else 4]:
            share, completions = accuracy(model, tokenizer, rows[: arguments.limit], instruction)
            cells.append(f"{100 * share:.1f}")
            wrong = [(r, c) for r, c in zip(rows, completions, strict=False) if answer_of(c) != r[1]]
            for (question, gold), completion in wrong[: arguments.show]:
                sys.stdout.write(f"--- {question}\n--- gold {gold}\n{completion}\n\n")
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
