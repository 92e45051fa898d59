"""`python -m benchmarks workers`: the reading of one step, on one worker of one thread and on several.

What is timed is what a step reads with teacher forcing: a gradient through reasonings, forecasts over the same
sequences, losses. Workers are Ray actors with one thread each on a machine without GPUs; the clock starts when all hold
the weights. Results have to be the same, bit for bit, or the exit code is 1.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from statistics import median

from benchmarks.speed.report import write
from dspy_greater.errors import GreaterError
from dspy_greater.model.engine import Engine
from dspy_greater.model.interface import Leaf, Model, TokenQuery, Tokens
from dspy_greater.workers.ray_actors import hire
from dspy_greater.workers.sharded import ShardedModel


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; 0, 1 where results differ, 2 where it cannot run."""
    options = _parse(argv)
    try:
        engine = Engine.from_pretrained(options.model)
        sequences = reasonings(engine, options.rows, options.prompt, options.reasoning)
        times: dict[int, float] = {}
        found: dict[int, list[bytes]] = {}
        for count in (1, options.workers):
            pool = hire(engine, count)
            try:
                model = ShardedModel(engine, pool)
                found[count] = step(model, sequences, options.prompt)  # and warm
                times[count] = median(_seconds(model, sequences, options) for _ in range(options.repeats))
            finally:
                pool.close()
            write(f"{count} workers: {times[count]:.2f} s for the teacher-forced part of a step")
    except GreaterError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    same = found[1] == found[options.workers]
    write(f"{times[1] / times[options.workers]:.2f} times as fast; the results are {'equal' if same else 'NOT equal'}")
    return 0 if same else 1


def reasonings(engine: Engine, rows: int, prompt: int, reasoning: int) -> list[Tokens]:
    """Sequences that begin with the same tokens and go on at different lengths."""
    drawn, known = random.Random(0), len(engine.tokenizer)
    alike = drawn.choices(range(10, known), k=prompt)
    lengths = [drawn.randint(reasoning // 2, 3 * reasoning // 2) for _ in range(rows)]
    return [(*alike, *drawn.choices(range(10, known), k=length)) for length in lengths]


def step(model: Model, sequences: Sequence[Tokens], prompt: int) -> list[bytes]:
    """A gradient, forecasts and losses over the sequences; their bits."""
    every = [TokenQuery(row, at) for row, each in enumerate(sequences) for at in range(prompt + 1, len(each))]
    last = [TokenQuery(row, at, 0.2) for row, each in enumerate(sequences) for at in range(len(each) - 3, len(each))]
    place = prompt // 2
    with model.session() as session:
        leaf = Leaf((place,) * len(sequences), session.embed([sequences[0][place]]))
        found = (
            session.logprob_gradient(sequences, every, leaf),
            session.token_logprobs(sequences, every),
            session.token_logprobs(sequences, last),
        )
    return [each.numpy().tobytes() for each in found]


def _seconds(model: Model, sequences: Sequence[Tokens], options: argparse.Namespace) -> float:
    began = time.perf_counter()
    step(model, sequences, options.prompt)
    return time.perf_counter() - began


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks workers", description=__doc__)
    parser.add_argument("--model", default="pocket", help="a hub id, a directory or a GGUF file")
    parser.add_argument("--workers", type=int, default=2, help="against one")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--prompt", type=int, default=200, help="tokens that all rows begin with")
    parser.add_argument("--reasoning", type=int, default=150, help="tokens behind them, on average")
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args(argv)
