"""What a run of `GradSum` is going to cost: one small iteration, and calls counted from the settings.

The small iteration is a real one, from the student's prompts on a few rows: it says what a call of each module reads
and writes, and how many outputs need a gradient. How many calls a whole run makes follows from the settings, as `loop`
makes them. Nothing comes from DSPy's cache here, and questions that are asked again are left out.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from dspy_greater.gradsum.loop import Loop
from dspy_greater.gradsum.meter import Meter, Module
from dspy_greater.gradsum.task import Task
from dspy_greater.program.asked_lm import uncached_lm
from dspy_greater.program.faults import is_served
from dspy_greater.program.rollout import uncached
from dspy_greater.run.estimate import Cost, Estimate

ROWS = 4  # of the small iteration
Calls = dict[Module, float]


def estimate(task: Task) -> Estimate:
    """Take a small iteration, and count.

    Raises:
        GreaterError: what the loop would raise.
    """
    began = time.monotonic()
    probed = _probe(task)
    iterations = [probed.iteration(number) for number in range(task.settings.iterations)]
    validation = probed.cost(probed.outputs((task.settings.beam_width + 1) * len(task.validation)))
    taken, bounded_by = _within_budget(task, iterations, validation)
    share = 1.0 / max(1, len(taken))
    loop = sum(taken, Cost())
    few, many = replace(probed, left=0.0), replace(probed, failing=1.0, left=1.0)
    numbers = range(len(taken))
    spent = probed.meter.spent()
    return Estimate(
        predictors=(", ".join(predictor.name for predictor in task.edited),),  # edited together, in one loop
        steps=len(taken),
        seed=Cost(),
        step=share * loop,
        validation=validation,
        low=sum((few.iteration(number) for number in numbers), validation),
        high=sum((many.iteration(number) for number in numbers), validation),
        probe=Cost(
            runs=spent["generation"]["runs"],
            read=sum(module["prompt_tokens"] for module in spent.values()),
            written=sum(module["completion_tokens"] for module in spent.values()),
            seconds=time.monotonic() - began,
            calls=sum(module["calls"] for module in spent.values()),
        ),
        bounded_by=bounded_by,
        unit="iterations",
    )


class _TimedMeter(Meter):
    """A meter that knows how long each module took."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def counting(self, module: Module) -> Iterator[None]:
        """See `Meter`."""
        began = time.monotonic()
        with super().counting(module):
            yield
        self.seconds[module] = self.seconds.get(module, 0.0) + time.monotonic() - began


@dataclass(frozen=True)
class _Probed:
    """What the small iteration told.

    Attributes:
        task: the whole task.
        meter: what it took.
        failing: the part of the outputs that need a gradient at first,
        left: and how much of that is left in the last iteration.
        asked: the part of these that the gradients' LM is asked about; the metric's feedback says the others.
        edited: predictors that were called, whose prompts are edited.
    """

    task: Task
    meter: _TimedMeter
    failing: float
    asked: float
    edited: int
    left: float = 0.5

    def iteration(self, number: int) -> Cost:
        """One loop, as `Loop.take_iteration` does it."""
        settings, rows = self.task.settings, len(self.task.train)
        sample = min(settings.sample_size, rows)
        subset = min(settings.subset_size, sample)
        members = 1 if number == 0 else min(settings.beam_width, (settings.candidates_per_edit + 1) ** number)
        known = 0.0 if number == 0 else subset * sample / rows  # compared in the iteration before, and drawn again
        failing = self.failing * (1.0 - (1.0 - self.left) * number / max(1, settings.iterations - 1))
        wrong = members * sample * failing
        told = members * (1.0 - (1.0 - failing) ** sample)  # those with any feedback
        concerned = told * self.edited  # the k-th versions of all predictors are one candidate
        calls = self.outputs(members * (sample - known) + told * settings.candidates_per_edit * subset)
        calls["gradients"] = wrong * self.asked
        calls["summarisation"] = concerned if settings.summarize else 0
        calls["editing"] = concerned
        return self.cost(calls)

    def outputs(self, count: float) -> Calls:
        """So many runs of the program, and their judge's verdicts."""
        judged = count if self.task.criteria is not None else 0.0
        return {"generation": count * self.meter.calls_per_run(), "evaluation": judged}

    def cost(self, calls: Mapping[Module, float]) -> Cost:
        """What so many calls cost, at the small iteration's price for each module."""
        runs = calls["generation"] / self.meter.calls_per_run()
        return sum((self._module(module, count) for module, count in calls.items()), Cost(runs=runs))

    def _module(self, module: Module, calls: float) -> Cost:
        spent = self.meter.spent().get(module, {})
        made = spent.get("calls", 0)
        if not calls or not made:
            return Cost(calls=calls)
        read, written = spent["prompt_tokens"] / made, spent["completion_tokens"] / made
        seconds = self.meter.seconds[module]
        if is_served(self._lm(module)):  # as many at a time as there are threads
            threads = self.task.settings.num_threads
            seconds *= math.ceil(calls / threads) / math.ceil(made / threads)
        else:
            seconds *= calls / made
        return Cost(0, calls * read, 0.0, calls * written, seconds, calls)

    def _lm(self, module: Module) -> Any:
        task = self.task
        lms = {"evaluation": task.judge_lm, "editing": task.editor_lm, "generation": task.predictors[0].lm}
        return lms.get(module, task.gradient_lm)


def _probe(task: Task) -> _Probed:
    """A small iteration from the student's prompts."""
    meter = _TimedMeter()
    loop = Loop(_small(task), meter)
    outputs = loop.take_iteration().members[0].outputs
    wrong = sum(bool(output.evaluation) for output in outputs)
    asked = meter.spent().get("gradients", {})
    asked_of = asked.get("answered", 0) + asked.get("unanswered", 0)
    return _Probed(
        task,
        meter,
        failing=(wrong + 1) / (len(outputs) + 2),  # a few rows do not say that all are right
        asked=asked_of / wrong if wrong else 1.0,
        edited=len(task.edited) - len(loop.uncalled),
    )


def _small(task: Task) -> Task:
    """The task on a few rows, whose LMs ask again what DSPy's cache knows: that says nothing of what a call takes."""
    rows = random.Random(f"{task.seed}/probe").sample(range(len(task.train)), min(ROWS, len(task.train)))
    return replace(
        task,
        program=uncached(task.program),
        judge_lm=uncached_lm(task.judge_lm),
        gradient_lm=uncached_lm(task.gradient_lm),
        editor_lm=uncached_lm(task.editor_lm),
        train=tuple(task.train[row] for row in rows),
        numbers=tuple(task.numbers[row] for row in rows),
        validation=(),
        settings=replace(task.settings, sample_size=ROWS, subset_size=1, max_lm_calls=None, max_lm_tokens=None),
    )


def _within_budget(task: Task, iterations: list[Cost], validation: Cost) -> tuple[list[Cost], str | None]:
    """The iterations that fit, as `Meter.admit` and `Loop` see it, and the name of the limit that ends the run."""
    settings, done = task.settings, Cost()
    for number, cost in enumerate(iterations):
        after = done + cost + validation
        limits = {
            "max_lm_calls": (settings.max_lm_calls, after.calls),
            "max_lm_tokens": (settings.max_lm_tokens, after.tokens),
            "max_seconds": (settings.max_seconds, done.seconds),  # an iteration that began is finished
        }
        reached = [name for name, (limit, value) in limits.items() if limit is not None and value > limit]
        if reached:
            return iterations[:number], reached[0]
        done += cost
    return iterations, None
