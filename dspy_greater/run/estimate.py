"""What a search is going to cost, as told before it begins and corrected by what its steps report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

# kinds of tokens -> how events call them
TOKENS = {"read": "prefilled_tokens", "differentiated": "backward_tokens", "written": "generated_tokens"}


@dataclass(frozen=True)
class Cost:
    """What a part of a search costs.

    Attributes:
        runs: of the program on a row.
        read: tokens of prompts and answers that models read, a beginning that rows share once.
        differentiated: tokens that a backward pass goes through.
        written: tokens that models generate.
        seconds: of the clock.
        calls: of language models, where those are what is counted.

    >>> Cost(runs=1, written=20.0) + 2 * Cost(runs=3, written=5.0)
    Cost(runs=7, read=0.0, differentiated=0.0, written=30.0, seconds=0.0, calls=0)
    """

    runs: float = 0
    read: float = 0.0
    differentiated: float = 0.0
    written: float = 0.0
    seconds: float = 0.0
    calls: float = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __rmul__(self, times: float) -> Cost:
        return Cost(*(times * getattr(self, field.name) for field in fields(self)))

    @property
    def tokens(self) -> float:
        """Of all three kinds."""
        return self.read + self.differentiated + self.written

    @classmethod
    def of(cls, spent: Mapping[str, int], seconds: float = 0.0) -> Cost:
        """What an event says that was spent."""
        tokens = {name: float(spent.get(key, 0)) for name, key in TOKENS.items()}
        return cls(runs=spent.get("runs", 0), seconds=seconds, **tokens)


@dataclass(frozen=True)
class Estimate:
    """What `compile` is going to cost; printed, a line.

    `seed`, `step` and `validation` are what each predictor's search costs at its start, at a step and at its end, on
    the mean over the predictors. How long the reasoning will be under instructions that nobody has seen yet is not
    known. It is told to be as long as in those runs of the probe that were right; `low` and `high` are what all comes
    to if it is as long as in the shorter and in the longer half of them. A model that a search teaches to reason at
    greater length than the probe saw goes beyond `high`. For `GradSum`, whose steps are iterations, they
    are what all comes to if no output needs a gradient at the end, and if all always do.

    Attributes:
        predictors: those that are searched.
        steps: of each search.
        seed: the evaluation of the student's instruction.
        step: a step, on the mean over all kinds of steps.
        validation: the finalists on the validation rows.
        low: the whole, if reasoning is short.
        high: the whole, if it is long.
        peak_bytes: of memory, on the device of the weights; on a CPU those of the process.
        probe: what the probe cost, from which all this was told.
        bounded_by: the budget that ends the search before its last step, if one does.
        after_steps: how many steps had reported when this was told.
        unit: what steps are called.
    """

    predictors: tuple[str, ...]
    steps: int
    seed: Cost
    step: Cost
    validation: Cost
    low: Cost
    high: Cost
    peak_bytes: int = 0
    probe: Cost = Cost()
    bounded_by: str | None = None
    after_steps: int = 0
    unit: str = "steps"

    @property
    def total(self) -> Cost:
        """The whole, as it is most likely to be."""
        return len(self.predictors) * (self.seed + self.steps * self.step + self.validation)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, `total` included."""
        return {**asdict(self), "predictors": list(self.predictors), "total": asdict(self.total)}

    def __str__(self) -> str:
        """A line of text.

        >>> step = Cost(24, 4000.0, 700.0, 900.0, 1.8)
        >>> whole = 20 * step
        >>> print(Estimate(("predict",), 20, Cost(), step, Cost(), whole, 2 * whole, peak_bytes=9 * 10**8))
        36 s (36 s to 1.2 min): 20 steps, 480 runs of the program, 80k tokens read, 14k differentiated, 18k written, \
0.9 GB of memory at most
        """
        total = self.total
        of = f" for each of {len(self.predictors)} predictors" if len(self.predictors) > 1 else ""
        memory = f", {self.peak_bytes / 1e9:.1f} GB of memory at most" if self.peak_bytes else ""
        bound = f"; {self.bounded_by} ends it" if self.bounded_by else ""
        calls = f", {round(total.calls)} calls of language models" if total.calls else ""
        differentiated = f", {count(total.differentiated)} differentiated" if total.differentiated else ""
        return (
            f"{duration(total.seconds)} ({duration(self.low.seconds)} to {duration(self.high.seconds)}): "
            f"{self.steps} {self.unit}{of}, {round(total.runs)} runs of the program{calls}, {count(total.read)} tokens "
            f"read{differentiated}, {count(total.written)} written{memory}{bound}"
        )


@dataclass(frozen=True)
class Budget:
    """The settings that end a search early."""

    tokens: int | None = None  # written
    runs: int | None = None
    seconds: float | None = None

    def bounded(self, estimate: Estimate) -> Estimate:
        """The estimate with as many steps as the budget allows, all searches together, and the name of what ends them.

        >>> step = Cost(runs=24, written=500.0, seconds=2.0)
        >>> whole = Estimate(("predict",), 20, Cost(), step, Cost(), 20 * step, 20 * step)
        >>> few = Budget(runs=120).bounded(whole)
        >>> few.steps, few.bounded_by, few.total.seconds, few.high.seconds
        (5, 'max_metric_calls', 10.0, 10.0)
        """
        limits = {
            "max_generated_tokens": (self.tokens, "written"),
            "max_metric_calls": (self.runs, "runs"),
            "max_seconds": (self.seconds, "seconds"),
        }
        found = estimate
        for name, (limit, kind) in limits.items():
            step, seed = getattr(estimate.step, kind), getattr(estimate.seed, kind)
            if limit is None or not step:
                continue
            allowed = max(
                0, -int(-(limit / len(estimate.predictors) - seed) // step)
            )  # the step that reaches it counts
            if allowed < found.steps:
                found = replace(found, steps=allowed, bounded_by=name)
        if found is estimate or not estimate.total.seconds:
            return found
        share = found.total.seconds / estimate.total.seconds
        return replace(found, low=share * estimate.low, high=share * estimate.high)


def duration(seconds: float) -> str:
    """A time in words.

    >>> duration(42), duration(150), duration(9000)
    ('42 s', '2.5 min', '2.5 h')
    """
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def count(number: float) -> str:
    """A number of tokens in words.

    >>> count(912), count(113318), count(2.5e6)
    ('912', '113k', '2.5M')
    """
    if number < 9950:
        return f"{number:.0f}" if number < 1000 else f"{number / 1e3:.1f}k"
    return f"{number / 1e3:.0f}k" if number < 999_500 else f"{number / 1e6:.1f}M"
