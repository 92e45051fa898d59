"""Does the likelihood of gold answers without reasoning tell what whole instructions are worth?

    PYTHONPATH=. python benchmarks/results/direct-answers-0.5b-2026-11-30/direct_answers.py FILE.gguf --data-dir DIR

A row's question comes first and the instruction behind it, so that the question is read once for all instructions: an
instruction costs its own length and the answer's a row. What it tells, the mean over 12 training rows of draw 2 of
exp(mean log f(gold | question, instruction)), is compared by Spearman's ρ with what came on 24 of them: instructions of
`../origins-0.5b-2026-11-30/origins.jsonl`, and others that the model wrote (`written.jsonl` beside this file).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.tasks.registry import load
from dspy_greater import local_lm
from dspy_greater.model.interface import Model, TokenQuery
from dspy_greater.model.tensors import floats
from dspy_greater.prompt.encoder import PromptEncoder
from dspy_greater.stats import mean, spearman

HERE = Path(__file__).parent
KNOWN = (HERE.parent / "origins-0.5b-2026-11-30" / "origins.jsonl", HERE / "written.jsonl")
DRAW, ROWS, ASKED = 2, 24, 12


def likelihoods(
    model: Model, encoder: PromptEncoder, question: str, answer: str, instructions: Sequence[str]
) -> list[float]:
    """Of the answer behind the question and each instruction, mean over its tokens."""
    gold = tuple(encoder.tokenizer(answer, add_special_tokens=False)["input_ids"])
    prompts = [encoder.chat_ids([{"role": "user", "content": f"question: {question}\n\n{z}"}]) for z in instructions]
    queries = [TokenQuery(row, len(ids) + at) for row, ids in enumerate(prompts) for at in range(len(gold))]
    found = iter(floats(model.token_logprobs([(*ids, *gold) for ids in prompts], queries)))
    return [math.exp(mean([next(found) for _ in gold])) for _ in prompts]


def table(name: str, groups: dict[str, list[dict[str, Any]]], engine: Any, data_dir: Path) -> None:
    """ρ of each task, of all instructions and of those that the model wrote."""
    encoder = PromptEncoder(engine.tokenizer)
    print(f"\n| {name} | instructions | ρ | of those that the model wrote | tokens read |\n|{' --- |' * 5}")
    for task, known in groups.items():
        train = list(load(f"bbh:{task}", data_dir=data_dir, seed=DRAW, limit=ROWS).train)
        texts, before = [each["text"] for each in known], engine.counters
        with engine.session() as session:
            rows = [
                likelihoods(session, encoder, row.question, str(row.answer), texts)
                for row in Random(0).sample(train, ASKED)
            ]
        told, came = [mean(column) for column in zip(*rows, strict=True)], [-each["objective"] for each in known]
        own = [place for place, each in enumerate(known) if each["kind"] != "form"]
        written = spearman([told[place] for place in own], [came[place] for place in own])
        read = (engine.counters - before).prefilled_tokens
        print(f"| {task} | {len(known)} | {spearman(told, came):.2f} | {written:.2f} | {read} |", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """A table for each file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data-dir", type=Path, required=True)
    given = parser.parse_args(argv)
    lm: Any = local_lm(given.model)
    for path in KNOWN:
        groups: dict[str, list[dict[str, Any]]] = {}
        for line in map(json.loads, path.read_text().splitlines()):
            if line["kind"] != "seed":
                groups.setdefault(line["task"], []).append(line)
        table(path.stem, groups, lm.engine.engine, given.data_dir)


if __name__ == "__main__":
    main()
