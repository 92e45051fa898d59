"""Search without gold values: `python examples/labels_in_the_metric.py --bbh DIR/bbh`.

The rows have a label that no output field is called by; only the metric looks at it. The instruction of
`dspy.ChainOfThought("question -> answer")` on the pocket model is searched through the metric alone, and both programs
answer rows that the search never saw.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import dspy

from dspy_greater import GReaTerTeleprompter, local_lm
from dspy_greater.program.copies import with_instructions


def metric(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> bool:
    """Whether the answer is the row's label."""
    return str(prediction.answer).strip().lower() == str(example.label).strip().lower()


def main() -> None:
    """Search, then compare on unseen rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bbh", type=Path, required=True, help="directory with the BIG-Bench Hard files")
    parser.add_argument("--task", default="navigate")
    parser.add_argument("--seed", type=int, default=1, help="which rows are for what")
    arguments = parser.parse_args()

    raw = json.loads((arguments.bbh / f"{arguments.task}.json").read_text())["examples"]
    rows = [dspy.Example(question=row["input"], label=row["target"]).with_inputs("question") for row in raw]
    random.Random(arguments.seed).shuffle(rows)

    dspy.configure(lm=local_lm("pocket"))
    program = with_instructions(dspy.ChainOfThought("question -> answer"), {"predict": "Answer the question."})
    optimizer = GReaTerTeleprompter(metric=metric, auto="light")
    better = optimizer.compile(program, rows[:24], valset=rows[24:64])

    evaluate = dspy.Evaluate(devset=rows[64:164], metric=metric, num_threads=100, display_progress=False)
    before, after = evaluate(program).score, evaluate(better).score
    sys.stdout.write(f"{better.predict.signature.instructions!r}\n{before} % -> {after} % of 100 unseen rows\n")


if __name__ == "__main__":
    main()
