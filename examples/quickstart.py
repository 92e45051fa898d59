"""Watch gradients over reasoning improve a DSPy program: `python examples/quickstart.py --task navigate`.

Starts `dspy.ChainOfThought("question -> answer")` on a small local model with a bad
instruction, optimises the instruction, and measures both on rows that the search never saw.
Rows are the real BIG-Bench Hard ones from `--bbh DIR/bbh` (files such as `navigate.json`) or the
Hugging Face hub; where there is neither, rows of the same format from the pocket model's
generator. It says which.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path

# A hub that cannot be reached should not hold up the demo; read when the hub's client is imported.
os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "3")
os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "10")

import dspy

from dspy_greater import GReaTerTeleprompter, local_lm
from dspy_greater.pocket.tasks import TASKS, generate, work_out

HUB_DATASET = "lukaemon/bbh"
OPTION = re.compile(r"^\(([A-Z])\) (.+)$", re.MULTILINE)  # of a question with several answers to choose from


def load_rows(task: str, directory: Path | None) -> tuple[list[dspy.Example], str]:
    """All rows of a task, and where they came from."""
    if directory is not None:
        if not (directory / f"{task}.json").is_file():
            sys.exit(f"There is no {directory / f'{task}.json'}. --bbh names the directory with the benchmark's files.")
        raw = json.loads((directory / f"{task}.json").read_text())["examples"]
        source = f"BIG-Bench Hard, {directory / f'{task}.json'}"
    else:
        raw, source = from_hub_or_generator(task)
    rows = [dspy.Example(question=row["input"], answer=row["target"]).with_inputs("question") for row in raw]
    return rows, source


def from_hub_or_generator(task: str) -> tuple[list[dict[str, str]], str]:
    """Real rows through `datasets`; generated ones, with a notice, where the hub cannot be reached."""
    from datasets import load_dataset

    try:
        return list(load_dataset(HUB_DATASET, task, split="test")), f"BIG-Bench Hard, {HUB_DATASET} on the hub"
    except Exception as error:  # no network, no such task: whatever it is, the demo can go on
        if task not in TASKS:
            sys.exit(
                f"{task} could not be read from the hub ({error}), and rows are generated for {', '.join(TASKS)} only."
            )
        rng = random.Random(f"quickstart/{task}")
        questions = list(dict.fromkeys(generate(task, rng) for _ in range(250)))
        raw = [{"input": question, "target": work_out(task, question).answer} for question in questions]
        return raw, f"the pocket model's generator (the hub could not be reached: {type(error).__name__})"


def exact_match(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> bool:
    """Whether the answer is the gold one, case and blanks aside; an option may be named by its letter or its text."""
    given, gold = (str(each).strip().lower() for each in (prediction.answer, example.answer))
    options = {f"({letter.lower()})": text.strip().lower() for letter, text in OPTION.findall(example.question)}
    option = options.get(gold)
    return given == gold or (option is not None and given.rstrip(".") in (option, f"{gold} {option}"))


def measured(program: dspy.Module, rows: list[dspy.Example]) -> tuple[float, Counter[str]]:
    """Share of rows answered rightly, as DSPy itself measures it, and how often each answer was given."""
    evaluate = dspy.Evaluate(
        devset=rows, metric=exact_match, num_threads=len(rows), display_progress=False, max_errors=len(rows)
    )
    found = evaluate(program)
    answers = Counter(str(prediction.get("answer", "(none)")).strip() for _, prediction, _ in found.results)
    return found.score / 100, answers


def commonest(answers: Counter[str], most: int = 3) -> str:
    """The answers that were given most often; a program that reasons gives several."""
    told = [f"{count} x {answer[:40]!r}" for answer, count in answers.most_common(most)]
    others = answers.total() - sum(count for _, count in answers.most_common(most))
    return ", ".join([*told, *([f"{others} others"] if others else [])])


def interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    return middle - half, middle + half


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="navigate", help=f"pocket tasks: {', '.join(TASKS)}")
    parser.add_argument("--bbh", type=Path, help="directory with the BIG-Bench Hard files")
    parser.add_argument("--model", default="pocket", help="'pocket', a directory, a GGUF file or a hub id")
    parser.add_argument("--max-tokens", type=int, default=1024, help="that the model writes for one row at most")
    parser.add_argument("--instruction", default="Answer the question.", help="the instruction to start from")
    parser.add_argument("--auto", default="light", choices=("light", "medium", "heavy"))
    parser.add_argument("--variant", default="default", choices=("default", "paper"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--train-rows", type=int, help="rows to search on (default: the preset's)")
    parser.add_argument("--validation-rows", type=int, help="rows to choose on (default: the preset's)")
    parser.add_argument("--max-seconds", type=float, help="the search ends after so long, and returns what it has")
    parser.add_argument("--estimate", action="store_true", help="say first what the search will take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test-rows", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    return parser.parse_args()


def main() -> None:
    """Optimise, measure, save, load, measure again."""
    arguments = parse_arguments()
    started = time.monotonic()
    rows, source = load_rows(arguments.task, arguments.bbh)
    random.Random(arguments.seed).shuffle(rows)
    test, rest = rows[: arguments.test_rows], rows[arguments.test_rows :]
    if len(rest) < 4:
        sys.exit(f"--test-rows {arguments.test_rows} leaves {len(rest)} of {len(rows)} rows for the search; use fewer.")
    train, validation = rest[: len(rest) // 3], rest[len(rest) // 3 :]
    print(f"rows: {source}; {len(rest)} for the search, {len(test)} for the test")

    dspy.configure(lm=local_lm(arguments.model, max_tokens=arguments.max_tokens))
    program = dspy.ChainOfThought(dspy.Signature("question -> answer", arguments.instruction))
    optimizer = GReaTerTeleprompter(
        metric=exact_match,
        variant=arguments.variant,
        auto=arguments.auto,
        steps=arguments.steps,
        train_rows=arguments.train_rows,
        validation_rows=arguments.validation_rows,
        max_seconds=arguments.max_seconds,
        seed=arguments.seed,
        progress=True,
    )
    if arguments.estimate:
        print(optimizer.compile(program, trainset=train, valset=validation, dry_run=True), flush=True)
    better = optimizer.compile(program, trainset=train, valset=validation)
    found = better.predictors()[0].signature.instructions

    before, answers_before = measured(program, test)
    after, answers_after = measured(better, test)
    arguments.out.mkdir(parents=True, exist_ok=True)
    saved = arguments.out / f"{arguments.task}.json"
    better.save(saved)
    loaded = dspy.ChainOfThought("question -> answer")
    loaded.load(saved)
    again, _ = measured(loaded, test)

    details = better.detailed_results
    for name, text, share, answers in (
        ("seed ", arguments.instruction, before, answers_before),
        ("found", found, after, answers_after),
    ):
        low, high = interval(share, len(test))
        print(f"{name} {100 * share:5.1f} % [{100 * low:.1f}, {100 * high:.1f}]  {text!r}")
        print(f"      answers: {commonest(answers)}")
    print(f"saved to {saved}; loaded in plain DSPy it scores {100 * again:.1f} %")
    print(f"{details.train_rows} training and {details.validation_rows} validation rows, {len(details.steps)} steps,")
    print(f"{details.spent['generated_tokens']} generated tokens, {details.seconds:.0f} s")
    result = {
        "task": arguments.task,
        "model": arguments.model,
        "seed": arguments.seed,
        "rows": {
            "source": source,
            "train": details.train_rows,
            "validation": details.validation_rows,
            "test": len(test),
        },
        "seed_instruction": arguments.instruction,
        "found_instruction": found,
        "seed_accuracy": before,
        "seed_interval": interval(before, len(test)),
        "seed_answers": dict(answers_before.most_common()),
        "found_accuracy": after,
        "found_interval": interval(after, len(test)),
        "found_answers": dict(answers_after.most_common()),
        "loaded_accuracy": again,
        "steps": len(details.steps),
        "generated_tokens": details.spent["generated_tokens"],
        "search_seconds": round(details.seconds, 1),
        "seconds": round(time.monotonic() - started, 1),
    }
    (arguments.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
