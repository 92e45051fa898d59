"""`python -m benchmarks speed`: one step of the search, three schedules, one machine, in one run.

Before any timing the arms have to agree: same candidates, same selection, gradients within 1e-5, same
reasoning, same losses. Where they do not, the exit code is 1 and nothing is timed. `--scale` draws how the
cost grows instead; `--overhead` measures what DSPy adds to a step on the pocket model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.floor import floor_seconds
from benchmarks.speed.gate import run_gate
from benchmarks.speed.machine import describe, measure
from benchmarks.speed.released import BATCH
from benchmarks.speed.report import arms_json, ratios_json, save, table, write
from benchmarks.speed.scale import AXES, doubling, measure_scale
from benchmarks.speed.shapes import SHAPES, build, in_float64
from benchmarks.speed.sizes import Ceilings, ModelSize
from benchmarks.speed.step import CLOCKS, Arm, Clock
from benchmarks.speed.timing import ARMS, Run, run_all
from benchmarks.speed.work import Work, pocket_work, random_work
from dspy_greater.errors import GreaterError
from dspy_greater.model.engine import Engine
from dspy_greater.model.registry import POCKET

_REASONING_TOKENS = {POCKET: 64, "tiny": 8}  # of other shapes 300
_GATE_ROWS, _GATE_REASONING, _GATE_PROMPT = 2 * BATCH + 2, 24, 160  # of the small version
_WARM_UP_TOKENS = 4
_MU = 3  # the paper's
_SCALE_RANGES = {"n": (8, 64), "prompt": (64, 512), "reasoning": (16, 256), "mu": (1, 8)}


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; 0, or 1 where the gate failed, or 2 for options that cannot work."""
    options = parse(argv)
    try:
        if options.threads:
            torch.set_num_threads(options.threads)
        if options.overhead:
            from benchmarks.speed.overhead import measure_overhead

            return measure_overhead(options, base_result(options, argv))
        return _measure(options, argv)
    except GreaterError as error:
        sys.stderr.write(f"{error}\n")
        return 2


def _measure(options: argparse.Namespace, argv: Sequence[str]) -> int:
    arms = {name: ARMS[name] for name in options.arms}
    engine = build(options.shape, device=options.device, dtype=options.dtype, max_batch_tokens=options.max_batch_tokens)
    result = base_result(options, argv)
    work = work_for(engine, options).with_current_reasoning(engine)
    parts = {"released": min(len(work.rows), BATCH * options.released_part)} if options.released_part else {}
    found, result["gate_on"] = gate(engine, work, arms, options, parts)
    if found:
        write("The arms do not agree, so nothing is timed.\n" + "\n".join(f"- {each}" for each in found))
        save(options.out, {**result, "gate": "failed", "differences": found})
        return 1
    result["gate"] = "passed"
    write(f"gate passed: the arms agree ({result['gate_on']})")
    if options.scale:
        return _scale(options, engine, arms, result)
    _time(options, engine, work, arms, parts, result)
    return 0


def gate(
    engine: Engine, work: Work, arms: dict[str, Arm], options: argparse.Namespace, parts: dict[str, int]
) -> tuple[list[str], str]:
    """What differs between the arms, and what they were compared on: in float64, whatever is timed.

    There greedy text is the same for everyone, and rounding neither hides a difference nor makes one: in float32 it
    comes to 1e-5 by itself on some processors.
    """
    dtype = engine.weights.dtype
    if dtype in (torch.float32, torch.float64):
        rows = parts.get("released", len(work.rows))
        part = work if rows == len(work.rows) else work.first_rows(rows)
        on = f"the weights that are timed, in float64, {rows} of {len(work.rows)} rows"
        found = run_gate(in_float64(engine), part, arms)
    else:
        small = build(options.shape, device=options.device, dtype=torch.float64, small=True)
        on = f"a small float64 version of {options.shape}, because greedy text in {dtype} depends on the batch"
        prompt = None if options.shape == POCKET else _GATE_PROMPT
        sizes = {"rows": _GATE_ROWS, "reasoning_tokens": _GATE_REASONING, "prompt_tokens": prompt}
        work_of_small = work_for(small, argparse.Namespace(**{**vars(options), **sizes}))
        found = run_gate(small, work_of_small.with_current_reasoning(small), arms)
    for arm in arms.values():  # the first pass of a dtype is slower than the next ones
        arm(engine, work.shortened(_WARM_UP_TOKENS), Clock(engine))
    return found, on


def _time(
    options: argparse.Namespace,
    engine: Engine,
    work: Work,
    arms: dict[str, Arm],
    parts: dict[str, int],
    result: dict[str, Any],
) -> None:
    size = ModelSize.of(engine.model)
    tokens = min(options.rows * len(work.prompts(work.instruction)[0]), 8192)

    def ceilings() -> Ceilings:
        return measure(
            size, tokens=tokens, device=engine.weights.device, dtype=engine.weights.dtype, now=CLOCKS[options.clock]
        )

    reached = ceilings()
    selected = _stand_ins(work)

    def record(runs: list[Run]) -> None:
        floor = floor_seconds(work, size, reached, selected)
        result["machine"] |= {
            "matmul_flops_per_second": reached.matmul_flops,
            "copy_bytes_per_second": reached.copy_bytes,
        }
        result["arms"] = arms_json(runs, size, work, reached)
        result["floor"], result["floor_seconds"] = floor, sum(floor.values())
        result.update(ratios_json(runs))
        save(options.out, result)

    runs = run_all(
        arms,
        engine,
        work,
        repeats=options.repeats,
        parts=parts,
        time_limit=options.time_limit,
        after_repeat=record,
        clock=options.clock,
    )
    reached = reached.best(ceilings())  # other work on the machine can only hide a ceiling
    record(runs)
    machine = result["machine"]
    write(
        f"{machine['device']}, {machine['threads']} threads, {machine['dtype']}, {options.clock} clock: "
        f"{reached.matmul_flops / 1e9:,.0f} GFLOP/s in products, {reached.copy_bytes / 1e9:,.1f} GB/s in copies\n"
    )
    write(table(result))


