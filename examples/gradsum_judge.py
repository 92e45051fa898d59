"""Optimise a prompt by a judge's criteria, without one expected answer: `python examples/gradsum_judge.py`.

The task model is the package's pocket model behind an OpenAI-compatible server on this machine
(`transformers serve`, which needs `pip install 'transformers[serving]'`), or any other model:

    python examples/gradsum_judge.py --model openai/ORG/NAME --api-base http://localhost:8000/v1 --optimizer openai/NAME

Judge, gradients, summaries and edits come from `--optimizer`. Without one they come from a script in this file, so
that the example needs no network: it then shows how the optimizer works, not what a good judge would say.
Accuracy on rows that the search never saw is printed beside the judge's score; the search knows neither.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import dspy
from dspy import lm15
from server_process import NotUpError, server_process

from dspy_greater import GradSumTeleprompter, pocket
from dspy_greater.pocket.tasks import generate, work_out

TASK = "web_of_lies"
DESCRIPTION = "Read who says that whom lies or tells the truth, and answer whether the last person tells the truth."
CRITERIA = (
    "Full marks for an output that goes through the persons one after the other and ends in the answer that follows "
    "from it. The worst score for an answer without such a reasoning."
)


def load_rows(count: int, seed: int) -> list[dspy.Example]:
    """Questions without answers."""
    rng = random.Random(f"gradsum_judge/{seed}")
    questions = list(dict.fromkeys(generate(TASK, rng) for _ in range(2 * count)))[:count]
    return [dspy.Example(question=question).with_inputs("question") for question in questions]


@contextmanager
def served(weights: Path, *, seconds: float = 300.0) -> Iterator[str]:
    """`transformers serve` on a free port of the loopback interface while the block lasts: the API's address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(weights)]
    command += ["--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    address = f"http://127.0.0.1:{port}"
    with server_process(command, address, environment={"HF_HUB_OFFLINE": "1"}, seconds=seconds):
        yield f"{address}/v1"


class ScriptedOptimizer:
    """DSPy's engine contract over a script that plays judge, gradients, summary and editor."""

    supported_params = frozenset({"temperature", "max_tokens"})
    supports_function_calling = supports_reasoning = supports_response_schema = False
    proposals = (
        "Answer yes or no.",
        "Follow each person in turn and decide who tells the truth.",
        "Read the question twice.",
    )

    def complete(self, request: Any) -> Any:
        """One answer in the format of DSPy's ChatAdapter."""
        asked = dict(
            re.findall(
                r"\[\[ ## (\w+) ## \]\]\n(.*?)(?=\n\n\[\[ ## |\n\nRespond with )", request.messages[-1].text, re.DOTALL
            )
        )
        fields = self.answer(asked)
        text = "\n\n".join(f"[[ ## {name} ## ]]\n{value}" for name, value in {**fields, "completed": ""}.items())
        message = lm15.Message.assistant([lm15.TextPart(text)])
        usage = lm15.Usage(input_tokens=0, output_tokens=0, total_tokens=0)
        return lm15.Response(id=None, model="scripted", message=message, finish_reason="stop", usage=usage)

    def answer(self, asked: dict[str, str]) -> dict[str, str]:
        """The output fields of the module that asks."""
        if "scale" in asked:
            return self.judge(asked["inputs"].removeprefix("question: "), asked["output"])
        if "evaluation" in asked:
            return {
                "feedback": "The prompt does not say how to come to the answer: ask for one person after the other."
            }
        if "number" in asked:
            return {"versions": json.dumps(self.proposals[: int(asked["number"])])}
        return {"summary": "Outputs answer without going through the persons. Ask to follow each person in turn."}

    def judge(self, question: str, output: str) -> dict[str, str]:
        """Knows the puzzle's rules, and so needs no expected answer."""
        persons = set(re.findall(r"([A-Z][a-z]+) (?:says|tells|lies)", question))
        missing = sorted(person for person in persons if person not in output)
        right = output.lower().rstrip(". \n").endswith(work_out(TASK, question).answer.lower())
        if missing:
            return {"explanation": f"It does not go through {', '.join(missing)}.", "score": "2" if right else "1"}
        if right:
            return {"explanation": "It goes through everybody to the right end.", "score": "5"}
        return {"explanation": "It goes through everybody, but the end is wrong.", "score": "3"}

    def stream(self, request: Any) -> Any:
        """The same in one piece."""
        return lm15.response_to_events(self.complete(request))

    def close(self) -> None:
        """Nothing to close."""


def accuracy(program: dspy.Module, rows: list[dspy.Example]) -> float:
    """Share of rows answered rightly; for the report, not for the search."""

    def right(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> bool:
        return str(prediction.answer).strip().lower() == work_out(TASK, example.question).answer.lower()

    evaluate = dspy.Evaluate(devset=rows, metric=right, num_threads=4, display_progress=False, max_errors=len(rows))
    return evaluate(program).score / 100


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a DSPy model string; by default the pocket model is served here")
    parser.add_argument("--api-base", help="address of the server of --model")
    parser.add_argument("--optimizer", help="a DSPy model string for judge and editor; by default a script")
    parser.add_argument("--instruction", default="Answer the question.", help="the instruction to start from")
    parser.add_argument("--rows", type=int, default=20, help="training rows; as many validate")
    parser.add_argument("--test-rows", type=int, default=40)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--sample-size", type=int, default=10)
    parser.add_argument("--subset-size", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Optimise, measure before and after, print and return the figures."""
    options = parse_arguments(arguments)
    rows = load_rows(2 * options.rows + options.test_rows, options.seed)
    train, validation, test = rows[: options.rows], rows[options.rows : 2 * options.rows], rows[2 * options.rows :]
    weights = pocket.path()
    with nullcontext(options.api_base) if options.model else served(weights) as address:
        model = options.model or f"openai/{weights}"
        lm = dspy.LM(model, api_base=address, api_key="none", temperature=0.0, max_tokens=300, cache=False)
        if options.optimizer:
            optimizer_lm = dspy.LM(options.optimizer)
        else:
            optimizer_lm = dspy.LM("scripted/optimizer", engine=ScriptedOptimizer(), cache=False)
        with dspy.context(lm=lm, adapter=dspy.ChatAdapter(use_json_adapter_fallback=False)):
            program = dspy.ChainOfThought(dspy.Signature("question -> answer", options.instruction))
            optimizer = GradSumTeleprompter(
                DESCRIPTION,
                CRITERIA,
                judge_lm=optimizer_lm,
                iterations=options.iterations,
                sample_size=options.sample_size,
                subset_size=options.subset_size,
                seed=options.seed,
                num_threads=4,
            )
            better = optimizer.compile(program, trainset=train, valset=validation)
            before, after = accuracy(program, test), accuracy(better, test)
    details = better.detailed_results
    found = better.predictors()[0].signature.instructions
    print(f"task model {model}, judge and editor {options.optimizer or 'a script'}")
    for name, text, judged, share in (
        ("seed ", options.instruction, details.seed_score, before),
        ("found", found, details.score, after),
    ):
        print(
            f"{name} judge {judged:.2f} on {len(validation)} rows, accuracy {share:.2f} on {len(test)} rows: {text!r}"
        )
    for module, spent in details.spent_by_module.items():
        print(f"{module}: {spent['calls']} calls, {spent['prompt_tokens']} + {spent['completion_tokens']} tokens")
    print(f"{len(details.iterations)} iterations, {details.seconds:.0f} s")
    return {
        "seed": {"instruction": options.instruction, "judge": details.seed_score, "accuracy": before},
        "found": {"instruction": found, "judge": details.score, "accuracy": after},
        "spent": details.spent_by_module,
        "seconds": details.seconds,
    }


if __name__ == "__main__":
    try:
        main()
    except NotUpError as error:
        sys.exit(f"{error}\nIs transformers[serving] installed?")
