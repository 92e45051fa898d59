"""What a step costs through DSPy beyond its token-level work, on the pocket model.

A real search runs: programs, adapters, tracing, threads, events and the journal. The token-level work is the time
in which the model is held, without the callbacks that DSPy's side hangs into it; the rest of the wall clock is
overhead. The profile splits it by the processor time of the threads that spend it.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from benchmarks.speed.report import save, write
from benchmarks.speed.step import CLOCKS
from benchmarks.speed.work import INSTRUCTION

MODEL, CALLBACKS, REST = "model", "callbacks per token", "threads, waiting and the rest"
ACCEPTABLE = 0.10  # of a step


class Profile:
    """Processor time by category, each without what is nested in it, and the wall clock of each category."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._local, self._lock = threading.local(), threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Begin again."""
        self.began = self._now()
        self.seconds: dict[str, float] = {}
        self.wall: dict[str, float] = {}

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """What runs inside counts for `name`; sections nest."""
        stack: list[float] = self._local.__dict__.setdefault("stack", [])
        stack.append(0.0)
        processor, wall = time.thread_time(), time.perf_counter()
        try:
            yield
        finally:
            spent, passed = time.thread_time() - processor, time.perf_counter() - wall
            own = spent - stack.pop()
            if stack:
                stack[-1] += spent
            with self._lock:
                self.seconds[name] = self.seconds.get(name, 0.0) + own
                self.wall[name] = self.wall.get(name, 0.0) + passed

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, counted."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.section(name):
                return function(*args, **kwargs)

        return run


@dataclass(frozen=True)
class StepCost:
    """One step of a search: its seconds, the part that is token-level work, and the rest by category."""

    seconds: float
    token_level: float
    profile: Mapping[str, float]

    @property
    def overhead(self) -> float:
        """The share of the step that is not token-level work."""
        return 1 - self.token_level / self.seconds


def measure_overhead(options: argparse.Namespace, result: dict[str, Any]) -> int:
    """Run a search of `repeats` steps on `rows` rows and report; 0, whatever comes out."""
    steps = search(rows=options.rows, steps=options.repeats, selections=options.mu, clock=options.clock)
    shares = [step.overhead for step in steps]
    profile: Counter[str] = Counter()
    for step in steps:
        profile.update(step.profile)  # pyright: ignore[reportArgumentType]
    result["overhead"] = {
        "share_of_step": {"median": statistics.median(shares), "min": min(shares), "max": max(shares)},
        "acceptable": ACCEPTABLE,
        "steps": [{"seconds": step.seconds, "token_level_seconds": step.token_level} for step in steps],
        "profile_seconds": {name: seconds / len(steps) for name, seconds in profile.most_common()},
    }
    save(options.out, result)
    write(_table(result["overhead"]))
    return 0


def search(*, rows: int, steps: int, selections: int, clock: str = "wall") -> list[StepCost]:
    """A search on the pocket model through `GReaTerTeleprompter`, with a journal; what each step cost.

    `clock` is "wall", or "cpu" for the seconds of the processor, which other programs do not lengthen; torch then
    has to have one thread.
    """
    import dspy

    from dspy_greater.lm.local import local_lm
    from dspy_greater.optimizer import GReaTerTeleprompter
    from dspy_greater.pocket import tasks
    from dspy_greater.run.events import SearchStarted, StepTaken

    profile, found, now = Profile(CLOCKS[clock]), [], CLOCKS[clock]

    def listen(event: object) -> None:
        if isinstance(event, StepTaken):
            found.append(_cost(profile, now() - profile.began, clock))
        if isinstance(event, (SearchStarted, StepTaken)):
            profile.clear()

    rng = random.Random("overhead")
    questions = list(dict.fromkeys(tasks.generate("navigate", rng) for _ in range(2 * rows + 50)))[: rows + 2]
    examples = [
        dspy.Example(question=question, answer=tasks.work_out("navigate", question).answer).with_inputs("question")
        for question in questions
    ]
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(dspy.context(lm=local_lm("pocket"), adapter=None))
        for target, attribute, replacement in _wrapped(profile):
            stack.enter_context(patch.object(target, attribute, replacement))
        signature: Any = dspy.Signature("question -> answer", INSTRUCTION)  # pyright: ignore[reportCallIssue]
        program = dspy.ChainOfThought(signature)
        program(question=questions[-1])  # imports that DSPy leaves to the first call are no part of a step
        optimizer = GReaTerTeleprompter(
            metric=profile.timed("metric", _exact_match),
            auto=None,
            steps=steps,
            train_rows=rows,
            validation_rows=2,
            selections=selections,
            log_dir=directory,
            listeners=[listen],
            progress=False,
        )
        optimizer.compile(program, trainset=examples[:rows], valset=examples[rows:])
    return found