def _stand_ins(work: Work) -> list[int]:
    """As many tokens as are selected, unlike the current one: the floor depends on their number alone."""
    return [token for token in range(work.selections + 1) if token != work.current][: work.selections]


def _scale(options: argparse.Namespace, engine: Engine, arms: dict[str, Arm], result: dict[str, Any]) -> int:
    field = {"n": "rows", "prompt": "prompt_tokens", "reasoning": "reasoning_tokens", "mu": "mu"}[options.scale]
    least, most = _SCALE_RANGES[options.scale]
    values = doubling(options.scale_from or least, options.scale_to or most)
    measure_scale(
        options.scale,
        values,
        work_of=lambda value: work_for(engine, argparse.Namespace(**{**vars(options), field: value})),
        engine=engine,
        arms=arms,
        repeats=options.repeats,
        clock=options.clock,
        result=result,
        out=options.out,
    )
    return 0


def work_for(engine: Engine, options: argparse.Namespace) -> Work:
    """The step that the options describe."""
    settings = {
        "rows": options.rows,
        "reasoning_tokens": options.reasoning_tokens or _REASONING_TOKENS.get(options.shape, 300),
        "selections": options.mu,
    }
    if options.shape == POCKET:
        work = pocket_work(engine, input_tokens=options.prompt_tokens or 0, **settings)
    else:
        work = random_work(engine, prompt_tokens=options.prompt_tokens or 320, **settings)
    return replace(work, minimum=max(work.minimum, options.mu))


def base_result(options: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """What every result begins with."""
    settings = {name: value for name, value in vars(options).items() if isinstance(value, (int, float, str, list))}
    settings["reasoning_tokens"] = options.reasoning_tokens or _REASONING_TOKENS.get(options.shape, 300)
    return {
        "command": " ".join(["python -m benchmarks speed", *argv]),
        "settings": settings,
        "machine": describe(options.device, options.dtype),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default=POCKET, help="the pocket model, or random weights")
    parser.add_argument("--rows", type=_count, default=50, help="N, training rows")
    parser.add_argument("--reasoning-tokens", type=_count, help="R, forced; 64 for pocket, else 300")
    parser.add_argument("--prompt-tokens", type=_count, help="of a random prompt (320), or of a pocket row's input")
    parser.add_argument(
        "--mu", "--candidates", type=_count, help="candidates that reason; 3, for --overhead what the default tries"
    )
    parser.add_argument("--repeats", type=_count, default=3)
    parser.add_argument("--time-limit", type=float, help="seconds after which no further repeat begins")
    parser.add_argument("--released-part", type=_count, metavar="B", help="time B batches of 9 rows and extrapolate")
    parser.add_argument("--arms", type=_arms, help=f"some of {','.join(ARMS)}; all, or ours with --scale")
    parser.add_argument("--max-batch-tokens", type=_count, default=2048, help="of a padded batch that is not generated")
    parser.add_argument("--dtype", type=_dtype, help="float32 on CPU, else bfloat16")
    parser.add_argument("--device", type=torch.device, help="cuda if there is one, else cpu")
    parser.add_argument("--threads", type=_count, help="of torch on the CPU")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: where other programs disturb; no GPU")
    parser.add_argument("--out", type=Path, help="write JSON here, after every repeat")
    parser.add_argument("--scale", choices=AXES, help="draw how the cost grows with this")
    parser.add_argument("--scale-from", type=_count)
    parser.add_argument("--scale-to", type=_count)
    parser.add_argument("--overhead", action="store_true", help="what DSPy adds to a step on the pocket model")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options, with what depends on the machine and on other options filled in."""
    options = _parser().parse_args(argv)
    options.device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.dtype = options.dtype or (torch.float32 if options.device.type == "cpu" else torch.bfloat16)
    options.mu = options.mu or (_tried_by_default() if options.overhead else _MU)
    options.arms = options.arms or (["ours"] if options.scale else list(ARMS))
    return options


def _tried_by_default() -> int:
    from dspy_greater.search.default_step import DefaultStep  # needs dspy, as the overhead does and nothing else here

    return DefaultStep().selections


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _arms(text: str) -> list[str]:
    chosen = [name for name in ARMS if name in text.split(",")]
    strangers = set(text.split(",")) - set(ARMS)
    if strangers:
        raise argparse.ArgumentTypeError(f"there is no arm {', '.join(sorted(strangers))}; use {', '.join(ARMS)}")
    return chosen


def _dtype(text: str) -> torch.dtype:
    found = getattr(torch, text, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise argparse.ArgumentTypeError(f"{text} is not a floating type of torch, such as float32 or bfloat16")
    return found