def _cost(profile: Profile, seconds: float, clock: str) -> StepCost:
    held = profile.wall.get(MODEL, 0.0) - profile.wall.get(CALLBACKS, 0.0)
    token_level = held if clock == "wall" else profile.seconds.get(MODEL, 0.0)
    parts = {name: spent for name, spent in profile.seconds.items() if name != MODEL}
    parts[REST] = seconds - token_level - sum(parts.values())
    return StepCost(seconds, token_level, parts)


def _exact_match(example: Any, prediction: Any, trace: object = None) -> bool:
    return str(prediction.answer).strip().lower() == str(example.answer).strip().lower()


def _wrapped(profile: Profile) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """(where, which attribute, what instead) for everything that is counted."""
    import dspy

    from dspy_greater.model.engine import Engine
    from dspy_greater.model.fast.session import Session
    from dspy_greater.objective import evaluator
    from dspy_greater.program import rollout
    from dspy_greater.prompt.edits import TokenEdits
    from dspy_greater.prompt.encoder import PromptEncoder
    from dspy_greater.prompt.layout import Layout
    from dspy_greater.run.journal import Journal
    from dspy_greater.search import edits

    yield Engine, "exclusive", _counted_exclusive(profile, Engine.exclusive)
    yield Session, "generate", _counted_generate(profile, Session.generate)
    places: list[tuple[str, Any, list[str]]] = [
        ("adapter: prompt", dspy.ChatAdapter, ["format"]),
        ("adapter: parse", dspy.ChatAdapter, ["parse"]),
        ("tokens of prompts", PromptEncoder, ["chat_ids"]),
        ("layout: sequences to score", Layout, ["supervised"]),
        ("layout: proposals and edits", Layout, ["proposal_prefix"]),
        ("layout: proposals and edits", TokenEdits, ["replace", "insert", "append", "delete", "positions"]),
        ("calling and tracing the program", rollout, ["trace_calls"]),
        ("copying programs", evaluator, ["searching_copy"]),
        ("intersecting proposals", edits, ["propose"]),
        ("journal", Journal, ["append"]),
    ]
    for name, where, attributes in places:
        for attribute in attributes:
            yield where, attribute, profile.timed(name, getattr(where, attribute))


def _counted_exclusive(profile: Profile, original: Callable[..., Any]) -> Callable[..., Any]:
    """`Engine.exclusive` that counts the time from when the model is held to when it is given back."""
    held = threading.local()

    @contextmanager
    def exclusive(engine: Any) -> Iterator[Any]:
        with original(engine):
            if getattr(held, "already", False):
                yield engine
                return
            held.already = True
            try:
                with profile.section(MODEL):
                    yield engine
            finally:
                held.already = False

    return exclusive


def _counted_generate(profile: Profile, original: Callable[..., Any]) -> Callable[..., Any]:
    """`Session.generate` that counts the callbacks of its requests."""

    def generate(session: Any, requests: Any) -> Any:
        counted = [
            request
            if request.on_token is None
            else replace(request, on_token=profile.timed(CALLBACKS, request.on_token))
            for request in requests
        ]
        return original(session, counted)

    return generate


def _table(overhead: Mapping[str, Any]) -> str:
    share, steps = overhead["share_of_step"], overhead["steps"]
    mean = sum(step["seconds"] for step in steps) / len(steps)
    token_level = sum(step["token_level_seconds"] for step in steps) / len(steps)
    lines = [
        f"a step through DSPy takes {mean:.2f} s, its token-level work {token_level:.2f} s: overhead "
        f"{100 * share['median']:.1f} % ({100 * share['min']:.1f}..{100 * share['max']:.1f}) of a step, "
        f"acceptable {100 * overhead['acceptable']:.0f} %",
        "",
        "| where | seconds a step | of a step |",
        "| --- | ---: | ---: |",
    ]
    rows = overhead["profile_seconds"].items()
    lines += [f"| {name} | {seconds:.3f} | {100 * seconds / mean:.1f} % |" for name, seconds in rows]
    return "\n".join(lines)
